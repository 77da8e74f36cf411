"""Run-length encoded masks on pycocotools, with every code checked before it is handed to it.

An RLE in this project is the compressed COCO form with text counts, ``{"size": [h, w], "counts": str}``: it goes into
json as it is. pycocotools does not check what it decodes: run lengths that do not fit the size write past the end of
its buffer and crash the process later. Everything here that reads an RLE therefore checks the run lengths first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

RLE = dict[str, Any]
Polygons = Sequence[Sequence[float]]

# pycocotools counts pixels in 32 bits
MAX_PIXELS = 2**31 - 1


def encode(mask: np.ndarray) -> RLE:
    """Encodes one mask.

    Args:
        mask: (H, W), bool or any integer type; whatever is not zero belongs to the object.

    Returns:
        RLE with text counts.

    Raises:
        ValueError: the mask has not exactly two dimensions.
    """
    if mask.ndim != 2:
        raise ValueError(
            f"a mask to encode must be (H, W), this one has shape {tuple(mask.shape)}; encode them one by one"
        )
    return _text_counts(coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8)))


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Decodes one RLE, compressed or not.

    Returns:
        (H, W) bool, columns contiguous.

    Raises:
        ValueError: the counts do not describe a mask of the given size.
    """
    runs = run_lengths(rle)
    height, width = _size(rle)
    inside = np.arange(runs.size) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def run_lengths(rle: Mapping[str, Any]) -> np.ndarray:
    """The run lengths of an RLE of any form: pixels outside, inside, outside, ... in column order.

    Returns:
        (runs,) int64.

    Raises:
        ValueError: the size or the counts are not valid, or the run lengths do not add up to height x width.
    """
    height, width = _size(rle)
    counts = rle.get("counts")
    if isinstance(counts, (list, tuple)):
        if not all(type(count) is int and count <= MAX_PIXELS for count in counts):
            raise ValueError("the run lengths of an uncompressed RLE must be whole numbers of 31 bits")
        runs = np.array(counts, dtype=np.int64)
    elif isinstance(counts, (str, bytes)):
        runs = _parse_counts(counts.encode("utf-8") if isinstance(counts, str) else counts)
    else:
        raise ValueError(f"the counts of an RLE are a text or a list of run lengths, not {type(counts).__name__}")
    if (runs < 0).any():
        raise ValueError("the RLE holds a negative run length: its counts are damaged")
    total = int(runs.sum())
    if total != height * width:
        raise ValueError(f"the run lengths add up to {total}, a mask of {height}x{width} has {height * width} pixels")
    return runs


def compress(rle: Mapping[str, Any]) -> RLE:
    """Turns an RLE of any form (run lengths in a list, counts in bytes or text) into one with text counts.

    Raises:
        ValueError: as :func:`run_lengths`.
    """
    return _text_counts(_checked(rle))


def merge(rles: Sequence[Mapping[str, Any]]) -> RLE:
    """The union of masks of one size."""
    return _text_counts(coco_mask.merge([_checked(rle) for rle in rles]))


def area(rle: Mapping[str, Any]) -> int:
    """Pixels of the object, without decoding.

    Raises:
        ValueError: as :func:`run_lengths`.
    """
    return int(run_lengths(rle)[1::2].sum())


def to_box(rle: Mapping[str, Any]) -> list[float]:
    """The tight box [x, y, w, h] of the object, in pixels, without decoding; zeros for an empty mask."""
    return [float(value) for value in coco_mask.toBbox(_checked(rle))]


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
        if _size(segmentation) != (height, width):
            found = "x".join(str(side) for side in segmentation["size"])
            raise ValueError(f"the RLE is of size {found}, the frame is {height}x{width} (height x width)")
        return decode(segmentation)
    return decode(polygons_to_rle(segmentation, height, width))


def _size(rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(isinstance(side, (int, np.integer)) for side in size)
    ):
        raise ValueError(f"the size of an RLE is [height, width] in whole pixels, not {size!r}")
    height, width = int(size[0]), int(size[1])
    if height <= 0 or width <= 0 or height * width > MAX_PIXELS:
        raise ValueError(f"an RLE of size {height}x{width} cannot be; its size is [height, width] in pixels")
    return height, width


def _parse_counts(text: bytes) -> np.ndarray:
    """Run lengths of COCO's compressed counts: 5 bits a character, low bits first, from the third on as differences."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return codes
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        raise ValueError("the counts of the RLE are damaged: characters that cannot occur, or cut off at the end")
    ends = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more than any run length that fits 32 bits needs
        raise ValueError("the counts of the RLE are damaged: a run length of more than 32 bits")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[ends] & 0x10) != 0
    values = np.where(negative, values - (np.int64(1) << (5 * lengths)), values)
    # value i is the difference to run i - 2, for i > 2: sums along the even and along the odd places
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def _checked(rle: Mapping[str, Any]) -> RLE:
    """A compressed RLE that pycocotools can be given."""
    runs = run_lengths(rle)
    height, width = _size(rle)
    if isinstance(rle["counts"], (list, tuple)):
        return coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"]}


def _text_counts(rle: Mapping[str, Any]) -> RLE:
    height, width = rle["size"]
    counts = rle["counts"]
    return {
        "size": [int(height), int(width)],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }
