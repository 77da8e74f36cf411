"""Areas and intersections of many run-length codes: compiled (``vis/csrc/rle.cpp``), else NumPy and pycocotools.

Both give the same whole numbers. The compiled code is some ten times faster and lets other Python threads run;
pycocotools does not, so that threads bring nothing there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import torch
from numpy.typing import NDArray
from torch import Tensor

from vis.layers.ms_deform_attn import library
from vis.structures.rle import BadRLE, rle_areas

logger = logging.getLogger(__name__)


class PackedCodes(Sequence[dict[str, Any] | None]):
    """The masks of one track in one piece of memory: compressed COCO RLE dicts, one per frame, None without a mask.

    It reads like a list of them, at a third of its memory.

    Args:
        counts: (T,) ``counts`` of the masks, empty without a mask.
        height, width: of the video in pixels; every mask has this size.
    """

    __slots__ = ("ends", "size", "text")

    def __init__(self, counts: Sequence[bytes], height: int, width: int) -> None:
        self.size = (height, width)
        self.text = b"".join(counts)
        self.ends = np.cumsum([*map(len, counts)], dtype=np.int64)  # (T,) exclusive, in ``text``

    @classmethod
    def of(cls, codes: Sequence[Mapping[str, Any] | None], height: int, width: int) -> PackedCodes:
        """From RLE dicts with bytes, or None."""
        return cls([b"" if code is None else code["counts"] for code in codes], height, width)

    def areas(self, *, use_compiled: bool | None = None) -> NDArray[np.int64]:
        """(T,) pixels of each mask, 0 without one; all codes are checked.

        Args:
            use_compiled: None takes the compiled code where it is.

        Raises:
            BadRLE: a code is no mask of this size; ``index`` is the frame.
        """
        present = np.flatnonzero(np.diff(self.ends, prepend=0))
        found = np.zeros(len(self), np.int64)
        try:
            found[present] = _areas(self.text, self.ends[present], self.size[0] * self.size[1], use_compiled)
        except BadRLE as error:
            raise BadRLE(int(present[error.index]), error.reason) from error
        return found

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        text = self.text[self.ends[at - 1] if at else 0 : self.ends[at]]
        return {"size": list(self.size), "counts": text} if text else None


@cache
def compiled() -> bool:
    """Whether the compiled code is there; the log says it once."""
    problem = library.problem("cpu")
    if not problem and not hasattr(torch.ops.vis, "rle_intersections"):
        problem = "vis._C is of an older version of vis; build it again"
    if problem:
        logger.info("masks are compared by pycocotools, which is slower than compiled code: %s", problem)
    return not problem


def _areas(text: bytes, ends: NDArray[np.int64], num_pixels: int, use_compiled: bool | None) -> NDArray[np.int64]:
    if compiled() if use_compiled is None else use_compiled:
        found: NDArray[np.int64] = torch.ops.vis.rle_areas(_bytes([text]), torch.from_numpy(ends), num_pixels).numpy()
        if not len(found) or found.min() >= 0:
            return found
    # also where a code is damaged: this says what is wrong with it
    return rle_areas([text[start:end] for start, end in pairwise([0, *ends.tolist()])], num_pixels)


def intersections(
    a: Sequence[PackedCodes], b: Sequence[PackedCodes], *, use_compiled: bool | None = None
) -> NDArray[np.int64]:
    """Pixels that masks share, frame by frame.

    Args:
        a, b: tracks of one video, their codes checked by ``areas``.
        use_compiled: None takes the compiled code where it is.

    Returns:
        (A, B, T).

    Raises:
        ValueError: the tracks differ in length or size.
    """
    shapes = {(len(codes), *codes.size) for codes in (*a, *b)}
    if len(shapes) > 1:
        raise ValueError(f"tracks of one video have one length and size, these have (T, H, W) = {sorted(shapes)}")
    if not a or not b or shapes.pop()[0] == 0:
        return np.zeros((len(a), len(b), len(a[0]) if a else len(b[0]) if b else 0), np.int64)
    if compiled() if use_compiled is None else use_compiled:
        height, width = a[0].size
        shared: NDArray[np.int64] = torch.ops.vis.rle_intersections(
            *_packed(a), *_packed(b), len(a[0]), height, height * width
        ).numpy()
        return shared
    return _by_pycocotools(a, b)


def _by_pycocotools(a: Sequence[PackedCodes], b: Sequence[PackedCodes]) -> NDArray[np.int64]:
    """One call per frame. For a crowd, pycocotools gives intersection / area of ``a``: one merge per pair of masks
    whose boxes meet. Times the area that is less than half a pixel off the whole number (areas are below 2^31 and a
    double has 53 bits), so rounding makes it exact."""
    shared = np.zeros((len(a), len(b), len(a[0])), np.int64)
    there_a, there_b = (np.diff([codes.ends for codes in tracks], axis=1, prepend=0) > 0 for tracks in (a, b))
    for frame in np.flatnonzero(there_a.any(0) & there_b.any(0)).tolist():
        rows, columns = (np.flatnonzero(there[:, frame]).tolist() for there in (there_a, there_b))
        masks = [a[row][frame] for row in rows]
        share = mask_utils.iou(masks, [b[column][frame] for column in columns], [1] * len(columns))
        shared[np.ix_(rows, columns, [frame])] = np.rint(share * mask_utils.area(masks)[:, None])[..., None]
    return shared


def _packed(tracks: Sequence[PackedCodes]) -> tuple[Tensor, Tensor]:
    starts = np.cumsum([0, *(len(codes.text) for codes in tracks[:-1])])
    ends = np.concatenate([codes.ends + start for codes, start in zip(tracks, starts, strict=True)])
    return _bytes([codes.text for codes in tracks]), torch.from_numpy(ends)


def _bytes(parts: Sequence[bytes]) -> Tensor:
    """One writable copy, because PyTorch warns about memory that is not."""
    joined = bytearray().join(parts)
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
