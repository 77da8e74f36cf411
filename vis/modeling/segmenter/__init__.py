"""The per-frame segmenter that the methods share, and the preparation of its input."""

from __future__ import annotations

from vis.modeling.segmenter.build import Segmenter, build_segmenter
from vis.modeling.segmenter.cache import (
    SegmenterCache,
    build_segmenter_cache,
    cached_segment,
    refuse_segmenter_cache,
)
from vis.modeling.segmenter.clip import as_clips
from vis.modeling.segmenter.frames import FrameNormalizer
from vis.modeling.segmenter.targets import check_labels, clip_targets

__all__ = [
    "FrameNormalizer",
    "Segmenter",
    "SegmenterCache",
    "as_clips",
    "build_segmenter",
    "build_segmenter_cache",
    "cached_segment",
    "check_labels",
    "clip_targets",
    "refuse_segmenter_cache",
]
