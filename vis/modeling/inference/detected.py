"""Masks of a detector's detections at the original size."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vis.modeling.detectors.base import Detector, FrameDetections, Pyramid
from vis.modeling.detectors.masks import encode_found, original_masks
from vis.modeling.inference.growing import FrameSizes
from vis.structures import RLE

# Masks that are made together: of 1080 x 1920 pixels in float32 each takes 8 MB.
_CHUNK = 8


@runtime_checkable
class PlacesMasks(Protocol):
    """A detector whose masks can be made at any size."""

    def masks_at(
        self, found: FrameDetections, pyramid: Pyramid, size: tuple[int, int], scale: tuple[float, float]
    ) -> Tensor:
        """(n, H, W) probabilities in a picture of ``size``, ``scale`` (x, y) of its pixels to one of the input."""


def encode_detections(
    detector: Detector, found: FrameDetections, pyramid: Pyramid, sizes: FrameSizes
) -> list[RLE | None]:
    """RLEs at the original size, None for an empty mask.

    Masks in boxes are put into a picture of that size; others are cut to the input and resized (bilinear). Foreground
    is a probability above 0.5.
    """
    scale = (sizes.output[1] / sizes.input[1], sizes.output[0] / sizes.input[0])
    coded: list[RLE | None] = []
    for rows in torch.arange(len(found), device=found.scores.device).split(_CHUNK) if len(found) else ():
        part = found.take(rows)
        if isinstance(detector, PlacesMasks):
            masks = detector.masks_at(part, pyramid, sizes.output, scale) > 0.5
        else:
            probs = detector.mask_probs(part, pyramid, sizes.padded)
            masks = original_masks(probs, input_size=sizes.input, output_size=sizes.output)
        coded += encode_found(masks)
    return coded
