"""Masks as outlines in a few dozen characters, and what the browser needs to draw them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

GRID = 512
"""Units of the longer side of a picture, in which outlines are given."""

_TOLERANCE = 0.9  # units that an outline may be off: half a pixel of a picture 256 wide
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def grid_of(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a picture in units."""
    scale = GRID / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def outline(code: Mapping[str, Any], grid: tuple[int, int]) -> str:
    """The outline of a mask: every closed line, holes too (fill by the even-odd rule).

    Args:
        code: a compressed COCO code that was checked.
        grid: (width, height) in units, from ``grid_of``.

    Returns:
        Numbers in groups of five bits, low bits first, one character of ``A-Za-z0-9-_`` per group, bit 32 saying that
        the number goes on; a number 2n is n, 2n + 1 is -n - 1. Every line is: how many points, then of each point the
        difference from the one before (of the first from 0), x and y.
    """
    import cv2

    mask = coco_mask.decode(code) * np.uint8(255)
    larger = grid[0] > mask.shape[1]
    scaled = cv2.resize(mask, grid, interpolation=cv2.INTER_LINEAR if larger else cv2.INTER_AREA)
    inside = (scaled >= 128).astype(np.uint8)
    if not inside.any():  # an object of less than a unit
        inside = (scaled > 0).astype(np.uint8)
    lines, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    numbers: list[int] = []
    for line in lines:
        points = cv2.approxPolyDP(line, _TOLERANCE, True).reshape(-1, 2)
        if len(points) < 3:
            points = line.reshape(-1, 2)
        numbers.append(len(points))
        numbers += np.diff(points, axis=0, prepend=[[0, 0]]).ravel().tolist()
    return "".join(_write(number) for number in numbers)


def _write(number: int) -> str:
    value = 2 * number if number >= 0 else -2 * number - 1
    text = ""
    while value > 31:
        text += _ALPHABET[value & 31 | 32]
        value >>= 5
    return text + _ALPHABET[value]
