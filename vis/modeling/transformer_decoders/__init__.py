"""Transformer decoders: queries that find one object each."""

from __future__ import annotations

from vis.modeling.transformer_decoders.masked import MultiScaleMaskedTransformerDecoder

__all__ = ["MultiScaleMaskedTransformerDecoder"]
