"""Backbones: detectron2's registered ones under the names that released configurations use."""

from __future__ import annotations

from vis.modeling.backbones.build import build_backbone

__all__ = ["build_backbone"]
