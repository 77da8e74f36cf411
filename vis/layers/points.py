"""Sampling of masks and features at points instead of everywhere (PointRend, Kirillov et al., CVPR 2020, section 4.1).

Points are (x, y) in 0..1 over the picture, so one set of points reads maps of different sizes at the same places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of ``maps`` (R, C, h, w) at ``points`` (R, P, 2) -> (R, C, P); zero outside the map."""
    grid = points[:, :, None, :] * 2.0 - 1.0
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


def uncertain_points(logits: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Points for the mask losses, most of them where a mask is undecided.

    ``oversample_ratio * num_points`` uniform points are drawn per mask and the ``importance_ratio`` share of
    ``num_points`` with the smallest absolute logit is kept; the rest are new uniform points (PointRend, section 4.1).

    Args:
        logits: (R, h, w), one map per mask.

    Returns:
        (R, num_points, 2), without gradient.
    """
    rows, device = logits.shape[0], logits.device
    num_important = int(importance_ratio * num_points)
    with torch.no_grad():
        drawn = torch.rand(rows, int(num_points * oversample_ratio), 2, device=device)
        closeness = sample_points(logits[:, None].float(), drawn)[:, 0].abs()  # small is uncertain
        index = closeness.topk(num_important, dim=1, largest=False, sorted=False).indices
        kept = drawn.gather(1, index[..., None].expand(-1, -1, 2))
        fresh = torch.rand(rows, num_points - num_important, 2, device=device)
        return torch.cat([kept, fresh], dim=1)
