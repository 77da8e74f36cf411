"""What the two embedded data sets look like: classes, preset numbers, occlusion levels."""

from __future__ import annotations

from dataclasses import dataclass

GENERATOR_VERSION = 1
"""Raised whenever a change alters the bytes that some (preset, seed) gives."""

CATEGORIES: tuple[str, ...] = ("disc", "square", "triangle", "star", "ring", "cross")
"""Class names; the category id in the json is the position here plus one."""

SPLITS: tuple[str, ...] = ("train", "val")

NO_OCCLUSION = "no_occlusion"
SLIGHT_OCCLUSION = "slight_occlusion"
SEVERE_OCCLUSION = "severe_occlusion"
NO_OCCLUSION_FRACTION = 0.98
SEVERE_OCCLUSION_FRACTION = 0.5


def occlusion_level(visible: float) -> str:
    """The label of OVIS for an object of which the fraction `visible` (0..1) is seen.

    OVIS (Qi et al., "Occluded Video Instance Segmentation: A Benchmark", IJCV 2022) labels every instance in every
    frame by hand with one of three strings. Here they follow from the rendered silhouettes: at least 98 % seen is
    `no_occlusion`, at least 50 % is `slight_occlusion`, less is `severe_occlusion`. Only other objects occlude: what
    the picture's border cuts off does not count.
    """
    if visible >= NO_OCCLUSION_FRACTION:
        return NO_OCCLUSION
    return SLIGHT_OCCLUSION if visible >= SEVERE_OCCLUSION_FRACTION else SEVERE_OCCLUSION


@dataclass(frozen=True)
class Preset:
    """Numbers of one synthetic data set. Lengths are in pixels of the written picture, times in frames.

    Ranges `(low, high)` include both ends. Radii are those of the circle around a shape.
    """

    name: str
    height: int
    width: int
    length: tuple[int, int]
    objects: tuple[int, int]
    radius: tuple[float, float]
    crowded_radius: float  # upper radius in clips with three objects or more
    train_videos: int
    val_videos: int
    knot_spacing: float  # frames between two turning points of a path
    step: tuple[float, float]  # how far an object moves from one turning point to the next
    pan: float  # largest shift of the camera from its rest position, each axis
    turn: float  # largest rotation, radians per frame
    scale_change: float  # sizes stay within 1 +- this
    shutter: float  # longest exposure as a part of the frame interval (motion blur)
    path_candidates: int  # paths tried per object; the one that overlaps least is kept
    scripted: bool  # whether every clip holds a crossing, a long occlusion and an object that leaves and returns
    same_class: float  # probability that an object repeats a class of its clip
    min_area: int  # visible pixels below which an object counts as not visible (null mask)

    def num_videos(self, split: str) -> int:
        """Number of videos of `split` ("train" or "val")."""
        return {"train": self.train_videos, "val": self.val_videos}[split]


PRESETS: dict[str, Preset] = {
    "synthetic_ytvis": Preset(
        name="synthetic_ytvis",
        height=96,
        width=128,
        length=(10, 12),
        objects=(1, 4),
        radius=(14.0, 24.0),
        crowded_radius=19.0,
        train_videos=600,
        val_videos=40,
        knot_spacing=3.5,
        step=(6.0, 20.0),
        pan=5.0,
        turn=0.08,
        scale_change=0.15,
        shutter=0.5,
        path_candidates=3,
        scripted=False,
        same_class=0.35,
        min_area=16,
    ),
    "synthetic_ovis": Preset(
        name="synthetic_ovis",
        height=96,
        width=128,
        length=(40, 60),
        objects=(3, 6),
        radius=(14.0, 24.0),
        crowded_radius=20.0,
        train_videos=24,
        val_videos=8,
        knot_spacing=8.0,
        step=(14.0, 40.0),
        pan=12.0,
        turn=0.08,
        scale_change=0.25,
        shutter=0.5,
        path_candidates=1,
        scripted=True,
        same_class=0.3,
        min_area=16,
    ),
}
