"""Pixel decoders: backbone features to mask features and a multi-scale memory."""

from __future__ import annotations

from vis.modeling.pixel_decoders.msdeformattn import MSDeformAttnPixelDecoder

__all__ = ["MSDeformAttnPixelDecoder"]
