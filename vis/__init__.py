"""vis: one framework for video instance segmentation (segment, classify and track every object in a video)."""

from __future__ import annotations

__version__ = "0.1.0"
