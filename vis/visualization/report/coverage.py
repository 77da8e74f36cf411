"""Which predicted track covers which object, in every frame and over the whole video.

Frame by frame the assignment is that of CLEAR MOT (Bernardin and Stiefelhagen, 2008, section 2.2): an object keeps the
track that covered it as long as the two still overlap, the rest is assigned anew. Over the whole video tracks are
compared with objects as the AP does, by spatio-temporal IoU (Yang et al., "Video Instance Segmentation", 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

COVERS = 0.5
"""The IoU from which on a mask counts as that of an object."""

UNCOVERED, ABSENT = -1, -2


@dataclass(frozen=True)
class ReportTrack:
    """One object or one predicted track.

    Attributes:
        number: the number shown.
        name: name of the class.
        codes: T compressed COCO codes (counts in bytes), already checked; None where there is no mask.
        areas: (T,) pixels of each mask.
        score: confidence; None for ground truth.
        crowd: a crowd of the ground truth: no object, but what lies on it is no mistake.
    """

    number: int
    name: str
    codes: Sequence[Mapping[str, Any] | None]
    areas: NDArray[np.int64]
    score: float | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Coverage:
    """How P predicted tracks fit G objects over T frames.

    Attributes:
        covering: (G, T) the track whose mask is the object's in a frame (IoU >= 0.5, whatever its class), ``UNCOVERED``
            where there is none, ``ABSENT`` where the object is not in the frame.
        stray: (P, T) the track has a mask in the frame that covers no object and lies on no crowd.
        iou: (P, G) spatio-temporal IoU.
        match: (G,) the track of the object's class that is assigned to it over the whole video, -1 for none.
        counted: (P,) the track counts: it does not lie on a crowd.
        frame_quality: (T,) the quality of each frame alone, NaN where it shows nothing.
        quality: of the video, 0..1: the IoUs of the matched pairs, summed, over the mean of the number of objects and
            the number of tracks. 1 only if every object is matched exactly and nothing else is there; NaN if there is
            neither an object nor a track.
    """

    covering: NDArray[np.int64]
    stray: NDArray[np.bool_]
    iou: NDArray[np.float64]
    match: NDArray[np.int64]
    counted: NDArray[np.bool_]
    frame_quality: NDArray[np.float64]
    quality: float

    @property
    def found(self) -> NDArray[np.bool_]:
        """(G,) objects whose matched track has an IoU of at least 0.5."""
        return (self.match >= 0) & (self.match_iou() >= COVERS)

    @property
    def false(self) -> NDArray[np.bool_]:
        """(P,) tracks that count and are not the track of a found object."""
        used = np.zeros(len(self.counted), bool)
        used[self.match[self.found]] = True
        return self.counted & ~used

    def match_iou(self) -> NDArray[np.float64]:
        """(G,) IoU of each object with its matched track; 0 without one."""
        values = np.zeros(len(self.match))
        matched = np.flatnonzero(self.match >= 0)
        values[matched] = self.iou[self.match[matched], matched]
        return values

    def switches(self) -> NDArray[np.int64]:
        """(G,) how often the covering track of an object is another one than the last that covered it."""
        counts = np.zeros(len(self.covering), np.int64)
        for index, row in enumerate(self.covering):
            seen = row[row >= 0]
            counts[index] = int((seen[1:] != seen[:-1]).sum())
        return counts


def cover(truth: Sequence[ReportTrack], tracks: Sequence[ReportTrack], shared: NDArray[np.int64]) -> Coverage:
    """Compare the predicted tracks of a video with its ground truth.

    Args:
        truth: N objects and crowds.
        tracks: P predicted tracks.
        shared: (P, N, T) pixels that they have in common in each frame.
    """
    crowds = np.array([item.crowd for item in truth], bool)
    objects = [item for item in truth if not item.crowd]
    length = shared.shape[2]
    sizes, areas = _areas(objects, length), _areas(tracks, length)  # (G, T), (P, T)
    crowded = np.zeros((len(tracks), length))
    if crowds.any():
        crowded = shared[:, crowds].max(1) / np.maximum(1, areas)
    shared = shared[:, ~crowds]
    iou = _ratio(shared, areas[:, None] + sizes[None] - shared)  # (P, G, T)
    covering = np.where(sizes > 0, UNCOVERED, ABSENT)
    stray = (areas > 0) & (crowded < COVERS)
    frame_quality = np.full(length, np.nan)
    last = np.full(len(objects), UNCOVERED)
    for frame in range(length):
        pairs = _assign(iou[:, :, frame], last)
        for p, g in pairs:
            covering[g, frame] = last[g] = p
            stray[p, frame] = False
        number = len(pairs) + int(stray[:, frame].sum()) + int((sizes[:, frame] > 0).sum())
        if number:
            frame_quality[frame] = 2 * sum(iou[p, g, frame] for p, g in pairs) / number
    common = shared.sum(2)
    tube = _ratio(common, areas.sum(1)[:, None] + sizes.sum(1)[None] - common)
    match = _match(tube, tracks, objects)
    counted = (crowded * areas).sum(1) < COVERS * np.maximum(areas.sum(1), 1)
    counted[match[match >= 0]] = True
    number = int(counted.sum()) + len(objects)
    total = sum(tube[match[g], g] for g in np.flatnonzero(match >= 0))
    quality = float(2 * total / number) if number else float("nan")
    return Coverage(covering, stray, tube, match, counted, frame_quality, quality)


def colour_numbers(objects: Sequence[ReportTrack], tracks: Sequence[ReportTrack], covered: Coverage) -> list[int]:
    """The number that gives each track its colour: a track wears that of the object that it covers in most frames, if
    no other covers it in more; the rest get numbers of their own behind those of the objects.

    So what is right has one colour beside the ground truth and in every run, and a switch shows as another colour.
    """
    frames = np.array(
        [[int((row == p).sum()) for row in covered.covering] for p in range(len(tracks))], np.int64
    ).reshape(len(tracks), len(objects))
    numbers = [0] * len(tracks)
    taken: set[int] = set()
    for flat in np.argsort(-frames, axis=None, kind="stable"):
        p, g = divmod(int(flat), len(objects))
        if frames[p, g] and not numbers[p] and g not in taken:
            numbers[p] = objects[g].number
            taken.add(g)
    free = max((item.number for item in objects), default=0)
    for p in range(len(tracks)):
        if not numbers[p]:
            free += 1
            numbers[p] = free
    return numbers


def segments(row: NDArray[np.int64], skip: int) -> list[tuple[int, int, int]]:
    """Runs of equal values, ``(first frame, frames, value)``; those of the value ``skip`` are left out."""
    starts = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
    ends = np.append(starts[1:], len(row))
    return [(int(a), int(b - a), int(row[a])) for a, b in zip(starts, ends, strict=True) if len(row) and row[a] != skip]


def _areas(tracks: Sequence[ReportTrack], length: int) -> NDArray[np.int64]:
    return np.array([track.areas for track in tracks], np.int64).reshape(len(tracks), length)


def _ratio(shared: NDArray[np.int64], union: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)


def _assign(iou: NDArray[np.float64], last: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs (track, object) of one frame, from their IoU (P, G) and the track that covered each object last."""
    kept: dict[int, int] = {}
    for g in np.flatnonzero(last >= 0).tolist():
        p = int(last[g])
        # two objects may claim one track, after it went from one to the other: the better one keeps it
        if iou[p, g] >= COVERS and (p not in kept or iou[p, g] > iou[p, kept[p]]):
            kept[p] = g
    gain = np.where(iou >= COVERS, iou, 0.0)
    gain[list(kept)] = 0
    gain[:, list(kept.values())] = 0
    more = zip(*linear_sum_assignment(gain, maximize=True), strict=True)
    return [*kept.items(), *((int(p), int(g)) for p, g in more if gain[p, g] > 0)]


def _match(
    tube: NDArray[np.float64], tracks: Sequence[ReportTrack], objects: Sequence[ReportTrack]
) -> NDArray[np.int64]:
    same = np.array([[track.name == item.name for item in objects] for track in tracks], bool).reshape(tube.shape)
    gain = np.where(same, tube, 0.0)
    match = np.full(len(objects), -1)
    for row, column in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
        if gain[row, column] > 0:
            match[column] = row
    return match
