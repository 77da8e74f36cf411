"""Trackers: predictions of single frames to tracks; weights in the module, the memory of a video in its state."""

from __future__ import annotations

from vis.modeling.trackers.query_matching import QueryMatchingState, QueryMatchingTracker, match_queries

__all__ = ["QueryMatchingState", "QueryMatchingTracker", "match_queries"]
