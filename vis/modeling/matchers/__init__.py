"""Matching of predictions with targets."""

from __future__ import annotations

from vis.modeling.matchers.hungarian import HungarianMatcher, linear_assignment

__all__ = ["HungarianMatcher", "linear_assignment"]
