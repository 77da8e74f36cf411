"""How near the decisions of a recorded run of IAI were to others: what a difference elsewhere has to be judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from vis.engine.parity.compared import Comparison
from vis.modeling.heads.fcos import locations_of, rows
from vis.modeling.meta_arch.iai import IAI
from vis.modeling.trackers.identified_frames import FrameResult

# More than any assignment costs.
_FORBIDDEN = 1e3


def detection_margins(
    model: IAI, result: FrameResult, image_size: tuple[int, int], weights: tuple[float, float]
) -> Tensor:
    """Of a frame: smallest distance of a candidate's best class or id score to its threshold; smallest gap between the
    ranks of neighbours among the detections; smallest distance to the NMS threshold of an IoU between a detection and a
    worse candidate that no better one had removed. Infinite where there is none.
    """
    detector: Any = model.image_model
    outputs = detector.head(result.pyramid)
    at = detector._candidates(outputs)
    classes, ids = (rows(maps)[0, at].sigmoid().amax(dim=1) for maps in (outputs.logits, outputs.ids))
    center = rows(outputs.centerness)[0, at, 0].sigmoid()
    limits = (detector.class_threshold, detector.id_threshold)
    near = torch.stack([(classes - limits[0]).abs(), (ids - limits[1]).abs()]).min()
    above = ((classes > limits[0]) & (ids > limits[1])).nonzero()[:, 0]
    ranks = (center * (weights[0] * classes + weights[1] * ids))[above]
    order = ranks.argsort(descending=True)
    points = locations_of(outputs.logits, detector.proposal_generator.fcos_head.strides).points[at[above]]
    boxes = detector._boxes(rows(outputs.boxes)[0, at[above]], points, image_size)[order]
    gap, overlap = (torch.tensor(float("inf")) for _ in range(2))
    alive, kept = torch.ones(len(order), dtype=torch.bool), 0
    for row in range(len(order)):
        if not alive[row] or kept == len(result.found):
            continue
        kept += 1
        alive[: row + 1] = False
        others = box_iou(boxes[row, None], boxes)[0].nan_to_num(0.0)  # of two boxes without an extent
        overlap = torch.minimum(overlap, (others[alive] - detector.nms_iou).abs().min() if alive.any() else overlap)
        alive &= others <= detector.nms_iou
    scores = result.found.scores
    if len(scores) > 1:
        gap = (scores[:-1] - scores[1:]).min()
    return torch.stack([near, gap, overlap])


def assignment_margin(scores: Tensor, next_id: int) -> float:
    """By how much the best assignment of (k, N) id scores is better than the best one with another meaning.

    Columns from ``next_id`` on all mean "new". Infinite where nothing has to be assigned or there is no other meaning.
    """
    count = len(scores)
    if not count:
        return float("inf")
    wide = torch.cat([scores, scores.new_zeros(count, 1), scores[:, -1:].expand(-1, count - 1)], dim=1)
    costs = -wide.double().cpu().numpy()
    chosen, columns = linear_sum_assignment(costs)
    best, others = costs[chosen, columns].sum(), []
    for row, column in zip(chosen, columns, strict=True):
        without = costs.copy()
        without[row, slice(next_id, None) if column >= next_id else column] = _FORBIDDEN
        others.append(without[linear_sum_assignment(without)].sum())
    margin = float(min(others) - best)
    return margin if margin < _FORBIDDEN / 2 else float("inf")


def compare_margins(compared: Comparison, name: str, found: Tensor, bar: float) -> None:
    """Where both sides have a value; the release has others where there is none."""
    recorded = compared.recorded.get(name)
    if recorded is None or tuple(recorded.shape) != tuple(found.shape):
        compared.close(name, found, bar)
        return
    ours = found.double().numpy()
    there = np.isfinite(ours) & np.isfinite(recorded) & (recorded >= 0) & (np.abs(recorded) < 1) & (np.abs(ours) < 1)
    worst = float(np.abs(ours[there] - recorded[there]).max(initial=0))
    compared.note(name, worst <= bar, f"differ by at most {worst:.1e}, allowed {bar:.0e}; {int(there.sum())} values")
