"""Masks of CondInst (Tian et al., ECCV 2020): a mask branch on the pyramid, and convolutions of each instance's own.

The layers of an instance are those of :mod:`vis.layers.dynamic_conv`, here for many instances of many frames at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn

from vis.layers.dynamic_conv import aligned_bilinear, relative_axes, split_parameters

#: Channels of the dynamic layers: two coordinates and eight features, two layers of eight, one logit.
WIDTHS = (10, 8, 8, 1)
#: Of the mask features.
FEATURE_STRIDE = 8


class MaskBranch(nn.Module):
    """Levels p3 to p5 to mask features at stride 8; names are those of AdelaiDet."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int = 128,
        num_levels: int = 3,
        num_convs: int = 4,
        out_channels: int = WIDTHS[0] - 2,
        norm: str = "BN",
    ) -> None:
        """Args: ``norm``: a name that detectron2 knows, for instance BN, SyncBN or GN."""
        super().__init__()
        self.refine = nn.ModuleList(_conv_norm_relu(in_channels, channels, norm) for _ in range(num_levels))
        convs = [_conv_norm_relu(channels, channels, norm) for _ in range(num_convs)]
        self.tower = nn.Sequential(*convs, nn.Conv2d(channels, out_channels, 1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps (N, C, h_l, w_l), each half the size of the one before -> (N, 8, h_0, w_0)."""
        x = self.refine[0](levels[0])
        for i, (refine, level) in enumerate(zip(self.refine[1:], levels[1:], strict=True), start=1):
            x = x + aligned_bilinear(refine(level), 2**i)
        return self.tower(x)


def _conv_norm_relu(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, get_norm(norm, out_channels), nn.ReLU(inplace=True))


def dynamic_logits(features: Tensor, parameters: Tensor, frames: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Mask logits (n, 2h, 2w), at half of the features' stride, of n instances of N frames.

    Coordinates are relative to an instance's location, divided by eight strides of its level.

    Args:
        features: (N, 8, h, w); parameters: (n, 169).
        frames: (n,) int64, whose features an instance reads.
        points: (n, 2) x, y of its location in pixels; strides: (n,) of its level.
    """
    weights, biases = split_parameters(parameters, WIDTHS)
    height, width = features.shape[-2:]
    if not len(parameters):
        # Resizing wants a picture; the sums are empty, so that gradients are zero.
        return parameters.sum() * features.sum() * features.new_zeros(0, 2 * height, 2 * width)
    size = (FEATURE_STRIDE * strides)[:, None]
    x, y = (axis / size for axis in relative_axes(points, height, width, FEATURE_STRIDE))
    first = weights[0]
    # A coordinate depends on the column or the row alone: it is added, not spread over the map beside the features.
    if len(features) == 1:
        out = (first[:, :, 2:].flatten(0, 1) @ features[0].flatten(1)).unflatten(0, first.shape[:2])
    else:
        out = torch.bmm(first[:, :, 2:], features.flatten(2).index_select(0, frames))
    out = out.unflatten(2, (height, width)) + (first[:, :, :1] * x[:, None])[:, :, None, :]
    out = (out + (first[:, :, 1:2] * y[:, None] + biases[0][:, :, None])[..., None]).flatten(2)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        out = torch.baddbmm(bias[:, :, None], weight, F.relu(out))
    return aligned_bilinear(out.unflatten(2, (height, width)), 2)[:, 0]
