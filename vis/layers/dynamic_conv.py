"""Convolutions whose weights are predicted for each instance (Tian et al., CondInst, ECCV 2020, section 3.2).

All layers are 1x1. The first one reads the same features for every instance beside the instance's own coordinates, and
a coordinate depends on the column or the row alone. So its product with the features is one matrix product for all
instances, and coordinates are never spread over the map: the numbers are those of a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def num_parameters(widths: Sequence[int]) -> int:
    """Weights and biases of the layers ``widths[0] -> widths[1] -> ...``."""
    return sum((a + 1) * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def split_parameters(parameters: Tensor, widths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """(n, P) -> weights (n, out, in) of each layer, then biases (n, out) of each layer, in the order they lie in.

    Raises:
        ValueError: P is not what the widths need.
    """
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    if parameters.shape[1] != num_parameters(widths):
        raise ValueError(
            f"layers {list(widths)} need {num_parameters(widths)} parameters, found {parameters.shape[1]} per instance"
        )
    split = parameters.split([a * b for a, b in pairs] + [b for _, b in pairs], dim=1)
    weights = [part.unflatten(1, (b, a)) for part, (a, b) in zip(split[: len(pairs)], pairs, strict=True)]
    return weights, list(split[len(pairs) :])


def dynamic_convs(features: Tensor, parameters: Tensor, x: Tensor, y: Tensor, widths: Sequence[int]) -> Tensor:
    """Run each instance's layers, ReLU between them, over (x, y, features).

    Args:
        features: (C, h, w), of the picture.
        parameters: (n, P) as :func:`split_parameters` takes them; ``widths[0]`` is C + 2.
        x: (n, w) first input channel of each instance, the same in every row; y: (n, h) second, in every column.

    Returns:
        (n, widths[-1], h, w).
    """
    weights, biases = split_parameters(parameters, widths)
    n, (channels, height, width) = len(parameters), features.shape
    first = weights[0]
    out = (first[:, :, 2:].flatten(0, 1) @ features.reshape(channels, -1)).view(n, first.shape[1], height, width)
    out = out + (first[:, :, :1] * x[:, None])[:, :, None, :]
    out = out + (first[:, :, 1:2] * y[:, None] + biases[0][:, :, None])[..., None]
    out = out.flatten(2)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        out = torch.baddbmm(bias[:, :, None], weight, F.relu(out))
    return out.unflatten(2, (height, width))


def relative_axes(points: Tensor, height: int, width: int, stride: int) -> tuple[Tensor, Tensor]:
    """From the centre of each cell to ``points`` (n, 2), in pixels: (n, width) along x, (n, height) along y."""
    centres = torch.arange(max(height, width), dtype=points.dtype, device=points.device) * stride + stride // 2
    return points[:, :1] - centres[:width], points[:, 1:] - centres[:height]


def aligned_bilinear(maps: Tensor, factor: int) -> Tensor:
    """(N, C, h, w) -> (N, C, factor*h, factor*w), where cell i of ``maps`` stays the centre of its ``factor`` cells."""
    height, width = maps.shape[-2:]
    maps = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    size = (factor * height + 1, factor * width + 1)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    half = factor // 2
    maps = F.pad(maps, (half, 0, half, 0), mode="replicate")
    return maps[..., : factor * height, : factor * width]
