"""From the queries of one frame to its detections, as IDOL's release does: threshold, box NMS by class, mask NMS."""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from torch import Tensor

from vis.modeling.losses.boxes import corners


def select_queries(probabilities: Tensor, boxes: Tensor, *, threshold: float, iou: float) -> Tensor:
    """Queries (n,) whose best class is above ``threshold`` and that no better one of that class covers, best first.

    Where no query is above it, the single best one is taken, so that n is at least 1.

    Args:
        probabilities: (Q, K); boxes: (Q, 4) centre and size; iou: of boxes, above which the worse one goes.
    """
    scores, labels = probabilities.max(dim=-1)
    chosen = (scores > threshold).nonzero()[:, 0]
    if not len(chosen):
        return scores.argmax()[None]
    return chosen[batched_nms(corners(boxes[chosen]), scores[chosen], labels[chosen], iou)]


def mask_nms(logits: Tensor, iou: float) -> Tensor:
    """Rows (n,) of (N, h, w) masks, best first, that overlap none of the better rows by more than ``iou``.

    Classes do not matter. Two masks without a pixel count as one (IoU 1).
    """
    flat = (logits > 0).flatten(1).float()
    areas = flat.sum(dim=1)
    intersection = flat @ flat.T
    union = areas[:, None] + areas[None] - intersection
    covers = ((intersection + 1e-6) / (union + 1e-6) > iou).cpu()
    keep = torch.ones(len(covers), dtype=torch.bool)
    for row in range(len(covers)):
        if keep[row]:
            keep[row + 1 :] &= ~covers[row, row + 1 :]
    return keep.nonzero()[:, 0].to(logits.device)
