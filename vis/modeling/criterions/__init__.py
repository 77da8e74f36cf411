"""Criterions: predictions and targets in, named losses out."""

from __future__ import annotations

from vis.modeling.criterions.clip_criterion import RefinerCriterion, TrackerCriterion
from vis.modeling.criterions.ctvis import CTVISCriterion
from vis.modeling.criterions.mask_criterion import MaskTargets
from vis.modeling.criterions.set_criterion import SetCriterion

__all__ = ["CTVISCriterion", "MaskTargets", "RefinerCriterion", "SetCriterion", "TrackerCriterion"]
