"""Track metrics of video instance segmentation: HOTA, IDF1 and CLEAR MOTA, on masks.

AP judges a track as a whole; these say whether it was the detection or the association that failed.

- HOTA, DetA, AssA, LocA: Luiten et al., "HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking" (IJCV 2020),
  each the mean over the 19 thresholds alpha = 0.05, 0.10, ..., 0.95.
- IDF1: Ristani et al., "Performance Measures and a Data Set for Multi-Target, Multi-Camera Tracking" (ECCV-W 2016).
- MOTA, identity switches, fragmentations: Bernardin and Stiefelhagen, "Evaluating Multiple Object Tracking Performance:
  The CLEAR MOT Metrics" (2008).

Similarity is the mask IoU within a frame; IDF1 and CLEAR demand 0.5. Every class is measured by itself. The numbers
equal those of the evaluation kit TrackEval on the same tracks.

**Which predictions.** AP ranks predictions, so methods write many of low score that overlap one another (usually the
ten best pairs of query and class of a video). Track metrics know no ranking: each such track is a false positive, and
methods would be compared by how many tracks they write. So only tracks of ``score_threshold`` and above are measured,
0.3 unless told; the score of VIS is one per track, so no track loses single frames. TrackEval does not look at scores
for its YouTube-VIS benchmark: ``score_threshold=0`` gives its numbers. Masks of different tracks may overlap.

**Crowds** are not objects to be found. A predicted mask that matches no object (IoU 0.5) and lies by more than half in
a crowd is left out, as in the MOTS benchmarks. (TrackEval's YouTube-VIS takes crowds for objects; the official data
sets have none.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from vis.evaluation.track_iou import frame_intersections, frame_iou, track_areas
from vis.evaluation.ytvis_io import GroundTruth, Track, Tracks

ALPHAS = np.arange(0.05, 0.99, 0.05)
"""Similarity thresholds of HOTA."""
THRESHOLD = 0.5
"""Similarity that IDF1 and CLEAR demand."""
DEFAULT_SCORE = 0.3
COUNT_NAMES = ("IDTP", "IDFN", "IDFP", "CLR_TP", "CLR_FN", "CLR_FP", "IDSW", "Frag", "MT", "PT", "ML")
"""The numbers that are counted; all others are ratios."""

_EPS = np.finfo(float).eps
# A row of counts: for each alpha TP, FN, FP and the sums over TP of A(c), its recall, its precision and the IoU; then
# COUNT_NAMES, then the sum of IoU over CLR_TP. Rows of several videos or classes add up.
_HOTA = 7 * len(ALPHAS)
NUM_COUNTS = _HOTA + len(COUNT_NAMES) + 1


@dataclass(frozen=True)
class TrackMetrics:
    """Track metrics of a result file; ratios are fractions.

    Attributes:
        score_threshold: the score that tracks had to have.
        num_tracks: predicted tracks that had it.
        num_objects: objects of the ground truth, crowds not counted.
        class_averaged: name -> mean over the classes that have objects (counts: their sum).
        detection_averaged: name -> value with all detections of all classes taken together.
        per_class: class -> name -> value.

    The names: HOTA, DetA, AssA, DetRe, DetPr, AssRe, AssPr, LocA; IDF1, IDR, IDP; MOTA, MOTP; and ``COUNT_NAMES``.
    """

    score_threshold: float
    num_tracks: int
    num_objects: int
    class_averaged: dict[str, float]
    detection_averaged: dict[str, float]
    per_class: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """For a json file."""
        return asdict(self)

    def table(self) -> str:
        """A text table in percent: both averages, then the classes that have objects or predictions."""
        names = ("HOTA", "DetA", "AssA", "LocA", "IDF1", "MOTA", "IDSW", "Frag")
        rows = {"class average": self.class_averaged, "detection average": self.detection_averaged, **self.per_class}
        rows = {name: row for name, row in rows.items() if row["CLR_TP"] + row["CLR_FN"] + row["CLR_FP"] > 0}
        wide = max(map(len, rows), default=0)
        lines = [f"{'':<{wide}} " + " ".join(f"{name:>8}" for name in names)]
        for label, row in rows.items():
            cells = [f"{row[n]:8.0f}" if n in COUNT_NAMES else f"{row[n] * 100:8.3f}" for n in names]
            lines.append(f"{label:<{wide}} " + " ".join(cells))
        return "\n".join(lines)


def track_metrics(
    gt: GroundTruth, tracks: Tracks, *, score_threshold: float = DEFAULT_SCORE, all_classes: bool = False
) -> TrackMetrics:
    """Track metrics of loaded results.

    Args:
        gt: as ``load_ground_truth`` gives it.
        tracks: as ``check_results`` gives it.
        score_threshold: tracks below this score are left out; see above.
        all_classes: average over all classes of the ground truth file, as TrackEval does: one without objects then
            counts as HOTA 0 (and LocA 1). Else, as with AP, over the classes that have objects; on the official data
            sets these are all.
    """
    counts = track_counts(gt, tracks, score_threshold=score_threshold)
    per_class = {category: np.zeros(NUM_COUNTS) for category in gt.categories}
    for (_, category), row in counts.items():
        per_class[category] += row
    measured = np.array([row for row in per_class.values() if all_classes or has_objects(row)])
    total = np.sum(list(per_class.values()), axis=0)
    selected = [track for each in tracks.values() for track in each if track.score >= score_threshold]
    objects = [track for each in gt.tracks.values() for track in each if not track.ignore]
    return TrackMetrics(
        score_threshold=score_threshold,
        num_tracks=len(selected),
        num_objects=len(objects),
        class_averaged=_floats(class_average(measured if len(measured) else total[None])),
        detection_averaged=_floats(summarize(total)),
        per_class={name: _floats(summarize(per_class[category])) for category, name in gt.categories.items()},
    )


def track_counts(
    gt: GroundTruth, tracks: Tracks, *, score_threshold: float = DEFAULT_SCORE
) -> dict[tuple[int, int], NDArray[np.float64]]:
    """(video id, category id) -> counts (NUM_COUNTS,), which add up; pairs with neither object nor prediction are left
    out. :func:`summarize` turns sums of them into metrics."""
    counts = {}
    for key in sorted({*gt.tracks, *tracks}):
        chosen = [track for track in tracks.get(key, []) if track.score >= score_threshold]
        frames, num_objects, num_tracks = _frames(gt.tracks.get(key, []), chosen)
        counts[key] = sequence_counts(frames, num_objects, num_tracks)
    return counts


@dataclass
class Frame:
    """One frame of a sequence: which of the sequence's objects (G,) and tracks (D,) are seen, and their IoU (G, D)."""

    objects: NDArray[np.int64]
    tracks: NDArray[np.int64]
    similarity: NDArray[np.float64]


def _frames(objects: Sequence[Track], tracks: Sequence[Track]) -> tuple[list[Frame], int, int]:
    """The frames in which something is seen, and the numbers of objects and of tracks that are seen in one."""
    crowds = [track for track in objects if track.ignore and track.areas.any()]
    objects = [track for track in objects if not track.ignore and track.areas.any()]
    tracks = [track for track in tracks if track.areas.any()]
    if not objects and not tracks:
        return [], 0, 0
    length = len([*objects, *tracks][0].areas)
    sizes, areas = (track_areas(each).reshape(len(each), length) for each in (objects, tracks))
    iou = np.zeros((len(objects), len(tracks), length))
    in_crowd = np.zeros((len(tracks), length))
    if objects and tracks:
        iou = frame_iou(frame_intersections(objects, tracks), sizes, areas)
    if crowds and tracks:
        in_crowd = frame_intersections(tracks, crowds).max(1) / np.maximum(1, areas)
    frames = []
    for t in range(length):
        seen, found = np.flatnonzero(sizes[:, t]), np.flatnonzero(areas[:, t])
        similarity = iou[seen[:, None], found, t]
        if crowds:
            keep = in_crowd[found, t] <= 0.5
            keep[_match(np.where(similarity >= THRESHOLD - _EPS, similarity, 0.0))[1]] = True
            found, similarity = found[keep], similarity[:, keep]
        frames.append(Frame(seen, found, similarity))
    left = np.unique(np.concatenate([frame.tracks for frame in frames]))
    for frame in frames:  # tracks that lie in a crowd throughout are gone
        frame.tracks = np.searchsorted(left, frame.tracks)
    return frames, len(objects), len(left)


def _match(scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The assignment of the highest sum, pairs of score 0 left out."""
    rows, columns = linear_sum_assignment(-scores)
    good = scores[rows, columns] > _EPS
    return rows[good], columns[good]


def sequence_counts(frames: Sequence[Frame], num_objects: int, num_tracks: int) -> NDArray[np.float64]:
    """Counts (NUM_COUNTS,) of one class in one video. Each of the objects and tracks is seen in a frame at least."""
    if not num_objects or not num_tracks:  # nothing to match, which is the usual case of a class in a video
        lacking, false = sum(len(f.objects) for f in frames), sum(len(f.tracks) for f in frames)
        counts = np.zeros(NUM_COUNTS)
        counts[len(ALPHAS) : 2 * len(ALPHAS)], counts[2 * len(ALPHAS) : 3 * len(ALPHAS)] = lacking, false
        single = {"IDFN": lacking, "IDFP": false, "CLR_FN": lacking, "CLR_FP": false, "ML": num_objects}
        for name, value in single.items():
            counts[_HOTA + COUNT_NAMES.index(name)] = value
        return counts
    hota = _hota_counts(frames, num_objects, num_tracks)
    identity = _identity_counts(frames, num_objects, num_tracks)
    return np.concatenate([hota.ravel(), identity, _clear_counts(frames, num_objects)])


def _presence(frames: Sequence[Frame], num_objects: int, num_tracks: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """In how many frames each object (G, 1) and each track (1, D) is seen."""
    objects, tracks = np.zeros((num_objects, 1)), np.zeros((1, num_tracks))
    for frame in frames:
        objects[frame.objects] += 1
        tracks[:, frame.tracks] += 1
    return objects, tracks


def _hota_counts(frames: Sequence[Frame], num_objects: int, num_tracks: int) -> NDArray[np.float64]:
    """(7, 19) counts; paper, section 5: matching by the global alignment score, then A(c) of every match."""
    object_frames, track_frames = _presence(frames, num_objects, num_tracks)
    counts = np.zeros((7, len(ALPHAS)))
    potential = np.zeros((num_objects, num_tracks))
    for frame in frames:
        iou = frame.similarity
        union = iou.sum(0)[None] + iou.sum(1)[:, None] - iou
        share = np.divide(iou, union, out=np.zeros_like(iou), where=union > _EPS)
        potential[frame.objects[:, None], frame.tracks] += share
    alignment = potential / (object_frames + track_frames - potential)
    matches = np.zeros((len(ALPHAS), num_objects, num_tracks))
    for frame in frames:
        score = alignment[frame.objects[:, None], frame.tracks] * frame.similarity
        rows, columns = linear_sum_assignment(-score)
        iou = frame.similarity[rows, columns]
        hit = iou >= ALPHAS[:, None] - _EPS  # (A, matches)
        matches[:, frame.objects[rows], frame.tracks[columns]] += hit
        found = hit.sum(1)
        counts[:3] += np.stack([found, len(frame.objects) - found, len(frame.tracks) - found])
        counts[6] += (hit * iou).sum(1)
    for row, frames_of_pair in enumerate(
        (object_frames + track_frames - matches, object_frames, track_frames), start=3
    ):
        counts[row] = (matches * matches / np.maximum(1, frames_of_pair)).sum((1, 2))
    return counts


def _identity_counts(frames: Sequence[Frame], num_objects: int, num_tracks: int) -> NDArray[np.float64]:
    """IDTP, IDFN, IDFP: one track per object for the whole video, so that the fewest detections are wrong."""
    common = np.zeros((num_objects, num_tracks))
    for frame in frames:
        common[frame.objects[:, None], frame.tracks] += frame.similarity >= THRESHOLD
    # to pair fewer is never better: a pair without common frames costs what leaving both unpaired costs
    true = common[linear_sum_assignment(-common)].sum()
    detections = sum(len(frame.tracks) for frame in frames)
    return np.array([true, sum(len(frame.objects) for frame in frames) - true, detections - true])


def _clear_counts(frames: Sequence[Frame], num_objects: int) -> NDArray[np.float64]:
    """CLR_TP, CLR_FN, CLR_FP, IDSW, Frag, MT, PT, ML and the sum of IoU.

    Matching frame by frame, keeping the pairs of the frame before where they still overlap. A switch is counted against
    the last track an object ever had. As in TrackEval, a frame without any object or without any detection does not end
    a track (its objects still count as missed).
    """
    last = np.full(num_objects, -1)  # track of each object when it was matched last
    before = np.full(num_objects, -1)  # its track in the frame before
    seen, matched, starts = np.zeros((3, num_objects))
    hits = misses = false = switches = 0
    quality = 0.0
    for frame in frames:
        seen[frame.objects] += 1
        misses += len(frame.objects)
        false += len(frame.tracks)
        if not len(frame.objects) or not len(frame.tracks):
            continue
        score = 1000.0 * (frame.tracks == before[frame.objects][:, None]) + frame.similarity
        rows, columns = _match(np.where(frame.similarity < THRESHOLD - _EPS, 0.0, score))
        objects, tracks = frame.objects[rows], frame.tracks[columns]
        switches += int(((last[objects] >= 0) & (last[objects] != tracks)).sum())
        starts[objects] += before[objects] < 0
        last[objects] = tracks
        before[:] = -1
        before[objects] = tracks
        matched[objects] += 1
        hits += len(rows)
        quality += float(frame.similarity[rows, columns].sum())
    ratio = matched / np.maximum(1, seen)
    mostly, partly = (ratio > 0.8).sum(), ((ratio >= 0.2) & (ratio <= 0.8)).sum()
    fragments = np.maximum(starts - 1, 0).sum()
    counts = [hits, misses - hits, false - hits, switches, fragments, mostly, partly, num_objects - mostly - partly]
    return np.array([*counts, quality])


def summarize(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Metrics of summed counts (..., NUM_COUNTS): name -> (...,). Nothing to measure gives 0, LocA then gives 1."""
    hota = counts[..., :_HOTA].reshape(*counts.shape[:-1], 7, len(ALPHAS))
    tp, fn, fp, association, recall, precision, quality = (hota[..., row, :] for row in range(7))
    matches = np.maximum(1, tp)
    detection = tp / np.maximum(1, tp + fn + fp)
    per_alpha = {
        "HOTA": np.sqrt(detection * association / matches),
        "DetA": detection,
        "AssA": association / matches,
        "DetRe": tp / np.maximum(1, tp + fn),
        "DetPr": tp / np.maximum(1, tp + fp),
        "AssRe": recall / matches,
        "AssPr": precision / matches,
        "LocA": np.maximum(1e-10, quality) / np.maximum(1e-10, tp),
    }
    single = {name: counts[..., _HOTA + i] for i, name in enumerate(COUNT_NAMES)}
    id_tp, id_fn, id_fp = (single[name] for name in ("IDTP", "IDFN", "IDFP"))
    clear_tp, clear_fn, clear_fp = (single[name] for name in ("CLR_TP", "CLR_FN", "CLR_FP"))
    return {
        **{name: values.mean(-1) for name, values in per_alpha.items()},
        "IDF1": id_tp / np.maximum(1, id_tp + 0.5 * id_fp + 0.5 * id_fn),
        "IDR": id_tp / np.maximum(1, id_tp + id_fn),
        "IDP": id_tp / np.maximum(1, id_tp + id_fp),
        "MOTA": (clear_tp - clear_fp - single["IDSW"]) / np.maximum(1, clear_tp + clear_fn),
        "MOTP": counts[..., -1] / np.maximum(1, clear_tp),
        **single,
    }


def has_objects(counts: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(...,) from counts (..., NUM_COUNTS): there is a mask to be found."""
    present: NDArray[np.bool_] = counts[..., 0] + counts[..., len(ALPHAS)] > 0
    return present


def class_average(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Metrics of (..., K, NUM_COUNTS): name -> (...,), the mean over the classes; of what is counted, the sum."""
    values = summarize(counts)
    return {name: each.sum(-1) if name in COUNT_NAMES else each.mean(-1) for name, each in values.items()}


def _floats(values: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
