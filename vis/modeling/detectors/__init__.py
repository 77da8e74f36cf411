"""Detectors of single frames, registered under the names of ``MODEL.DETECTOR.NAME``."""

from __future__ import annotations

from vis.modeling.detectors.base import Detector, FrameDetections, Positives, build_detector

__all__ = ["Detector", "FrameDetections", "Positives", "build_detector"]
