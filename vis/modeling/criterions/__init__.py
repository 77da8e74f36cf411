"""Criterions: predictions and targets in, named losses out."""

from __future__ import annotations

from vis.modeling.criterions.set_criterion import MaskTargets, SetCriterion

__all__ = ["MaskTargets", "SetCriterion"]
