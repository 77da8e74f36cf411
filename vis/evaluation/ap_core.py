"""Matching and averaging behind every AP: the conventions of COCO, for any grouping of the objects.

A *row* is one way to choose the objects that count: all of them, those of a range of areas, of a level of occlusion.
Objects outside of a row are ignored there: a prediction that finds one of them is neither right nor wrong. Letters: R
rows, D detections by falling score, G objects, T IoU thresholds, M limits of detections per video and category.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = (1, 10, 100)


@dataclass(frozen=True)
class Match:
    """The matching of one video and category.

    Attributes:
        scores: (D,) falling.
        matched: (R, T, D) the detection found an object, ignored ones included.
        ignored: (R, T, D) the detection counts neither as right nor as wrong.
        num_objects: (R,) objects that count.
    """

    scores: NDArray[np.float64]
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    num_objects: NDArray[np.int64]


def by_score(scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """The detections that are measured, by falling score; of equal ones the first in the file comes first."""
    order: NDArray[np.intp] = np.argsort(-scores, kind="mergesort")[: MAX_DETECTIONS[-1]]
    return order


def match(
    ious: NDArray[np.float64],
    scores: NDArray[np.float64],
    *,
    crowd: NDArray[np.bool_],
    unwanted: NDArray[np.bool_],
    outside: NDArray[np.bool_],
) -> Match:
    """Greedy matching, highest score first.

    Each detection takes the best object that is left, an ignored one only if no other reaches the threshold. Of equally
    good objects the last one is taken. A crowd can be found any number of times.

    Args:
        ious: (D, G), the detections by falling score.
        scores: (D,).
        crowd: (G,).
        unwanted: (R, G) objects that are ignored; crowds are among them.
        outside: (R, D) detections that are ignored where they find nothing.
    """
    count, objects = ious.shape
    shape = (len(unwanted), len(IOU_THRESHOLDS))
    matched = np.zeros((*shape, count), bool)
    on_ignored = np.zeros_like(matched)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    taken = np.zeros((*shape, objects), bool)
    for d in np.flatnonzero((ious >= thresholds[0]).any(1)) if objects else ():
        free = (ious[d] >= thresholds) & (crowd | ~taken)  # (R, T, G)
        wanted = free & ~unwanted[:, None]
        is_wanted = wanted.any(2)
        candidates = np.where(is_wanted[..., None], wanted, free & unwanted[:, None])
        best = objects - 1 - np.where(candidates, ious[d], -1.0)[..., ::-1].argmax(2)  # the last maximum
        r, t = np.nonzero(candidates.any(2))
        taken[r, t, best[r, t]] = True
        matched[r, t, d] = True
        on_ignored[r, t, d] = ~is_wanted[r, t]
    return Match(scores, matched, on_ignored | (~matched & outside[:, None]), (~unwanted).sum(1))


def accumulate(matches: Sequence[Match], rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of one category over videos.

    Args:
        matches: in the order of the videos, which decides between equal scores.
        rows: the first so many rows are measured.

    Returns:
        Precision (R, M, T, 101) and recall (R, M, T); -1 where no object counts.
    """
    precision = -np.ones((rows, len(MAX_DETECTIONS), len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS)))
    recall = -np.ones(precision.shape[:3])
    num_objects = np.sum([match.num_objects[:rows] for match in matches], axis=0) if matches else np.zeros(rows)
    counted = np.flatnonzero(num_objects)
    if not len(counted):
        return precision, recall
    for m, limit in enumerate(MAX_DETECTIONS):
        scores = np.concatenate([match.scores[:limit] for match in matches])
        order = np.argsort(-scores, kind="mergesort")
        matched = np.concatenate([match.matched[:rows, :, :limit] for match in matches], axis=2)[..., order]
        ignored = np.concatenate([match.ignored[:rows, :, :limit] for match in matches], axis=2)[..., order]
        hits = np.cumsum(matched & ~ignored, axis=2).astype(np.float64)  # (R, T, D)
        misses = np.cumsum(~matched & ~ignored, axis=2).astype(np.float64)
        values = hits / (hits + misses + np.spacing(1))
        envelope = np.maximum.accumulate(values[..., ::-1], axis=2)[..., ::-1]
        for r in counted:
            for t in range(len(IOU_THRESHOLDS)):
                recalls = hits[r, t] / num_objects[r]
                recall[r, m, t] = recalls[-1] if len(recalls) else 0.0
                at = np.searchsorted(recalls, RECALL_THRESHOLDS, side="left")
                reached = at < len(recalls)
                precision[r, m, t] = 0.0
                precision[r, m, t, reached] = envelope[r, t, at[reached]]
    return precision, recall


def mean(values: NDArray[np.float64]) -> float:
    """Mean over what exists; -1 where nothing does."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def summary(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """The numbers of one row, from precision (..., M, T, 101) and recall (..., M, T).

    AP is the mean over the thresholds 0.50, 0.55 ... 0.95; AR<n> is the recall with the n best detections of each video
    and category, over the same thresholds. Fractions; -1 where there is nothing to measure.
    """
    return {
        "AP": mean(precision[..., -1, :, :]),
        "AP50": mean(precision[..., -1, 0, :]),
        "AP75": mean(precision[..., -1, 5, :]),
        **{f"AR{limit}": mean(recall[..., m, :]) for m, limit in enumerate(MAX_DETECTIONS)},
    }
