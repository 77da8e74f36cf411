"""Refiners: whole tracks to better tracks."""

from __future__ import annotations

from vis.modeling.refiners.temporal import TemporalRefiner

__all__ = ["TemporalRefiner"]
