"""Released weights files that are known: one module of name maps per source.

No file is of the sources of two modules, so the order of the modules does not matter; inside a module the more special
source comes first.
"""

from __future__ import annotations

from vis.checkpoint.sources import (
    adelaidet,
    detectron2_zoo,
    dinov2,
    dvis,
    idol,
    mask2former,
    mmdetection,
    swin,
    torchvision,
    vita,
)
from vis.checkpoint.sources.recognition import UNKNOWN, Recognised, fit_prefix, recognise, take_backbone
from vis.checkpoint.sources.source import SOURCES, Names, Source, register

__all__ = [
    "SOURCES",
    "UNKNOWN",
    "Names",
    "Recognised",
    "Source",
    "adelaidet",
    "detectron2_zoo",
    "dinov2",
    "dvis",
    "fit_prefix",
    "idol",
    "mask2former",
    "mmdetection",
    "recognise",
    "register",
    "swin",
    "take_backbone",
    "torchvision",
    "vita",
]
