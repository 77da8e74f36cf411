"""From track-ordered predictions to results, with memory that does not grow with the length of a video."""

from __future__ import annotations

from vis.modeling.inference.mask_store import MaskStore
from vis.modeling.inference.results import MaskWriter, select_tracks

__all__ = ["MaskStore", "MaskWriter", "select_tracks"]
