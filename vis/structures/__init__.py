"""What crosses the boundaries between data, models, trackers and evaluation."""

from __future__ import annotations

from vis.structures.clip_sample import ClipSample
from vis.structures.video_prediction import RLE, VideoPrediction

__all__ = ["RLE", "ClipSample", "VideoPrediction"]
