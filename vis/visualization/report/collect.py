"""From the tracks of one video to what the page shows of it: plain lists and numbers, ready for json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vis.visualization.report.coverage import ABSENT, COVERS, Coverage, ReportTrack, colour_numbers, segments
from vis.visualization.report.outlines import grid_of, outline
from vis.visualization.report.pictures import Plan, ReadFrame, encode, plan, spread, try_read

NEAR = 0.1
"""The spatio-temporal IoU below which a track has nothing to do with an object."""


@dataclass(frozen=True)
class ReportVideo:
    """One video of the report.

    Attributes:
        number: the id in the data set.
        name: what it is called.
        height, width: of its frames, in pixels.
        length: frames.
        truth: objects and crowds of the ground truth.
        runs: of every run the tracks that are shown.
        coverage: of every run, how its tracks fit the truth.
        read: where its pictures come from; None if there are none.
    """

    number: int
    name: str
    height: int
    width: int
    length: int
    truth: Sequence[ReportTrack]
    runs: Sequence[Sequence[ReportTrack]]
    coverage: Sequence[Coverage]
    read: ReadFrame | None = None


def summary_row(video: ReportVideo) -> dict[str, Any]:
    """The line of a video in the list."""
    return {
        "id": video.number,
        "name": video.name,
        "frames": video.length,
        "objects": sum(not item.crowd for item in video.truth),
        "runs": [
            {
                "quality": finite(found.quality),
                "missed": int((~found.found).sum()),
                "false": int(found.false.sum()),
                "switches": int(found.switches().sum()),
            }
            for found in video.coverage
        ],
    }


def video_block(video: ReportVideo, *, frames: int, budget: int) -> bytes:
    """Everything that the page shows of a video, as json.

    Args:
        frames: how many frames to show, if they fit.
        budget: bytes that it may take; fewer, smaller and plainer pictures are chosen until they fit.
    """
    content = {
        "id": video.number,
        "size": list(grid_of(video.height, video.width)),
        "length": video.length,
        "truth": _truth(video),
        "runs": [_run(video, index) for index in range(len(video.runs))],
    }
    worst = _worth_seeing(video)
    room = budget - len(dump(content)) - 300
    wanted = spread(video.length, frames, worst)
    grid = grid_of(video.height, video.width)
    chosen = plan(wanted, video.read, lambda frame: len(dump(_outlines(video, frame, grid))), room)
    if chosen.count < len(wanted):
        wanted = spread(video.length, chosen.count, worst)
    content.update(_frames(video, wanted, chosen, room))
    return dump(content)


def dump(content: Any) -> bytes:
    """Compact json that may stand inside a script element of a page: no ``<`` (a text could end the element or begin a
    comment), ``>`` or ``&`` in it."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text.encode("ascii")


def finite(value: float) -> float | None:
    """Four digits, None for what is not a number."""
    return round(value, 4) if math.isfinite(value) else None


def _frames(video: ReportVideo, wanted: Sequence[int], chosen: Plan, room: int) -> dict[str, Any]:
    """Pictures and outlines of the frames, the outlines by frame, part (truth, run 0, ...) and track."""
    grid = grid_of(video.height, video.width)
    shown: list[int] = []
    pictures: list[str | None] = []
    outlines: list[list[list[Any]]] = []
    reasons: list[str] = []
    for frame in wanted:
        drawn = _outlines(video, frame, grid)
        picture, reason = try_read(video.read, frame)
        coded = None if picture is None else encode(picture, chosen.width, chosen.quality)
        room -= len(coded or "") + len(dump(drawn)) + 16
        if room < 0 and shown:
            break  # the rest is more than the frames that were tried
        if room < 0:
            coded = None
        if reason:
            reasons.append(reason)
        shown.append(frame)
        pictures.append(coded)
        outlines.append(drawn)
    note = ""
    if reasons:
        note = f"{len(reasons)} of {len(shown)} pictures cannot be shown; the first: {reasons[0]}"[:600]
    return {"frames": shown, "pictures": pictures, "outlines": outlines, "note": note}


def _outlines(video: ReportVideo, frame: int, grid: tuple[int, int]) -> list[list[Any]]:
    """Per part a flat list: track, outline, track, outline, ..."""
    parts: list[list[Any]] = []
    for tracks in (video.truth, *video.runs):
        part: list[Any] = []
        for index, track in enumerate(tracks):
            code = track.codes[frame]
            if code is not None and track.areas[frame]:
                part += [index, outline(code, grid)]
        parts.append(part)
    return parts


def _worth_seeing(video: ReportVideo) -> list[int]:
    """The worst frame of each run, then the frames in which an object changes its track, first of those two."""
    worst, switched = [], []
    for found in video.coverage:
        if np.isfinite(found.frame_quality).any():
            worst.append(int(np.nanargmin(found.frame_quality)))
        for row in found.covering:
            seen = np.flatnonzero(row >= 0)
            switched += seen[1:][row[seen[1:]] != row[seen[:-1]]].tolist()
    return worst + sorted(switched)


def _truth(video: ReportVideo) -> list[dict[str, Any]]:
    items = []
    for track in video.truth:
        present = np.where(track.areas > 0, 0, ABSENT)
        items.append(
            {
                "number": track.number,
                "name": track.name,
                "crowd": track.crowd,
                "frames": int((track.areas > 0).sum()),
                "area": _mean_area(track),
                "present": [[start, count] for start, count, _ in segments(present, ABSENT)],
            }
        )
    return items


def _run(video: ReportVideo, index: int) -> dict[str, Any]:
    """One run of one video: its tracks, and a line of the timeline per object."""
    tracks, found = video.runs[index], video.coverage[index]
    objects = [item for item in video.truth if not item.crowd]
    colours = colour_numbers(objects, tracks, found)
    switches, match_iou = found.switches(), found.match_iou()
    lines = [
        {
            "covering": [list(part) for part in segments(row, ABSENT)],
            "match": int(found.match[g]),
            "iou": finite(float(match_iou[g])),
            "covered": int((row >= 0).sum()),
            "switches": int(switches[g]),
        }
        for g, row in enumerate(found.covering)
    ]
    return {
        "quality": finite(found.quality),
        "tracks": [
            {
                "number": track.number,
                "name": track.name,
                "score": finite(track.score or 0.0),
                "colour": colours[p],
                "frames": int((track.areas > 0).sum()),
                "area": _mean_area(track),
                **_verdict(p, track, objects, found),
                "stray": [[start, count] for start, count, _ in segments(np.where(found.stray[p], 0, ABSENT), ABSENT)],
            }
            for p, track in enumerate(tracks)
        ],
        "objects": lines,
    }


def _verdict(p: int, track: ReportTrack, objects: Sequence[ReportTrack], found: Coverage) -> dict[str, Any]:
    """What became of a track: the object it is nearest to and a word for it."""
    best = int(found.iou[p].argmax()) if objects else -1
    iou = float(found.iou[p, best]) if objects else 0.0
    if not found.counted[p]:
        word = "on a crowd"
    elif not found.false[p]:
        best = next(g for g in np.flatnonzero(found.found).tolist() if found.match[g] == p)
        word, iou = "found", float(found.iou[p, best])
    elif iou >= COVERS:
        word = "duplicate" if track.name == objects[best].name else "wrong class"
    else:
        word = "partial" if iou >= NEAR else "background"
    return {"object": best if iou >= NEAR else -1, "iou": finite(iou), "verdict": word}


def _mean_area(track: ReportTrack) -> int:
    seen = track.areas[track.areas > 0]
    return round(float(seen.mean())) if len(seen) else 0
