"""What AP is lost to: the kinds of errors of a result file, each with the AP that mending it alone would bring.

After Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020), carried from boxes to
tracks: IoU is that of whole tracks (spatio-temporal), and a kind is added that only tracks have, the identity switch.

At an IoU threshold t every prediction is right, ignored (on a crowd) or wrong, as in AP; every wrong one is of exactly
one kind, the first of these that applies. "Object" is one of the same video, crowds left out; "its class" is the
predicted one.

1. ``duplicate``: IoU >= t with an object of its class, which a prediction of higher score has.
2. ``wrong_class``: IoU >= t with an object of another class.
3. ``identity_switch``: the masks would do, but they follow several objects. In every frame the prediction follows the
   object with the best mask IoU in that frame if that is above 0.1, else (nothing predicted there, or nothing hit) the
   one it followed before, at the beginning the one it follows first. The kind applies if two or more objects are
   followed, one of them of its class, and the IoU over the whole video with *the object followed in each frame* is
   >= t.
4. ``poor_mask``: 0.1 <= IoU < t with an object of its class (bad outlines, but also frames in which the object is
   lost).
5. ``class_and_mask``: 0.1 <= IoU < t with an object of another class.
6. ``background``: all others, IoU < 0.1 with every object.

``missed`` are objects that no prediction finds and that mending no prediction of kind 2, 3 or 4 would find.

Mending: a prediction of kind 2, 3 or 4 becomes right for an object that nothing has found (2: of IoU >= t, and it takes
that object's class; 3: of its class and followed; 4: of its class and IoU >= 0.1), the one of largest IoU that no other
of the kind and of higher score takes; where none is left it is removed. Kinds 1, 5 and 6 are removed. Missed objects
are taken out of the count of objects; a class of which none is left counts as AP 1. All else stays as it is. The loss
of a kind is AP mended minus AP. Losses do not add up to 1 - AP: several errors can stand in the way of one object.
``false_positive`` removes every wrong prediction, ``false_negative`` takes every object out that was not found: bounds
for what better scores and more recall could bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.ap_core import IOU_THRESHOLDS, by_score
from vis.evaluation.ap_curve import average_precision
from vis.evaluation.track_iou import frame_intersections, frame_iou, iou_of, track_areas
from vis.evaluation.ytvis_io import GroundTruth, Track, Tracks

PREDICTION_KINDS = ("duplicate", "wrong_class", "identity_switch", "poor_mask", "class_and_mask", "background")
"""Kinds of wrong predictions, in the order of precedence."""
KINDS = (*PREDICTION_KINDS, "missed")
BOUNDS = ("false_positive", "false_negative")
FOREGROUND = 0.1
"""IoU below which a prediction has nothing to do with an object."""

_DUPLICATE, _CLASS, _SWITCH, _MASK, _BOTH, _BACKGROUND = range(len(PREDICTION_KINDS))
_RIGHT, _IGNORED = -1, -2


@dataclass(frozen=True)
class ErrorBreakdown:
    """AP lost per kind of error; fractions.

    Attributes:
        ap50, ap: AP at IoU 0.5, and the mean over 0.50, 0.55 ... 0.95; -1 where the ground truth has only crowds.
        lost50, lost: kind (``KINDS`` and ``BOUNDS``) -> AP that mending it alone would bring, for ``ap50`` and ``ap``.
        count50: kind -> wrong predictions of it (``missed``, ``false_negative``: objects) at IoU 0.5.
    """

    ap50: float
    ap: float
    lost50: dict[str, float]
    lost: dict[str, float]
    count50: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For a json file."""
        return asdict(self)

    def table(self) -> str:
        """A text table in percent of AP."""
        lines = [f"{'AP lost to':<16} {'at 0.5':>8} {'mean':>8} {'number at 0.5':>14}"]
        for kind in (*KINDS, *BOUNDS):
            cells = f"{self.lost50[kind] * 100:8.3f} {self.lost[kind] * 100:8.3f} {self.count50[kind]:14d}"
            lines.append(f"{kind:<16} {cells}")
        return "\n".join([*lines, f"{'(AP)':<16} {self.ap50 * 100:8.3f} {self.ap * 100:8.3f}"])


@dataclass
class _Video:
    """D predictions by class and falling score, G objects; what no threshold changes.

    Attributes:
        scores, classes: (D,); classes are places in the list of categories.
        object_classes, crowd: (G,).
        iou: (D, G) over the whole video.
        followed: (D, G) the objects that the prediction follows in some frame.
        followed_iou: (D,) IoU with the followed object of each frame.
    """

    scores: NDArray[np.float64]
    classes: NDArray[np.int64]
    object_classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    iou: NDArray[np.float64]
    followed: NDArray[np.bool_]
    followed_iou: NDArray[np.float64]


@dataclass
class _Verdict:
    """All predictions (N,) and objects (M,) at one threshold.

    Attributes:
        kind: (N,) place in ``PREDICTION_KINDS``, or right or ignored.
        target: (N,) class of the object that a mended prediction finds; -1: it is removed.
        found: (M,) a prediction found the object.
        reachable: (M,) mending a prediction would find it.
    """

    kind: NDArray[np.int64]
    target: NDArray[np.int64]
    found: NDArray[np.bool_]
    reachable: NDArray[np.bool_]


def error_breakdown(gt: GroundTruth, tracks: Tracks) -> ErrorBreakdown:
    """The breakdown of loaded results; see the head of this file.

    Args:
        gt: as ``load_ground_truth`` gives it.
        tracks: as ``check_results`` gives it.
    """
    categories = list(gt.categories)
    videos = [_video(video, categories, gt.tracks, tracks) for video in sorted(gt.videos)]
    scores = np.concatenate([video.scores for video in videos])
    classes = np.concatenate([video.classes for video in videos])
    crowd = np.concatenate([video.crowd for video in videos])
    # crowds belong to no class: they are neither found nor missed
    object_classes = np.where(crowd, -1, np.concatenate([video.object_classes for video in videos]))
    ranking = _Ranking(scores, classes, object_classes, len(categories))
    base, lost = np.zeros(len(IOU_THRESHOLDS)), np.zeros((len(IOU_THRESHOLDS), len(KINDS) + len(BOUNDS)))
    counts: dict[str, int] = {}
    for t, threshold in enumerate(IOU_THRESHOLDS):
        verdict = _verdict(videos, float(threshold))
        base[t] = ranking.ap(verdict.kind == _RIGHT, verdict.kind != _IGNORED)
        lost[t] = [ranking.mended(verdict, kind) - base[t] for kind in (*KINDS, *BOUNDS)]
        if t == 0:
            counts = _counts(verdict, crowd)
    names = (*KINDS, *BOUNDS)
    if not (object_classes >= 0).any():
        return ErrorBreakdown(-1.0, -1.0, dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), counts)
    lost50, mean_lost = (dict(zip(names, row.tolist(), strict=True)) for row in (lost[0], lost.mean(0)))
    return ErrorBreakdown(float(base[0]), float(base.mean()), lost50, mean_lost, counts)


def _counts(verdict: _Verdict, crowd: NDArray[np.bool_]) -> dict[str, int]:
    lacking = ~verdict.found & ~crowd
    counts = {name: int((verdict.kind == k).sum()) for k, name in enumerate(PREDICTION_KINDS)}
    counts["missed"] = int((lacking & ~verdict.reachable).sum())
    return {**counts, "false_positive": int((verdict.kind >= 0).sum()), "false_negative": int(lacking.sum())}


def _video(video: int, categories: Sequence[int], objects_of: Tracks, tracks_of: Tracks) -> _Video:
    objects: list[Track] = []
    object_classes: list[int] = []
    for place, category in enumerate(categories):
        own = objects_of.get((video, category), [])
        objects += own
        object_classes += [place] * len(own)
    crowd = np.array([track.ignore for track in objects], bool)
    scores, classes = [np.zeros(0)], [np.zeros(0, np.int64)]
    parts = [(np.zeros((0, len(objects))), np.zeros((0, len(objects)), bool), np.zeros(0))]
    for place, category in enumerate(categories):  # one class at a time, which bounds the memory
        tracks = tracks_of.get((video, category), [])
        values = np.array([track.score for track in tracks], np.float64)
        order = by_score(values)
        scores.append(values[order])
        classes.append(np.full(len(order), place))
        if len(order):
            parts.append(_compare([tracks[i] for i in order], objects, crowd))
    iou, followed, followed_iou = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _Video(
        np.concatenate(scores),
        np.concatenate(classes),
        np.array(object_classes, np.int64),
        crowd,
        iou,
        followed,
        followed_iou,
    )


def _compare(
    tracks: Sequence[Track], objects: Sequence[Track], crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """``iou``, ``followed`` and ``followed_iou`` of the predictions of one class."""
    if not objects:
        return np.zeros((len(tracks), 0)), np.zeros((len(tracks), 0), bool), np.zeros(len(tracks))
    areas, sizes = track_areas(tracks), track_areas(objects)
    shared = frame_intersections(tracks, objects)  # (D, G, T)
    iou = iou_of(shared.sum(2), areas.sum(1), sizes.sum(1))
    quality = np.where(crowd[None, :, None], 0.0, frame_iou(shared, areas, sizes))
    best = quality.argmax(1)  # (D, T)
    hit = quality.max(1) > FOREGROUND
    frames = np.arange(hit.shape[1])
    before = np.maximum.accumulate(np.where(hit, frames, -1), axis=1)
    # where nothing was followed yet: the first frame that follows something; 0 where none does, which passes nowhere
    at = np.where(before >= 0, before, hit.argmax(1)[:, None])
    follows = np.take_along_axis(best, at, 1)  # (D, T)
    overlap = np.take_along_axis(shared, follows[:, None], 1)[:, 0].sum(1)
    total = areas.sum(1) + sizes[follows, frames].sum(1)
    followed = np.zeros(iou.shape, bool)
    rows, columns = np.nonzero(hit)
    followed[rows, best[rows, columns]] = True
    followed_iou = np.divide(overlap, total - overlap, out=np.zeros(len(tracks)), where=total > overlap)
    return iou, followed, followed_iou


def _verdict(videos: Sequence[_Video], threshold: float) -> _Verdict:
    parts = [_judge(video, threshold) for video in videos]
    return _Verdict(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _judge(
    video: _Video, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """The fields of a verdict, of one video."""
    own = video.classes[:, None] == video.object_classes[None]
    kind = np.full(len(video.scores), _BACKGROUND)
    found = np.zeros(len(video.crowd), bool)
    for d in np.flatnonzero((own & (video.iou >= threshold)).any(1)):
        # as in AP: the best object that is left, of equal ones the last, a crowd only where there is no other
        free = own[d] & (video.iou[d] >= threshold) & (video.crowd | ~found)
        wanted = free & ~video.crowd
        if wanted.any():
            found[len(found) - 1 - np.where(wanted, video.iou[d], -1.0)[::-1].argmax()] = True
            kind[d] = _RIGHT
        elif free.any():
            kind[d] = _IGNORED
    iou = np.where(video.crowd, -1.0, video.iou)
    mine, others = np.where(own, iou, -1.0), np.where(own, -1.0, iou)
    best_mine, best_other = mine.max(1, initial=-1.0), others.max(1, initial=-1.0)
    switches = (video.followed.sum(1) > 1) & (video.followed & own).any(1) & (video.followed_iou >= threshold)
    wrong = kind == _BACKGROUND
    rules = (
        best_mine >= threshold,
        best_other >= threshold,
        switches,
        best_mine >= FOREGROUND,
        best_other >= FOREGROUND,
    )
    kind[wrong] = np.select([rule[wrong] for rule in rules], range(len(rules)), _BACKGROUND)

    open_ = ~found & ~video.crowd
    target = np.full(len(kind), -1)
    reachable = np.zeros(len(found), bool)
    usable = {_CLASS: others >= threshold, _SWITCH: video.followed & own, _MASK: mine >= FOREGROUND}
    for which, candidates in usable.items():
        left = open_.copy()
        members = np.flatnonzero(kind == which)
        for d in members[np.argsort(-video.scores[members], kind="stable")]:
            fits = candidates[d] & left
            if fits.any():
                g = int(np.where(fits, iou[d], -1.0).argmax())
                target[d] = video.object_classes[g]
                left[g] = False
                reachable[g] = True
    return kind, target, found, reachable


class _Ranking:
    """The AP of all predictions, as they are or mended.

    Args:
        scores, classes: (N,) in the order of the videos, which decides between equal scores.
        object_classes: (M,), -1 for crowds.
        num_classes: K.
    """

    def __init__(
        self, scores: NDArray[Any], classes: NDArray[Any], object_classes: NDArray[Any], num_classes: int
    ) -> None:
        self.order = np.argsort(-scores, kind="stable")
        self.classes = classes
        self.object_classes = object_classes
        self.num_objects = np.bincount(object_classes[object_classes >= 0], minlength=num_classes)

    def mended(self, verdict: _Verdict, kind: str) -> float:
        """AP with one kind of error (or bound) mended."""
        right, counted = verdict.kind == _RIGHT, verdict.kind != _IGNORED
        if kind in ("missed", "false_negative"):
            gone = ~verdict.found & ~(verdict.reachable & (kind == "missed")) & (self.object_classes >= 0)
            fewer = np.bincount(self.object_classes[gone], minlength=len(self.num_objects))
            return self.ap(right, counted, num_objects=self.num_objects - fewer)
        if kind == "false_positive":
            return self.ap(right, right)
        chosen = verdict.kind == PREDICTION_KINDS.index(kind)
        moved = chosen & (verdict.target >= 0)
        classes = np.where(moved, verdict.target, self.classes)
        return self.ap(right | moved, counted & (moved | ~chosen), classes=classes)

    def ap(
        self,
        right: NDArray[np.bool_],
        counted: NDArray[np.bool_],
        *,
        classes: NDArray[np.int64] | None = None,
        num_objects: NDArray[np.int64] | None = None,
    ) -> float:
        """Mean AP over the classes that have objects; 0 where none has.

        Args:
            right: (N,) predictions that find an object.
            counted: (N,) those that count, the right ones among them.
            classes, num_objects: (N,) and (K,) where they are other than they were.
        """
        ranked = self.order[counted[self.order]]
        class_of = (self.classes if classes is None else classes)[ranked]
        left = self.num_objects if num_objects is None else num_objects
        values = []
        for category in np.flatnonzero(self.num_objects):
            if not left[category]:
                values.append(1.0)
                continue
            hit = right[ranked[class_of == category]]
            hits, places = np.cumsum(hit), np.flatnonzero(hit)
            at = hits[places].astype(np.float64)
            ap = average_precision(at[None], (places + 1 - at)[None], left[category : category + 1].astype(np.float64))
            values.append(float(ap[0]))
        return float(np.mean(values)) if values else 0.0
