"""Boxes between 0 and 1, their overlap, and losses of them."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-7


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> x0, y0, x1, y1."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of boxes x0, y0, x1, y1 that broadcast: (..., 4) each."""
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    intersection, hull = inside.prod(dim=-1), around.clamp(min=0).prod(dim=-1)
    union = size_a.prod(dim=-1) + size_b.prod(dim=-1) - intersection
    iou = intersection / (union + _EPS)
    return iou, iou - (hull - union) / (hull + _EPS)


def l1_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Absolute differences of (n, 4) boxes, summed."""
    return (boxes - targets).abs().sum()


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - GIoU of (n, 4) boxes (centre, size), summed."""
    return (1 - overlaps(corners(boxes), corners(targets))[1]).sum()
