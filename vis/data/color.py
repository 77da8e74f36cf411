"""Colour augmentations as transforms: they change pixels and leave masks and coordinates alone."""

from __future__ import annotations

import numpy as np
from fvcore.transforms.transform import Transform

__all__ = ["COLOR_KINDS", "ColorTransform"]

COLOR_KINDS = ("brightness", "contrast", "saturation")
# ITU-R BT.601 luma of red, green, blue.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class ColorTransform(Transform):
    """Blends the picture with its dark, mean or grey version: ``factor * picture + (1 - factor) * version``.

    Args:
        kind: "brightness" (black), "contrast" (the mean of the picture) or "saturation" (its luma).
        factor: 1 changes nothing.
    """

    def __init__(self, *, kind: str, factor: float) -> None:
        super().__init__()
        if kind not in COLOR_KINDS:
            raise ValueError(f"Unknown colour augmentation {kind!r}, expected one of {', '.join(COLOR_KINDS)}.")
        self.kind = kind
        self.factor = factor

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB in, the same out."""
        pixels = img.astype(np.float32)
        other: np.ndarray | float = 0.0
        if self.kind == "contrast":
            other = float(pixels.mean())
        elif self.kind == "saturation":
            other = (pixels @ _LUMA)[..., None]
        mixed = self.factor * pixels + (1.0 - self.factor) * other
        return np.clip(mixed, 0, 255).astype(np.uint8)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Unchanged."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Unchanged."""
        return segmentation
