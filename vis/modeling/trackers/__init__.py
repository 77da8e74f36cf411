"""Trackers: predictions of single frames to tracks; weights in the module, the memory of a video in its state."""

from __future__ import annotations

from vis.config import CfgNode, declare
from vis.modeling.trackers.embedding import EmbeddingState, EmbeddingTracker
from vis.modeling.trackers.memory_bank import MemoryBankState, MemoryBankTracker
from vis.modeling.trackers.query_matching import QueryMatchingState, QueryMatchingTracker, match_queries
from vis.modeling.trackers.referring import ReferringState, ReferringTracker

__all__ = [
    "EmbeddingState",
    "EmbeddingTracker",
    "MemoryBankState",
    "MemoryBankTracker",
    "QueryMatchingState",
    "QueryMatchingTracker",
    "ReferringState",
    "ReferringTracker",
    "match_queries",
]


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.TRACKER = type(cfg)()
    cfg.MODEL.TRACKER.NAME = "QueryMatchingTracker"
