"""Focal loss (Lin et al., ICCV 2017) of independent classes, and the same as a matching cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-a (1 - p)^gamma log p of every element, where p is the probability of the target (0 or 1); no reduction."""
    probabilities = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = probabilities + targets - 2 * probabilities * targets
    return (alpha * targets + (1 - alpha) * (1 - targets)) * missed**gamma * cross_entropy


def focal_cost(logits: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-8) -> Tensor:
    """What naming a class costs, minus what not naming it costs; any shape."""
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -torch.log(p + eps)
    negative = (1 - alpha) * p**gamma * -torch.log(1 - p + eps)
    return positive - negative
