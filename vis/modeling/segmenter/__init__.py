"""The per-frame segmenter that the methods share, and the preparation of its input."""

from __future__ import annotations

from vis.modeling.segmenter.build import Segmenter, build_segmenter
from vis.modeling.segmenter.clip import as_clips
from vis.modeling.segmenter.frames import FrameNormalizer
from vis.modeling.segmenter.targets import check_labels, clip_targets

__all__ = ["FrameNormalizer", "Segmenter", "as_clips", "build_segmenter", "check_labels", "clip_targets"]
