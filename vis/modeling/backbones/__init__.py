"""Backbones: detectron2's registered ones under the names that released configurations use."""

from __future__ import annotations

from vis.modeling.backbones.build import build_backbone
from vis.modeling.backbones.swin import D2SwinTransformer

__all__ = ["D2SwinTransformer", "build_backbone"]
