"""What crosses the boundaries between data, models, trackers and evaluation."""

from __future__ import annotations

from vis.structures.clip_outputs import ClipTargets, RefinerOutput, SegmenterClip, TrackerOutput
from vis.structures.clip_sample import ClipSample
from vis.structures.video_prediction import RLE, VideoPrediction

__all__ = ["ClipSample", "ClipTargets", "RLE", "RefinerOutput", "SegmenterClip", "TrackerOutput", "VideoPrediction"]
