"""Average precision and recall of video instance segmentation, as the YouTube-VIS challenge measures them.

Definition: Yang et al., "Video Instance Segmentation" (ICCV 2019), section 5, with the conventions of COCO.
A predicted track and an object are compared over the whole video: the intersections of all frames over the unions of
all frames, where a frame in which only one of them has a mask adds that mask to the union. The numbers equal those of
the official code to 1e-12, with one difference on purpose: there an object whose annotation has the id 0 can never be
found, because 0 also stands for "not matched"; here any id is as good as any other.

Beside the official numbers: AP and AR of each class, and of parts of the data set (``vis.evaluation.ap_breakdown``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from vis.evaluation import ap_breakdown
from vis.evaluation.ap_core import Match, accumulate, by_score, match, mean, summary
from vis.evaluation.result_files import ResultsError, Skipped, iter_results
from vis.evaluation.rle_kernels import compiled
from vis.evaluation.track_iou import pairwise_iou
from vis.evaluation.ytvis_io import GroundTruth, Track, Tracks, check_results, load_ground_truth

logger = logging.getLogger(__name__)

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the 12 numbers, in the official order."""

AREA_RANGES = np.array([[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]])
"""All, small, medium, large: mean area in pixels."""

_MOST_THREADS = 8
_COUNTS = ("videos", "objects")

Numbers = dict[str, float]


@dataclass(frozen=True)
class YTVISResult:
    """The evaluation of one result file.

    All values are fractions, -1 where there is nothing to measure.

    Attributes:
        stats: 12 numbers in the order of ``NAMES``.
        per_class: AP of each category by name, in the order of ids.
        num_videos: videos of the ground truth.
        num_results: predictions that were evaluated.
        class_stats: of each category by name: AP, AP50, AP75, AR1, AR10, AR100; ``objects`` that count.
        breakdown: ``occlusion``, ``length``, ``ytvis2022``, those there are -> group -> the same numbers, and counts of
            ``objects`` and ``videos``. ``ytvis2022`` has a third group ``mean``, of the other two, which is its AP.
        skipped: predictions that were left out on demand: ``total``, ``kinds``, ``first``; None where all were read.
    """

    stats: list[float]
    per_class: dict[str, float]
    num_videos: int
    num_results: int
    class_stats: dict[str, Numbers] = field(default_factory=dict)
    breakdown: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    skipped: dict[str, Any] | None = None

    def percent(self) -> dict[str, float]:
        """Name -> value in percent, as detectron2 reports; -1 stays -1."""
        return {name: _percent(value) for name, value in zip(NAMES, self.stats, strict=True)}

    def class_percent(self) -> dict[str, float]:
        """``AP-<class>`` -> AP in percent; -1 stays -1."""
        return {f"AP-{name}": _percent(value) for name, value in self.per_class.items()}

    def as_dict(self) -> dict[str, Any]:
        """For a json file: the attributes, and ``names``, those of ``stats``."""
        return {"names": list(NAMES), **asdict(self)}

    def table(self) -> str:
        """Text tables in percent: the 12 numbers, the parts of the data set, AP per category; "-": nothing measured."""
        cells = [cell for name, value in self.percent().items() for cell in (name, _show(value, 3))]
        classes = [cell for name, value in self.class_percent().items() for cell in (name, _show(value, 3))]
        tables = [_columns(cells, 6), self.breakdown_table(), _columns(classes, 3)]
        return "\n\n".join(table for table in tables if table)

    def breakdown_table(self) -> str:
        """The parts of the data set; empty where there are none."""
        rows = {f"{kind}: {group}": row for kind, groups in self.breakdown.items() for group, row in groups.items()}
        return _numbers_table(rows)

    def class_table(self) -> str:
        """All numbers of each category."""
        return _numbers_table(self.class_stats)

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


def _columns(cells: list[str], pairs: int) -> str:
    """Name and value cells, so many pairs a line."""
    lines = [cells[i : i + 2 * pairs] for i in range(0, len(cells), 2 * pairs)]
    return tabulate(
        lines, tablefmt="presto", disable_numparse=True, colalign=("left", "right") * min(pairs, len(cells) // 2)
    )


def _numbers_table(rows: Mapping[str, Numbers]) -> str:
    """One line per row, its numbers in percent."""
    if not rows:
        return ""
    names = list(next(iter(rows.values())))
    lines = [
        [label, *(_count(row.get(n)) if n in _COUNTS else _show(_percent(row.get(n, -1.0)), 3) for n in names)]
        for label, row in rows.items()
    ]
    align = ("left", *["right"] * len(names))
    return tabulate(lines, headers=["", *names], tablefmt="presto", disable_numparse=True, colalign=align)


def _count(value: float | None) -> str:
    return "" if value is None else str(int(value))


def evaluate_ytvis(
    gt: str | Path | Mapping[str, Any] | GroundTruth,
    results: str | Path | Sequence[Any],
    *,
    allow_missing: bool = True,
    skip_invalid: bool = False,
    workers: int | None = None,
    length_bounds: Sequence[int] | None = None,
) -> YTVISResult:
    """Evaluate results in the submission format.

    Args:
        gt: path or content of a YouTube-VIS json with annotations, or what ``load_ground_truth`` made of it.
        results: path of a ``results.json``, of a zip that holds one or of a folder of part files; or the list itself.
            An empty list is valid: nothing was found, so AP and AR are 0.
        allow_missing: accept results in which videos of the ground truth do not occur (they count as "nothing found",
            as in the official code, and a warning gives their number); otherwise they are an error.
        skip_invalid: leave out predictions that cannot be evaluated; the log and ``skipped`` say which.
        workers: see :func:`evaluate_tracks`.
        length_bounds: see ``ap_breakdown.length_groups``.

    Raises:
        NoGroundTruth: the ground truth has no annotations.
        GroundTruthError, ResultsError: not in the format, or not of this data set; with every problem of the results.
        FileNotFoundError: no such file.
    """
    truth = gt if isinstance(gt, GroundTruth) else load_ground_truth(gt)
    found, skipped = read_tracks(truth, results, allow_missing=allow_missing, skip_invalid=skip_invalid)
    result = evaluate_tracks(truth, found, workers=workers, length_bounds=length_bounds)
    return replace(result, skipped=skipped.as_dict()) if skip_invalid else result


def read_tracks(
    truth: GroundTruth, results: str | Path | Sequence[Any], *, allow_missing: bool = True, skip_invalid: bool = False
) -> tuple[Tracks, Skipped]:
    """Read and check results; arguments and errors as :func:`evaluate_ytvis`.

    Returns:
        The tracks, and the predictions that were left out (none without ``skip_invalid``).
    """
    where = str(results) if isinstance(results, (str, Path)) else "the results"
    skipped = Skipped()
    chosen = skipped if skip_invalid else None
    found = check_results(iter_results(results, chosen), truth, where, skipped=chosen)
    if skipped.total:
        logger.warning("%s: predictions that cannot be evaluated are left out, %s", where, skipped)
    _report_missing(truth, found, where, allow_missing)
    return found, skipped


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


def evaluate_tracks(
    truth: GroundTruth, found: Tracks, *, workers: int | None = None, length_bounds: Sequence[int] | None = None
) -> YTVISResult:
    """Evaluate results that are read already.

    Args:
        truth: as ``load_ground_truth`` gives it.
        found: as ``check_results`` gives it.
        workers: threads that compare masks. None: one per core, 8 at most; one where masks are not compared by compiled
            code, since pycocotools lets no other thread run.
        length_bounds: see ``ap_breakdown.length_groups``.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"the number of workers must be positive, found {workers}")
    occlusion = ap_breakdown.has_occlusion(truth)

    def match_video(keys: list[tuple[int, int]]) -> list[Match]:
        return [_match(found.get(key, []), truth.tracks.get(key, []), occlusion) for key in keys]

    keys = sorted({*found, *truth.tracks})  # by video, as the official code goes through them
    of_videos = [list(group) for _, group in groupby(keys, key=lambda key: key[0])]
    with ThreadPoolExecutor(workers or (min(os.cpu_count() or 1, _MOST_THREADS) if compiled() else 1)) as pool:
        matches = dict(zip(keys, chain.from_iterable(pool.map(match_video, of_videos)), strict=True))
    rows = len(AREA_RANGES) + len(ap_breakdown.OCCLUSION_GROUPS) * occlusion
    precision, recall, objects = _accumulated(matches, truth, rows)
    classes = list(truth.categories.values())
    class_stats = {
        name: {**summary(precision[k, 0], recall[k, 0]), "objects": int(objects[k, 0])}
        for k, name in enumerate(classes)
    }
    breakdown = {}
    if occlusion:
        breakdown["occlusion"] = {
            name: {**summary(precision[:, row], recall[:, row]), "objects": int(objects[:, row].sum())}
            for row, name in enumerate(ap_breakdown.OCCLUSION_GROUPS, start=len(AREA_RANGES))
        }
    return YTVISResult(
        _summary(precision, recall),
        {name: row["AP"] for name, row in class_stats.items()},
        len(truth.videos),
        sum(map(len, found.values())),
        class_stats,
        {**breakdown, **_by_video(matches, truth, length_bounds)},
    )


def _match(detections: Sequence[Track], objects: Sequence[Track], occlusion: bool) -> Match:
    """The matching of one video and category; rows: the ranges of areas, then the groups of occlusion."""
    scores = np.array([track.score for track in detections], np.float64)
    order = by_score(scores)
    detections = [detections[i] for i in order]
    crowd = np.array([track.ignore for track in objects], bool)
    unwanted, outside = _outside_areas(objects), _outside_areas(detections)
    if occlusion:
        unwanted = np.concatenate([unwanted, ap_breakdown.outside_occlusion(objects)])
        outside = np.concatenate([outside, np.zeros((len(ap_breakdown.OCCLUSION_GROUPS), len(detections)), bool)])
    ious = pairwise_iou(detections, objects)
    return match(ious, scores[order], crowd=crowd, unwanted=unwanted | crowd, outside=outside)


def _outside_areas(tracks: Sequence[Track]) -> NDArray[np.bool_]:
    """(A, N): the mean area is out of the range."""
    areas = np.array([track.mean_area for track in tracks], np.float64)
    outside: NDArray[np.bool_] = (areas < AREA_RANGES[:, :1]) | (areas > AREA_RANGES[:, 1:])
    return outside


def _accumulated(
    matches: Mapping[tuple[int, int], Match], truth: GroundTruth, rows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Precision (K, R, M, T, 101), recall (K, R, M, T) and objects (K, R) of all categories."""
    of_class: dict[int, list[Match]] = {category: [] for category in truth.categories}
    for (_, category), each in matches.items():
        of_class[category].append(each)
    parts = [accumulate(each, rows) for each in of_class.values()]
    objects = [
        np.sum([m.num_objects[:rows] for m in each], axis=0) if each else np.zeros(rows) for each in of_class.values()
    ]
    return (
        np.stack([part[0] for part in parts]),
        np.stack([part[1] for part in parts]),
        np.stack(objects).astype(np.int64),
    )


def _by_video(
    matches: Mapping[tuple[int, int], Match], truth: GroundTruth, bounds: Sequence[int] | None
) -> dict[str, dict[str, Numbers]]:
    """The numbers of groups of videos."""
    kinds = {"length": ap_breakdown.length_groups(truth, bounds), "ytvis2022": ap_breakdown.ytvis2022_groups(truth)}
    breakdown: dict[str, dict[str, Numbers]] = {}
    for kind, groups in kinds.items():
        if len(groups) < 2 and (bounds is None or not groups):
            continue  # the one group is all videos, and nobody asked for it
        breakdown[kind] = {}
        for name, videos in groups.items():
            chosen = {key: each for key, each in matches.items() if key[0] in videos}
            precision, recall, objects = _accumulated(chosen, truth, 1)
            counts = {"objects": int(objects.sum()), "videos": len(videos)}
            breakdown[kind][name] = {**summary(precision[:, 0], recall[:, 0]), **counts}
    if "ytvis2022" in breakdown:
        mean_row = ap_breakdown.mean_of_groups(breakdown["ytvis2022"])
        breakdown["ytvis2022"]["mean"] = {name: value for name, value in mean_row.items() if name not in _COUNTS}
    return breakdown


def _summary(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> list[float]:
    """The 12 numbers from (K, R, M, T, 101) precision and (K, R, M, T) recall."""
    all_areas = summary(precision[:, 0], recall[:, 0])
    return [
        *(all_areas[name] for name in NAMES[:3]),
        *(mean(precision[:, area, -1]) for area in (1, 2, 3)),
        *(all_areas[name] for name in NAMES[6:9]),
        *(mean(recall[:, area, -1]) for area in (1, 2, 3)),
    ]
