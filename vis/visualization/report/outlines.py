"""Masks as outlines in a few dozen characters, and what the browser needs to draw them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

GRID = 512
"""Units of the longer side of a picture, in which outlines are given."""

_TOLERANCE = 0.9  # units that an outline may be off: half a pixel of a picture 256 wide
_SPECK = 3.0  # square units: parts and holes below are left out, the largest part never
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

Points = NDArray[np.float64]  # (points, 2) x, y


def grid_of(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a picture in units."""
    scale = GRID / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def outline(code: Mapping[str, Any], grid: tuple[int, int]) -> str:
    """The outline of a mask: every closed line, holes too (fill by the even-odd rule), but for specks.

    Args:
        code: a compressed COCO code that was checked.
        grid: (width, height) in units, from ``grid_of``.

    Returns:
        Numbers in groups of five bits, low bits first, one character of ``A-Za-z0-9-_`` per group, bit 32 saying that
        the number goes on; a number 2n is n, 2n + 1 is -n - 1. Every line is: how many points, then of each point the
        difference from the one before (of the first from 0), x and y.
    """
    mask = coco_mask.decode(code)
    x, y, w, h = (int(side) for side in coco_mask.toBbox(code))
    lines = _lines_of_large(mask, (x, y, w, h), grid) if grid[0] <= mask.shape[1] else _lines_of_small(mask, grid)
    kept = [line for line in lines if _size(line) >= _SPECK] or lines[:1]
    numbers: list[int] = []
    for line in kept:
        points = np.clip(np.rint(line), 0, grid).astype(int)
        numbers.append(len(points))
        numbers += np.diff(points, axis=0, prepend=[[0, 0]]).ravel().tolist()
    return "".join(_write(number) for number in numbers)


def _lines_of_large(mask: NDArray[np.uint8], box: tuple[int, int, int, int], grid: tuple[int, int]) -> list[Points]:
    """Lines round the pixels of a mask, the longest first, brought to the grid: only the object is looked at."""
    import cv2

    x, y, w, h = box
    part = np.ascontiguousarray(mask[y : y + h, x : x + w])
    found, _ = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x, y))
    scale = np.array(grid) / mask.shape[::-1]
    return _simplified([(line.reshape(-1, 2) + 0.5) * scale for line in found])


def _lines_of_small(mask: NDArray[np.uint8], grid: tuple[int, int]) -> list[Points]:
    """The same of a mask smaller than the grid, which is enlarged before: a line through the middles of its pixels
    would leave out half a pixel all around, and be as jagged as they are."""
    import cv2

    enlarged = cv2.resize(mask * np.uint8(255), grid, interpolation=cv2.INTER_LINEAR)
    inside = (enlarged >= 128).astype(np.uint8)
    if not inside.any():
        inside = (enlarged > 0).astype(np.uint8)
    found, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return _simplified([line.reshape(-1, 2) + 0.5 for line in found])


def _simplified(lines: list[Points]) -> list[Points]:
    import cv2

    found = []
    for line in lines:
        points = cv2.approxPolyDP(line.astype(np.float32).reshape(-1, 1, 2), _TOLERANCE, True).reshape(-1, 2)
        if len(points) < 3:  # a pixel or a thread: as a box round it, so that it has an inside
            (x0, y0), (x1, y1) = line.min(0) - 0.5, line.max(0) + 0.5
            points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        found.append(points.astype(np.float64))
    return sorted(found, key=_size, reverse=True)


def _size(line: Points) -> float:
    """Area inside a line, in square units."""
    x, y = line.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _write(number: int) -> str:
    value = 2 * number if number >= 0 else -2 * number - 1
    text = ""
    while value > 31:
        text += _ALPHABET[value & 31 | 32]
        value >>= 5
    return text + _ALPHABET[value]
