"""Run-length encoded masks in COCO's format, every code checked before pycocotools is given it.

An RLE in this project is the compressed COCO form with text counts, ``{"size": [h, w], "counts": str}``: it goes into
json as it is. pycocotools trusts what it is given: run lengths that do not fit the size write past the end of its
buffer and crash the process later, or make its merge loop forever. Everything here that reads an RLE therefore checks
the run lengths first.

The compressed counts (COCO API): each run is written in groups of five bits, low bits first, one character of value
``48 + bits`` per group, bit 32 saying that the run goes on and bit 16 of the last group being its sign; from the fourth
run on, the number is the difference from the run two places before. Runs alternate between background and foreground,
column by column, beginning with background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from vis.structures.video_prediction import RLE

# pycocotools counts pixels in 32 bits
MAX_PIXELS = 2**31 - 1

_MAX_GROUPS = 7  # 35 bits: more than any run length that fits 32 bits needs
_BATCH = 65536  # characters measured in one pass: with many more its arrays leave the processor's cache


class BadRLE(ValueError):
    """A run-length code that is no mask of the given size; ``index`` is its position in the sequence that was given."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason


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


def encode_masks(masks: Tensor) -> list[RLE | None]:
    """RLEs of N masks, None where a mask is empty.

    Args:
        masks: (N, W, H) bool on the CPU, *transposed*: COCO counts run down the columns, so this order is encoded
            without copying every mask once more.
    """
    flat = masks.contiguous().numpy().view(np.uint8)
    filled = [bool(row.any()) for row in flat]
    if not any(filled):
        return [None] * len(flat)
    coded = iter(coco_mask.encode(flat[filled].transpose(2, 1, 0)))
    return [_text_counts(next(coded)) if keep else None for keep in filled]


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Decodes one RLE, compressed or not.

    Returns:
        (H, W) bool, columns contiguous.

    Raises:
        ValueError: the counts do not describe a mask of the given size.
    """
    runs = run_lengths(rle)
    height, width = size_of(rle)
    inside = np.arange(runs.size) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def size_of(rle: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an RLE in pixels.

    Raises:
        ValueError: the size is not two whole numbers, or no picture can be of that size.
    """
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


def run_lengths(rle: Mapping[str, Any]) -> np.ndarray:
    """The run lengths of an RLE of any form: pixels outside, inside, outside, ... in column order.

    Returns:
        (runs,) int64.

    Raises:
        ValueError: the size or the counts are not valid, or the run lengths do not add up to height x width.
    """
    height, width = size_of(rle)
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


def rle_areas(codes: Sequence[bytes], num_pixels: int) -> NDArray[np.int64]:
    """The foreground area of each compressed code, many in one NumPy pass.

    Args:
        codes: compressed COCO codes (``counts`` as bytes).
        num_pixels: height times width; the runs of every code must add up to it.

    Returns:
        (len(codes),) int64 areas in pixels.

    Raises:
        BadRLE: a code is empty, holds a foreign character, is cut off, or does not add up to ``num_pixels``; or they
            are of more than ``MAX_PIXELS``.
    """
    if codes and num_pixels > MAX_PIXELS:
        raise BadRLE(0, f"a picture of {num_pixels} pixels is too large for a run-length code")
    areas = np.zeros(len(codes), np.int64)
    lengths = np.array([len(code) for code in codes], np.int64)
    batch = (np.cumsum(lengths) - lengths) // _BATCH
    starts = np.flatnonzero(np.diff(batch, prepend=-1)).tolist()
    for start, end in pairwise([*starts, len(codes)]):
        try:
            areas[start:end] = _areas_of_batch(codes[start:end], lengths[start:end], num_pixels)
        except BadRLE as error:
            error.index += start
            raise
    return areas


def _areas_of_batch(codes: Sequence[bytes], lengths: NDArray[np.int64], num_pixels: int) -> NDArray[np.int64]:
    if not lengths.all():
        raise BadRLE(int(np.flatnonzero(lengths == 0)[0]), "the code is empty")
    ends = np.cumsum(lengths)
    chars = _characters(b"".join(codes))
    _raise_first((chars < 0) | (chars > 63), ends, "it holds a character that no run-length code has")
    cut = (chars[ends - 1] & 32) != 0
    if cut.any():
        raise BadRLE(int(np.flatnonzero(cut)[0]), "it is cut off in the middle of a run")
    first, last = _groups(chars)
    run_ends = np.searchsorted(last, ends - 1) + 1  # of each code, exclusive, counted in runs
    _raise_first(last - first >= _MAX_GROUPS, run_ends, "a run is longer than any picture")
    numbers = _numbers(chars, first, last)

    run_starts = np.concatenate(([0], run_ends[:-1]))
    start_of = np.repeat(run_starts, run_ends - run_starts)
    place = np.arange(len(numbers)) - start_of
    odd = place % 2 == 1
    runs = np.where(odd, _chain(numbers, odd, start_of), _chain(numbers, ~odd & (place > 0), start_of))
    runs = np.where(place == 0, numbers, runs)
    _raise_first(runs < 0, run_ends, "a run has a negative length")
    totals = np.add.reduceat(runs, run_starts)
    wrong = np.flatnonzero(totals != num_pixels)
    if len(wrong):
        at = int(wrong[0])
        raise BadRLE(at, f"its runs cover {int(totals[at])} pixels, the picture has {num_pixels}")
    areas: NDArray[np.int64] = np.add.reduceat(np.where(odd, runs, 0), run_starts)
    return areas


def _chain(numbers: NDArray[np.int64], taken: NDArray[np.bool_], start_of: NDArray[np.intp]) -> NDArray[np.int64]:
    """Running sums over the taken places of each code; a code's first place is never taken, so it holds the base."""
    sums: NDArray[np.int64] = np.cumsum(np.where(taken, numbers, 0))
    return sums - sums[start_of]


def _raise_first(bad: NDArray[np.bool_], ends: NDArray[Any], reason: str) -> None:
    """Raise for the code that holds the first bad element; ``ends`` are the codes' exclusive ends."""
    if bad.any():
        raise BadRLE(int(np.searchsorted(ends, np.flatnonzero(bad)[0], side="right")), reason)


def _parse_counts(text: bytes) -> NDArray[np.int64]:
    """Run lengths of one code; not a batch of one, which takes twice the time for codes of usual length."""
    chars = _characters(text)
    if chars.size == 0:
        return chars
    if chars.min() < 0 or chars.max() > 63 or chars[-1] & 32:
        raise ValueError("the counts of the RLE are damaged: characters that cannot occur, or cut off at the end")
    first, last = _groups(chars)
    if (last - first).max() >= _MAX_GROUPS:
        raise ValueError("the counts of the RLE are damaged: a run length of more than 32 bits")
    runs = _numbers(chars, first, last)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _characters(text: bytes) -> NDArray[np.int64]:
    """Values of the characters of compressed counts; those of a good code are 0 to 63."""
    return np.frombuffer(text, np.uint8).astype(np.int64) - 48


def _groups(chars: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The places of the first and of the last character of each run."""
    last = np.flatnonzero((chars & 32) == 0)
    return np.concatenate(([0], last[:-1] + 1)), last


def _numbers(chars: NDArray[np.int64], first: NDArray[np.intp], last: NDArray[np.intp]) -> NDArray[np.int64]:
    """The signed number that each run is written as."""
    size = last - first + 1
    position = np.arange(len(chars)) - np.repeat(first, size)
    numbers: NDArray[np.int64] = np.add.reduceat((chars & 31) << (5 * position), first)
    numbers -= np.where(chars[last] & 16, np.int64(1) << (5 * size), 0)
    return numbers


def _checked(rle: Mapping[str, Any]) -> dict[str, Any]:
    """A compressed RLE that pycocotools can be given."""
    runs = run_lengths(rle)
    height, width = size_of(rle)
    if isinstance(rle["counts"], (list, tuple)):
        plain = {"size": [height, width], "counts": runs.tolist()}
        packed: dict[str, Any] = coco_mask.frPyObjects(plain, height, width)
        return packed
    return {"size": [height, width], "counts": rle["counts"]}


def _text_counts(rle: Mapping[str, Any]) -> RLE:
    height, width = rle["size"]
    counts = rle["counts"]
    return {
        "size": [int(height), int(width)],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }
