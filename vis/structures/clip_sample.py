"""The unit of data that a model receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from detectron2.structures import Instances
from torch import Tensor


class ClipSample(TypedDict, total=False):
    """T frames of one video, with the instances in them where they are known.

    In training ``image`` is a list; at test time it may be a lazy sequence that decodes a frame when it is asked for,
    so a model reads it once, in order, a window at a time.
    """

    #: T tensors (3, H, W), RGB, 0..255 (uint8 or float).
    image: Sequence[Tensor]
    #: T ``Instances``: ``gt_classes`` (N,) int64, ``gt_ids`` (N,) int64 (-1 where the instance is absent in the frame),
    #: ``gt_masks`` BitMasks (N, H, W), ``gt_boxes``. The same N slots in the same order in every frame of the clip; an
    #: absent slot keeps its class and has an empty mask.
    instances: list[Instances]
    #: Size of the original frames in pixels: the size in which results are written.
    height: int
    width: int
    video_id: int
    #: Indices of the T frames in their video.
    frame_ids: list[int]
    #: Number of frames of the whole video.
    length: int
    file_names: list[str]
