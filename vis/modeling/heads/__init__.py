"""Heads: what is predicted from features and queries."""

from __future__ import annotations

from vis.modeling.heads.mask_former import MaskFormerHead

__all__ = ["MaskFormerHead"]
