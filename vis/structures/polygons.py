"""Polygons, and masks in whatever form a json gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from vis.structures.rle import decode, merge, size_of
from vis.structures.video_prediction import RLE

Polygons = Sequence[Sequence[float]]


def polygons_to_rle(polygons: Polygons, height: int, width: int) -> RLE:
    """The union of polygons, each a flat list x0, y0, x1, y1, ... in pixels.

    Raises:
        ValueError: a polygon is not one (see :func:`polygon_problem`).
    """
    for polygon in polygons:
        problem = polygon_problem(polygon, height, width)
        if problem:
            raise ValueError(problem)
    parts = coco_mask.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width)
    return merge(parts)


def polygon_problem(polygon: Any, height: int, width: int) -> str | None:
    """Why something is not a polygon in a frame of height x width pixels, or None where it is one."""
    if not isinstance(polygon, (list, tuple)):
        return f"a polygon is a list of numbers x0, y0, x1, y1, ..., not {type(polygon).__name__}"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"a polygon needs an even number of values, at least 6; this one has {len(polygon)}"
    try:
        low, high, total = min(polygon), max(polygon), sum(polygon)
    except TypeError:
        return "a polygon holds something that is not a number"
    reach = 2 * max(height, width)  # points somewhat outside are cut off; far outside they are a mistake, and costly
    if not (total == total and -reach <= low and high <= reach):
        return f"a polygon reaches from {low} to {high}, far outside its frame of {height}x{width} (height x width)"
    return None


def segmentation_to_mask(segmentation: Mapping[str, Any] | Polygons | None, height: int, width: int) -> np.ndarray:
    """The mask of one object in one frame, whatever way the json gives it.

    Args:
        segmentation: an RLE, a list of polygons, or None (absent: all zero).

    Returns:
        (height, width) bool.

    Raises:
        ValueError: the RLE is damaged or of another size, or a polygon is not one.
    """
    if not segmentation:
        return np.zeros((height, width), dtype=bool)
    if isinstance(segmentation, Mapping):
        if size_of(segmentation) != (height, width):
            found = "x".join(str(side) for side in segmentation["size"])
            raise ValueError(f"the RLE is of size {found}, the frame is {height}x{width} (height x width)")
        return decode(segmentation)
    return decode(polygons_to_rle(segmentation, height, width))
