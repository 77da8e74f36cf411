"""Average precision and recall of video instance segmentation, as the YouTube-VIS challenge measures them.

Definition: Yang et al., "Video Instance Segmentation" (ICCV 2019), section 5, with the conventions of COCO.
A predicted track and an object are compared over the whole video: the intersections of all frames over the unions of
all frames, where a frame in which only one of them has a mask adds that mask to the union. The numbers equal those of
the official code to 1e-12, with one difference on purpose: there an object whose annotation has the id 0 can never be
found, because 0 also stands for "not matched"; here any id is as good as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.track_iou import pairwise_iou
from vis.evaluation.ytvis_io import (
    GroundTruth,
    ResultsError,
    Track,
    Tracks,
    check_results,
    load_ground_truth,
    load_results,
)

logger = logging.getLogger(__name__)

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the 12 numbers, in the official order."""

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = (1, 10, 100)
AREA_RANGES = np.array([[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]])
"""All, small, medium, large: mean area in pixels."""


@dataclass(frozen=True)
class YTVISResult:
    """The evaluation of one result file.

    Attributes:
        stats: 12 numbers in the order of ``NAMES``, fractions; -1 where the ground truth has nothing of that size.
        per_class: AP of each category by name, in the order of ids; -1 where the ground truth has none of it.
        num_videos: videos of the ground truth.
        num_results: predictions that were evaluated.
    """

    stats: list[float]
    per_class: dict[str, float]
    num_videos: int
    num_results: int

    def percent(self) -> dict[str, float]:
        """Name -> value in percent, as detectron2 reports; -1 stays -1."""
        return {name: _percent(value) for name, value in zip(NAMES, self.stats, strict=True)}

    def class_percent(self) -> dict[str, float]:
        """``AP-<class>`` -> AP in percent; -1 stays -1."""
        return {f"AP-{name}": _percent(value) for name, value in self.per_class.items()}

    def as_dict(self) -> dict[str, Any]:
        """For a json file: ``stats``, their ``names``, ``per_class``, ``num_videos``, ``num_results``."""
        return {"names": list(NAMES), **asdict(self)}

    def table(self) -> str:
        """Two text tables, the 12 numbers and the AP per category, in percent; "-" where nothing is measured."""
        return "\n".join([_table(list(self.percent().items()), 6), "", _table(list(self.class_percent().items()), 3)])

    def copypaste(self) -> str:
        """The lines that detectron2 prints for spreadsheets and that scripts look for."""
        values = self.percent()
        return "\n".join(
            [
                "copypaste: Task: segm",
                "copypaste: " + ",".join(values),
                "copypaste: " + ",".join(_show(value, 4) for value in values.values()),
            ]
        )


def _percent(value: float) -> float:
    return value * 100 if value >= 0 else -1.0


def _show(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value >= 0 else "-"


def _table(items: list[tuple[str, float]], columns: int) -> str:
    """Name and value cells, ``columns`` pairs a line, aligned."""
    cells = [(name, _show(value, 3)) for name, value in items]
    wide_name = max((len(name) for name, _ in cells), default=0)
    wide_value = max((len(value) for _, value in cells), default=0)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return "\n".join("| " + " | ".join(f"{n:<{wide_name}} {v:>{wide_value}}" for n, v in row) + " |" for row in rows)


def evaluate_ytvis(
    gt: str | Path | Mapping[str, Any],
    results: str | Path | Sequence[Any],
    *,
    allow_missing: bool = True,
) -> YTVISResult:
    """Evaluate results in the submission format.

    Args:
        gt: path or content of a YouTube-VIS json with annotations.
        results: path of a ``results.json``, of a zip that holds one or of a folder of part files; or the list itself.
            An empty list is valid: nothing was found, so AP and AR are 0.
        allow_missing: accept results in which videos of the ground truth do not occur (they count as "nothing found",
            as in the official code, and a warning gives their number); otherwise they are an error.

    Raises:
        NoGroundTruth: the ground truth has no annotations.
        GroundTruthError, ResultsError: not in the format, or not of this data set; with every problem of the results.
        FileNotFoundError: no such file.
    """
    truth = load_ground_truth(gt)
    entries = load_results(results)
    where = str(results) if isinstance(results, (str, Path)) else "the results"
    found = check_results(entries, truth, where)
    _report_missing(truth, found, where, allow_missing)
    matches = {key: _match(found.get(key, []), truth.tracks.get(key, [])) for key in {*found, *truth.tracks}}
    # one row per category: (K, A, M, T, 101) precision and (K, A, M, T) recall
    parts = [
        _accumulate([matches[video, category] for video in sorted(truth.videos) if (video, category) in matches])
        for category in truth.categories
    ]
    precision = np.stack([part[0] for part in parts])
    recall = np.stack([part[1] for part in parts])
    per_class = {name: _mean(precision[k, 0, -1]) for k, name in enumerate(truth.categories.values())}
    return YTVISResult(_summary(precision, recall), per_class, len(truth.videos), len(entries))


def _report_missing(truth: GroundTruth, found: Tracks, where: str, allow_missing: bool) -> None:
    if not found:
        logger.warning("%s: empty, not one prediction for %d videos: AP is 0.", where, len(truth.videos))
    missing = sorted(set(truth.videos) - {video for video, _ in found})
    if not missing:
        return
    message = f"{where}: no prediction for {len(missing)} of {len(truth.videos)} videos (ids {missing[:10]}"
    message += " ...)" if len(missing) > 10 else ")"
    if not allow_missing:
        raise ResultsError(message + ". Was the inference stopped before its end? Run it over the whole data set.")
    if found:
        logger.warning("%s; they count as videos in which nothing was found.", message)


@dataclass
class _Match:
    """Matching of one video and category; D detections by falling score, A area ranges, T thresholds, G objects."""

    scores: NDArray[np.float64]  # (D,)
    matched: NDArray[np.bool_]  # (A, T, D)
    ignored: NDArray[np.bool_]  # (A, T, D)
    num_objects: NDArray[np.int64]  # (A,) objects that count


def _match(detections: list[Track], objects: list[Track]) -> _Match:
    """Greedy matching, highest score first: each detection takes the best object that is left, an ignored one (a crowd,
    or out of the area range) only if no other reaches the threshold. Of equally good objects the last one is taken."""
    scores = np.array([track.score for track in detections], np.float64)
    order = np.argsort(-scores, kind="mergesort")[: MAX_DETECTIONS[-1]]
    detections = [detections[i] for i in order]
    crowd = np.array([track.ignore for track in objects], bool)
    unwanted = crowd | _outside(objects)  # (A, G)
    shape = (len(AREA_RANGES), len(IOU_THRESHOLDS))
    matched = np.zeros((*shape, len(detections)), bool)
    on_ignored = np.zeros_like(matched)
    if detections and objects:
        ious = pairwise_iou(detections, objects)
        thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
        taken = np.zeros((*shape, len(objects)), bool)
        for d in np.flatnonzero((ious >= thresholds[0]).any(1)):
            free = (ious[d] >= thresholds) & (crowd | ~taken)  # (A, T, G)
            wanted = free & ~unwanted[:, None]
            is_wanted = wanted.any(2)
            candidates = np.where(is_wanted[..., None], wanted, free & unwanted[:, None])
            best = len(objects) - 1 - np.where(candidates, ious[d], -1.0)[..., ::-1].argmax(2)  # the last maximum
            a, t = np.nonzero(candidates.any(2))
            taken[a, t, best[a, t]] = True
            matched[a, t, d] = True
            on_ignored[a, t, d] = ~is_wanted[a, t]
    ignored = on_ignored | (~matched & _outside(detections)[:, None])
    return _Match(scores[order], matched, ignored, (~unwanted).sum(1))


def _outside(tracks: list[Track]) -> NDArray[np.bool_]:
    """(A, N): the mean area is out of the range."""
    areas = np.array([track.mean_area for track in tracks], np.float64)
    outside: NDArray[np.bool_] = (areas < AREA_RANGES[:, :1]) | (areas > AREA_RANGES[:, 1:])
    return outside


def _accumulate(matches: list[_Match]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (A, M, T, 101) and recall (A, M, T) of one category; -1 where no object counts."""
    areas, thresholds = len(AREA_RANGES), len(IOU_THRESHOLDS)
    precision = -np.ones((areas, len(MAX_DETECTIONS), thresholds, len(RECALL_THRESHOLDS)))
    recall = -np.ones((areas, len(MAX_DETECTIONS), thresholds))
    if not matches:
        return precision, recall
    num_objects = np.sum([match.num_objects for match in matches], axis=0)
    for m, limit in enumerate(MAX_DETECTIONS):
        scores = np.concatenate([match.scores[:limit] for match in matches])
        order = np.argsort(-scores, kind="mergesort")
        matched = np.concatenate([match.matched[..., :limit] for match in matches], axis=2)[..., order]
        ignored = np.concatenate([match.ignored[..., :limit] for match in matches], axis=2)[..., order]
        hits = np.cumsum(matched & ~ignored, axis=2).astype(np.float64)  # (A, T, D)
        misses = np.cumsum(~matched & ~ignored, axis=2).astype(np.float64)
        values = hits / (hits + misses + np.spacing(1))
        envelope = np.maximum.accumulate(values[..., ::-1], axis=2)[..., ::-1]
        for a in np.flatnonzero(num_objects):
            for t in range(thresholds):
                recalls = hits[a, t] / num_objects[a]
                recall[a, m, t] = recalls[-1] if len(recalls) else 0.0
                at = np.searchsorted(recalls, RECALL_THRESHOLDS, side="left")
                reached = at < len(recalls)
                precision[a, m, t] = 0.0
                precision[a, m, t, reached] = envelope[a, t, at[reached]]
    return precision, recall


def _summary(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> list[float]:
    """The 12 numbers from (K, A, M, T, 101) precision and (K, A, M, T) recall."""
    return [
        _mean(precision[:, 0, -1]),
        _mean(precision[:, 0, -1, 0]),
        _mean(precision[:, 0, -1, 5]),
        *(_mean(precision[:, area, -1]) for area in (1, 2, 3)),
        *(_mean(recall[:, 0, m]) for m in range(len(MAX_DETECTIONS))),
        *(_mean(recall[:, area, -1]) for area in (1, 2, 3)),
    ]


def _mean(values: NDArray[np.float64]) -> float:
    """Mean over what exists; -1 where nothing does."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
