"""From track-ordered predictions to results, with memory that does not grow with the length of a video."""

from __future__ import annotations

from vis.modeling.inference.growing import FrameSizes, GrowingModel, ResultRules, TrackedFrame
from vis.modeling.inference.mask_store import MaskStore
from vis.modeling.inference.results import MaskWriter, select_tracks
from vis.modeling.inference.session import OnlineTracks, TrackedFrames, Tracks, VideoSession, class_probabilities
from vis.modeling.inference.video_model import VideoModel

__all__ = [
    "FrameSizes",
    "GrowingModel",
    "MaskStore",
    "MaskWriter",
    "OnlineTracks",
    "ResultRules",
    "TrackedFrame",
    "TrackedFrames",
    "Tracks",
    "VideoModel",
    "VideoSession",
    "class_probabilities",
    "select_tracks",
]
