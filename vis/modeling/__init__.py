"""Models: parts by name from the configuration, composed by a meta-architecture."""

from __future__ import annotations

from vis.modeling import backbones, heads, meta_arch, pixel_decoders, refiners, trackers, transformer_decoders
from vis.modeling.build import build_model

__all__ = [
    "backbones",
    "build_model",
    "heads",
    "meta_arch",
    "pixel_decoders",
    "refiners",
    "trackers",
    "transformer_decoders",
]
