"""Measures COCO run-length codes without decoding them to pixels, many in one NumPy pass.

Every code is checked here before it reaches pycocotools: its C code trusts what it is given, and a code whose runs do
not add up to the picture makes its merge loop forever.

The compressed code (COCO API): each run is written in groups of five bits, low bits first, one character of value
``48 + bits`` per group, bit 32 saying that the run goes on and bit 16 of the last group being its sign; from the fourth
run on, the number is the difference from the run two places before. Runs alternate between background and foreground,
column by column, beginning with background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MAX_GROUPS = 7  # 35 bits: more than any run of a picture of fewer than 2**32 pixels needs


class BadRLE(ValueError):
    """A run-length code that is no mask of the given size; ``index`` is its position in the sequence that was given."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason


def rle_areas(codes: Sequence[bytes], num_pixels: int) -> NDArray[np.int64]:
    """The foreground area of each compressed code.

    Args:
        codes: compressed COCO codes (``counts`` as bytes).
        num_pixels: height times width; the runs of every code must add up to it.

    Returns:
        (len(codes),) int64 areas in pixels.

    Raises:
        BadRLE: a code is empty, holds a foreign character, is cut off, or does not add up to ``num_pixels``.
    """
    if not codes:
        return np.zeros(0, np.int64)
    lengths = np.array([len(code) for code in codes])
    if not lengths.all():
        raise BadRLE(int(np.flatnonzero(lengths == 0)[0]), "the code is empty")
    ends = np.cumsum(lengths)
    chars = np.frombuffer(b"".join(codes), np.uint8).astype(np.int64) - 48
    _raise_first((chars < 0) | (chars > 63), ends, "it holds a character that no run-length code has")
    more = (chars & 32) != 0
    cut = more[ends - 1]
    if cut.any():
        raise BadRLE(int(np.flatnonzero(cut)[0]), "it is cut off in the middle of a run")

    last = np.flatnonzero(~more)  # the character that ends each run
    first = np.concatenate(([0], last[:-1] + 1))
    size = last - first + 1
    _raise_first(size > _MAX_GROUPS, np.searchsorted(last, ends - 1) + 1, "a run is longer than any picture")
    position = np.arange(len(chars)) - np.repeat(first, size)
    numbers = np.add.reduceat((chars & 31) << (5 * position), first)
    numbers -= np.where(chars[last] & 16, np.int64(1) << (5 * size), 0)

    run_ends = np.searchsorted(last, ends - 1) + 1  # of each code, exclusive, counted in runs
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


def _raise_first(bad: NDArray[np.bool_], ends: NDArray[np.intp], reason: str) -> None:
    """Raise for the code that holds the first bad element; ``ends`` are the codes' exclusive ends."""
    if bad.any():
        raise BadRLE(int(np.searchsorted(ends, np.flatnonzero(bad)[0], side="right")), reason)
