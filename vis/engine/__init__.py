"""Running things: configuration, the trainer, launching, the predictor."""

from __future__ import annotations

from vis.engine.config import load_cfg

__all__ = ["load_cfg"]
