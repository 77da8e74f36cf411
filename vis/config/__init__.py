"""Configuration: shared defaults, the registry of the parts' own keys, released names and keys."""

from __future__ import annotations

from vis.config.node import CfgNode, closest, declare, get_cfg

__all__ = ["CfgNode", "closest", "declare", "get_cfg"]
