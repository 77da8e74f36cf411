"""Heads: what is predicted from features and queries."""

from __future__ import annotations

from vis.modeling.heads.boundary import BoundaryHead
from vis.modeling.heads.mask_former import MaskFormerHead
from vis.modeling.heads.quality import QualityHead

__all__ = ["BoundaryHead", "MaskFormerHead", "QualityHead"]
