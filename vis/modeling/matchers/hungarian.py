"""One-to-one matching of queries with instances (Carion et al., DETR, ECCV 2020, section 3.1)."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vis.modeling.losses.masks import dice_cost, sigmoid_ce_cost
from vis.modeling.matchers.finite import finite_or_error

Pairs = tuple[Tensor, Tensor]


def linear_assignment(cost: Tensor) -> Pairs:
    """The cheapest assignment of rows to columns of ``cost`` (Q, N), as int64 CPU tensors (rows, columns).

    Raises:
        FloatingPointError: a cost is NaN or infinite, which means that the network's outputs are. A training that
            watches for it goes on with a high cost and does not use the step (:mod:`vis.modeling.matchers.finite`).
    """
    cost = finite_or_error(
        cost,
        "{bad} of {all} matching costs are not finite, so the network's outputs are not. "
        "In training: lower SOLVER.BASE_LR, or use SOLVER.AMP.DTYPE bfloat16 instead of float16. "
        "At test time: the weights are broken (look for NaN in the file, or take an earlier checkpoint), "
        "or half precision overflows (run in float32)",
    )
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)


class HungarianMatcher:
    """Cost = class_weight * (-p_class) + mask_weight * BCE + dice_weight * dice, on sampled points, in float32."""

    def __init__(self, *, class_weight: float, mask_weight: float, dice_weight: float) -> None:
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight

    @torch.no_grad()
    def cost(self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        """Cost of every query with every instance, for any number of leading layers.

        Args:
            class_logits: (..., Q, K+1).
            mask_logits: (..., Q, P) at P points.
            labels: (N,) classes; masks: (N, P) in 0..1 at the same points.

        Returns:
            (..., Q, N) float32.
        """
        with torch.autocast(device_type=mask_logits.device.type, enabled=False):
            probabilities = class_logits.float().softmax(dim=-1)
            mask_logits, masks = mask_logits.float(), masks.float()
            return (
                self.mask_weight * sigmoid_ce_cost(mask_logits, masks)
                - self.class_weight * probabilities[..., labels]
                + self.dice_weight * dice_cost(mask_logits, masks)
            )

    def __call__(self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor) -> list[Pairs]:
        """For each of the leading ``layers`` the pairs (queries, instances); arguments as in :meth:`cost`, 3-d."""
        # Layer by layer, since the terms at all points are large; then one transfer for all of them.
        layers = [
            self.cost(classes, logits, labels, masks) for classes, logits in zip(class_logits, mask_logits, strict=True)
        ]
        costs = torch.stack(layers).cpu()
        return [linear_assignment(cost) for cost in costs]
