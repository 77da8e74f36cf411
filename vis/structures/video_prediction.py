"""The result of one video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor


class RLE(TypedDict):
    """A COCO run-length encoded mask: ``size`` is ``[height, width]``, ``counts`` the compressed string."""

    size: list[int]
    counts: str


@dataclass
class VideoPrediction:
    """N tracks of one video of ``length`` frames, in no particular order.

    Attributes:
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, contiguous class indices 0..K-1.
        track_ids: (N,) int64; predictions of one query, which may be reported with several classes, share it.
        masks: for each track a list of ``length`` RLEs at ``height`` x ``width``, None where the track has no pixel.
        height, width: size of the original frames in pixels.
        length: number of frames.
        video_id: the data set's id of the video, None for a video that is not of a data set.
    """

    scores: Tensor
    labels: Tensor
    track_ids: Tensor
    masks: list[list[RLE | None]]
    height: int
    width: int
    length: int
    video_id: int | None = None

    def __len__(self) -> int:
        return len(self.scores)
