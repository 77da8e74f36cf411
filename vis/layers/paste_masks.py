"""Square masks of boxes, as Mask R-CNN predicts them (He et al., ICCV 2017), put into the picture."""

from __future__ import annotations

import torch
from torch import Tensor


def paste_masks(crops: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear between the centres of a crop's cells, which its box is divided into; falls to 0 outside.

    Bilinear interpolation is separable, so a picture is the product of two thin matrices with the crop; this equals
    sampling the crop at every pixel, and takes no table of the pixels' places.

    Args:
        crops: (n, M, M); boxes: (n, 4) x0, y0, x1, y1 in pixels; size: (H, W) of the picture.

    Returns:
        (n, H, W) float32.
    """
    crops = crops.float()
    rows = _weights(boxes[:, 1], boxes[:, 3], size[0], crops.shape[1])  # (n, H, M)
    columns = _weights(boxes[:, 0], boxes[:, 2], size[1], crops.shape[2])  # (n, W, M)
    with torch.autocast(device_type=crops.device.type, enabled=False):
        return rows @ crops @ columns.transpose(1, 2)


def _weights(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:
    """(n, pixels, cells): how much each cell of a crop that spans ``low`` to ``high`` (n,) adds to each pixel."""
    centres = torch.arange(pixels, device=low.device, dtype=torch.float32) + 0.5
    length = (high - low).float().clamp(min=1e-6)
    places = (centres[None] - low.float()[:, None]) / length[:, None] * cells - 0.5  # (n, pixels), in cells
    distance = places[..., None] - torch.arange(cells, device=low.device, dtype=torch.float32)
    return (1 - distance.abs()).clamp(min=0)
