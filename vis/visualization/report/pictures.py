"""Thumbnails that fit a budget: how many frames, how large, how good."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

ReadFrame = Callable[[int], np.ndarray]
"""Frame index -> (H, W, 3) uint8 RGB; raises ValueError or OSError where it cannot be read."""

# (width of the picture, JPEG quality, part of the wanted frames that is enough): the first that fits is taken.
_LADDER = ((320, 60, 1.0), (320, 45, 1.0), (256, 45, 0.6), (256, 35, 0.4), (192, 35, 0.0))
_MARGIN = 1.1  # the frames that were tried may be simpler than the others


@dataclass(frozen=True)
class Plan:
    """How the frames of a video are shown: at most ``count`` of them, pictures ``width`` wide of a JPEG ``quality``."""

    count: int
    width: int
    quality: int


def plan(frames: Sequence[int], read: ReadFrame | None, drawn: Callable[[int], int], budget: int) -> Plan:
    """What fits the budget, judged by three of the frames.

    Args:
        frames: the frames that one would like to show.
        read: where pictures come from; None if there are none.
        drawn: bytes that the outlines of a frame take.
        budget: bytes for all of them.
    """
    probes = sorted({frames[0], frames[len(frames) // 2], frames[-1]})
    pictures = [picture for frame in probes if (picture := try_read(read, frame)[0]) is not None]
    outlines = sum(drawn(frame) for frame in probes) / len(probes)
    chosen = Plan(0, *_LADDER[-1][:2])
    for width, quality, enough in _LADDER:
        sizes = [len(encode(picture, width, quality)) for picture in pictures]
        each = _MARGIN * (outlines + (sum(sizes) / len(sizes) if sizes else 0)) + 16
        fit = min(len(frames), int(budget / each))
        chosen = Plan(fit, width, quality)
        if fit >= enough * len(frames):
            break
    return chosen


def spread(length: int, count: int, wanted: Sequence[int] = ()) -> list[int]:
    """At most ``count`` frames of ``length``, evenly, with the first ones of ``wanted`` among them (up to a half)."""
    count = min(count, length)
    if count <= 0:
        return []
    kept = list(dict.fromkeys(wanted))[: max(1, count // 2)]
    even = np.linspace(0, length - 1, count).round().astype(int).tolist()
    # each of the wanted frames stands in for the even one nearest to it
    for frame in kept:
        free = [place for place in even if place not in kept]
        if frame not in even and free:
            even[even.index(min(free, key=lambda place: abs(place - frame)))] = frame
    return sorted(set(even))


def try_read(read: ReadFrame | None, frame: int) -> tuple[np.ndarray | None, str]:
    """A frame, or None and the reason."""
    if read is None:
        return None, ""
    try:
        return read(frame), ""
    except (ValueError, OSError) as error:
        return None, str(error)


def encode(picture: np.ndarray, width: int, quality: int) -> str:
    """A JPEG of at most this width in base64; a smaller picture keeps its size."""
    image = Image.fromarray(picture)
    if image.width > width:
        height = max(1, round(image.height * width / image.width))
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
