"""Detectors of single frames, registered under the names of ``MODEL.DETECTOR.NAME``."""

from __future__ import annotations

from vis.modeling.detectors.base import Detector, FrameDetections, Positives, build_detector
from vis.modeling.detectors.condinst import CondInst
from vis.modeling.detectors.mask_rcnn import MaskRCNN

__all__ = ["CondInst", "Detector", "FrameDetections", "MaskRCNN", "Positives", "build_detector"]
