"""Masks of detections at the size of the results."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.structures import RLE
from vis.structures.rle import encode_masks

# Masks that are resized together: of 1080 x 1920 pixels in float32 each takes 8 MB.
_CHUNK = 8


def original_masks(probs: Tensor, *, input_size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """(n, H, W) probabilities at the padded size -> (n, *output_size) bool at the original size, above one half.

    Cut to the input, then bilinear; sizes are (height, width).
    """
    inside = probs[:, : input_size[0], : input_size[1]]
    masks = torch.zeros(len(probs), *output_size, dtype=torch.bool, device=probs.device)
    for start in range(0, len(probs), _CHUNK):
        chunk = inside[None, start : start + _CHUNK]
        masks[start : start + _CHUNK] = F.interpolate(chunk, size=output_size, mode="bilinear")[0] > 0.5
    return masks


def encode_found(masks: Tensor) -> list[RLE | None]:
    """RLEs of (n, h, w) bool masks, None for an empty one."""
    # Transposed: the encoder wants columns.
    return encode_masks(masks.transpose(1, 2).cpu()) if len(masks) else []
