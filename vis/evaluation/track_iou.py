"""How much tracks share over a video: what AP, the track metrics and the breakdown of errors are all computed from.

Masks stay run-length codes. All counts are whole pixels and exact, so that every number made of them is the same
however it was computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.rle_kernels import PackedCodes, intersections
from vis.evaluation.ytvis_io import Track


def track_areas(tracks: Sequence[Track]) -> NDArray[np.int64]:
    """Pixels of each track in each frame, (N, T); (0, 0) without tracks."""
    return np.stack([track.areas for track in tracks]) if tracks else np.zeros((0, 0), np.int64)


def frame_intersections(a: Sequence[Track], b: Sequence[Track]) -> NDArray[np.int64]:
    """Pixels that two tracks of one video share in each frame, whatever their categories.

    Args:
        a, b: tracks of the same video.

    Returns:
        (A, B, T) int64; 0 where one of them has no mask. T is 0 where there is no track at all.

    Raises:
        ValueError: the tracks differ in length or size.
    """
    return intersections(_packed(a), _packed(b))


def pairwise_iou(a: Sequence[Track], b: Sequence[Track]) -> NDArray[np.float64]:
    """Spatio-temporal IoU of tracks of one video (Yang et al., ICCV 2019, eq. 5).

    The intersections of all frames over the unions of all frames; a frame in which only one of the two has a mask adds
    that mask to the union.

    Args:
        a, b: tracks of the same video.

    Returns:
        (A, B) in [0, 1]; 0 where both are empty.

    Raises:
        ValueError: the tracks differ in length or size.
    """
    return iou_of(frame_intersections(a, b).sum(2), track_areas(a).sum(1), track_areas(b).sum(1))


def frame_iou(shared: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """IoU in each frame, (A, B, T), from :func:`frame_intersections` and :func:`track_areas` of both, (A, T), (B, T).

    0 where both have no pixel.
    """
    return _ratio(shared, a[:, None] + b[None] - shared)


def iou_of(shared: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """IoU, (A, B), from common pixels (A, B) and the pixels of each, (A,) and (B,); 0 where both have none."""
    return _ratio(shared, a[:, None] + b[None] - shared)


def _ratio(shared: NDArray[np.int64], union: NDArray[np.int64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)
    return ratio


def _packed(tracks: Sequence[Track]) -> list[PackedCodes]:
    return [track.codes for track in tracks]
