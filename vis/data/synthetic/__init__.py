"""The embedded data sets: annotated video in the YouTube-VIS format, drawn from a seed.

`generate("synthetic_ytvis", root)` writes short clips with little occlusion, `generate("synthetic_ovis", root)` long
ones with crossings, long occlusions and objects that leave and return.
"""

from __future__ import annotations

from vis.data.synthetic.presets import CATEGORIES, GENERATOR_VERSION, PRESETS, Preset, occlusion_level
from vis.data.synthetic.writer import generate

__all__ = ["CATEGORIES", "GENERATOR_VERSION", "PRESETS", "Preset", "generate", "occlusion_level"]
