"""Run-length encoding of binary masks, in COCO's format (pycocotools)."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask
from torch import Tensor

from vis.structures.video_prediction import RLE


def encode_masks(masks: Tensor) -> list[RLE | None]:
    """RLEs of N masks, None where a mask is empty.

    Args:
        masks: (N, W, H) bool on the CPU, *transposed*: COCO counts run down the columns, so this order is encoded
            without copying every mask once more.
    """
    flat = masks.contiguous().numpy().view(np.uint8)
    filled = [bool(row.any()) for row in flat]
    if not any(filled):
        return [None] * len(flat)
    coded = iter(coco_mask.encode(flat[filled].transpose(2, 1, 0)))
    return [_as_text(next(coded)) if keep else None for keep in filled]


def _as_text(coded: dict) -> RLE:
    return {"size": [int(side) for side in coded["size"]], "counts": coded["counts"].decode("ascii")}
