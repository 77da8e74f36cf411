"""Sine position encoding of a feature map (Carion et al., DETR, ECCV 2020, appendix), computed once per size."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
def sine_position_encoding(
    height: int, width: int, num_channels: int, device: torch.device, temperature: float = 10000.0, first: int = 1
) -> Tensor:
    """(1, ``num_channels``, height, width) float32: first half for the row, second half for the column.

    Rows and columns count from ``first`` (1, or 0) and are scaled to 2*pi over the map; even channels are sines, odd
    ones cosines. The result depends on the size alone, so it is cached; it must not be changed in place.

    Raises:
        ValueError: ``num_channels`` is not a multiple of 4.
    """
    if num_channels % 4:
        raise ValueError(f"the position encoding needs a multiple of 4 channels, got {num_channels}")
    half = num_channels // 2
    channel = torch.arange(half, dtype=torch.float32, device=device)
    wavelength = temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / half)

    def axis(length: int) -> Tensor:
        position = torch.arange(first, length + first, dtype=torch.float32, device=device)
        angle = (position / (length + first - 1 + 1e-6) * (2 * math.pi))[:, None] / wavelength  # (length, half)
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    rows = axis(height).T[:, :, None].expand(half, height, width)
    columns = axis(width).T[:, None, :].expand(half, height, width)
    return torch.cat([rows, columns])[None]
