"""Mask losses on sampled points, and the same terms between all pairs as matching costs.

Cross entropy and dice as in Mask2Former (Cheng et al., CVPR 2022, section 3.3); dice after V-Net with +1 on both sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_ce_loss(logits: Tensor, targets: Tensor, num_masks: Tensor | float) -> Tensor:
    """Binary cross entropy, mean over P points, sum over masks divided by ``num_masks``.

    ``logits`` and ``targets`` (0..1) are (N, P); N may be 0, the result then is 0 and still part of the graph.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1).sum() / num_masks


def dice_loss(logits: Tensor, targets: Tensor, num_masks: Tensor | float) -> Tensor:
    """1 - (2 sum s t + 1) / (sum s + sum t + 1) over P points, sum over masks divided by ``num_masks``; (N, P) each."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * targets).sum(dim=1)
    total = probabilities.sum(dim=1) + targets.sum(dim=1)
    return (1 - (overlap + 1) / (total + 1)).sum() / num_masks


def sigmoid_ce_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of every prediction with every target: (..., Q, P), (N, P) -> (..., Q, N).

    BCE(x, t) = softplus(x) - x t, so the sum over points is one product.
    """
    return (F.softplus(logits).sum(dim=-1, keepdim=True) - logits @ targets.T) / logits.shape[-1]


def dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice of every prediction with every target: (..., Q, P), (N, P) -> (..., Q, N)."""
    probabilities = torch.sigmoid(logits)
    overlap = 2 * probabilities @ targets.T
    total = probabilities.sum(dim=-1, keepdim=True) + targets.sum(dim=-1)
    return 1 - (overlap + 1) / (total + 1)
