"""Clip-consistent augmentation: all random numbers of a clip are drawn first, then applied to pixels and masks alike.

A step gets the sizes of the T frames and a generator and returns one transform per frame. Nothing is kept between
clips, so frames of a clip cannot drift apart, and the result depends on the generator alone. The transforms themselves
are those of fvcore and detectron2 (pictures: Pillow's bilinear filter; masks: nearest neighbour).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from detectron2.data.transforms import PadTransform, ResizeShortestEdge, ResizeTransform, RotationTransform
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    Transform,
    TransformList,
    VFlipTransform,
)

from vis.config import closest
from vis.data.color import COLOR_KINDS, ColorTransform

__all__ = [
    "ClipAugmentation",
    "Color",
    "Crop",
    "EachFrame",
    "FixedSizeCrop",
    "Flip",
    "RandomApply",
    "ResizeScale",
    "ResizeShortest",
    "SmoothRotation",
    "Step",
    "shortest_edge_size",
]

Size = tuple[int, int]
#: One transform per frame and the size (height, width) it results in.
Drawn = list[tuple[Transform, Size]]

SIZE_SAMPLING = ("choice", "range", "choice_by_clip", "range_by_clip")
FLIPS = ("none", "horizontal", "vertical", "flip_by_clip", "horizontal_by_clip", "vertical_by_clip")
CROPS = ("absolute_range", "absolute", "relative_range", "relative")


def one_of(value: str, names: Sequence[str], key: str) -> None:
    """Raises a ValueError that names the key and the closest known value."""
    if value not in names:
        raise ValueError(f"{key} is {value!r}, expected one of {', '.join(names)}.{closest(str(value), names)}")


def shortest_edge_size(height: int, width: int, short_edge: int, max_size: int) -> Size:
    """Size with the shorter edge at ``short_edge`` and the longer at most ``max_size``, rounded as int(x + 0.5)."""
    if short_edge == 0:
        return height, width
    new_height, new_width = ResizeShortestEdge.get_output_shape(height, width, short_edge, max_size)
    return max(1, new_height), max(1, new_width)


class Step(Protocol):
    """One augmentation of a clip."""

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """For T frames of these sizes: T pairs of a transform and the size after it."""


def _resize(size: Size, new_size: Size) -> tuple[Transform, Size]:
    return (NoOpTransform() if size == new_size else ResizeTransform(*size, *new_size)), new_size


@dataclass(frozen=True, kw_only=True)
class ResizeShortest:
    """Shorter edge to one of ``min_sizes`` ("choice") or to an integer between two ("range"), per clip or per frame.

    0 keeps the size, as in detectron2.

    Attributes:
        max_size: of the longer edge.
        max_sizes: two sizes between which that is drawn instead, as often as the other (multi-scale training of IAI:
            the frame is fitted into a box whose sides are drawn apart); empty: ``max_size``.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    sampling: str = "choice_by_clip"
    max_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        one_of(self.sampling, SIZE_SAMPLING, "INPUT.MIN_SIZE_TRAIN_SAMPLING")
        if not self.min_sizes or min(self.min_sizes) < 0:
            raise ValueError(f"INPUT.MIN_SIZE_TRAIN is {self.min_sizes}, expected one or more sizes in pixels.")
        if self.sampling.startswith("range") and (len(self.min_sizes) != 2 or self.min_sizes[0] > self.min_sizes[1]):
            raise ValueError(
                f"INPUT.MIN_SIZE_TRAIN_SAMPLING {self.sampling!r} needs exactly two sizes, the smaller first; "
                f"INPUT.MIN_SIZE_TRAIN is {self.min_sizes}. For a list of sizes use 'choice_by_clip'."
            )
        if self.max_sizes and (len(self.max_sizes) != 2 or not 0 < self.max_sizes[0] <= self.max_sizes[1]):
            raise ValueError(
                f"INPUT.MAX_SIZE_TRAIN_RANGE is {self.max_sizes}, expected two sizes in pixels, the smaller first, or "
                "none, for INPUT.MAX_SIZE_TRAIN."
            )

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        draws = 1 if self.sampling.endswith("_by_clip") else len(sizes)
        if self.sampling.startswith("range"):
            edges = rng.integers(self.min_sizes[0], self.min_sizes[1] + 1, size=draws)
        else:
            edges = np.asarray(self.min_sizes)[rng.integers(len(self.min_sizes), size=draws)]
        if self.max_sizes:
            bounds = rng.integers(self.max_sizes[0], self.max_sizes[1] + 1, size=draws)
        else:
            bounds = np.full(draws, self.max_size)
        edges, bounds = (np.broadcast_to(drawn, (len(sizes),)) for drawn in (edges, bounds))
        return [
            _resize(size, shortest_edge_size(*size, int(edge), int(bound)))
            for size, edge, bound in zip(sizes, edges, bounds, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirrors with probability 0.5, once per clip ("flip_by_clip": horizontally) or for each frame by itself."""

    kind: str = "flip_by_clip"
    probability: float = 0.5

    def __post_init__(self) -> None:
        one_of(self.kind, FLIPS, "INPUT.RANDOM_FLIP")

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        if self.kind == "none":
            return [(NoOpTransform(), size) for size in sizes]
        draws = 1 if self.kind.endswith("_by_clip") else len(sizes)
        flips = np.broadcast_to(rng.random(draws) < self.probability, (len(sizes),))
        vertical = self.kind.startswith("vertical")
        result: Drawn = []
        for size, flip in zip(sizes, flips, strict=True):
            mirror = VFlipTransform(size[0]) if vertical else HFlipTransform(size[1])
            result.append((mirror if flip else NoOpTransform(), size))
        return result


def _same_size(sizes: Sequence[Size]) -> Size:
    assert len(set(sizes)) == 1, "this step comes before any that gives frames different sizes"
    return sizes[0]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The same window out of every frame; ``size`` means what detectron2's INPUT.CROP.TYPE says.

    "absolute_range": height and width each uniform in [size[0], size[1]] pixels, capped by the frame.
    """

    kind: str
    size: tuple[float, float]

    def __post_init__(self) -> None:
        one_of(self.kind, CROPS, "INPUT.CROP.TYPE")
        low, high = self.size
        wrong = low <= 0 or high <= 0 or (self.kind == "absolute_range" and low > high)
        if wrong or (self.kind.startswith("relative") and max(self.size) > 1):
            raise ValueError(f"INPUT.CROP.SIZE {self.size} does not fit INPUT.CROP.TYPE {self.kind!r}.")

    def window(self, height: int, width: int, rng: np.random.Generator) -> Size:
        """Draws height and width of the window."""
        sides = np.array([height, width])
        if self.kind == "absolute_range":
            low, high = np.minimum(sides, self.size[0]), np.minimum(sides, self.size[1])
            window = rng.integers(low.astype(np.int64), high.astype(np.int64) + 1)
        elif self.kind == "absolute":
            window = np.minimum(sides, self.size)
        else:
            share = np.asarray(self.size, dtype=np.float64)
            if self.kind == "relative_range":
                share = share + rng.random(2) * (1 - share)
            window = np.maximum(sides * share + 0.5, 1)
        return int(window[0]), int(window[1])

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        height, width = _same_size(sizes)
        window = self.window(height, width, rng)
        top, left = rng.integers(height - window[0] + 1), rng.integers(width - window[1] + 1)
        transform = CropTransform(int(left), int(top), window[1], window[0], width, height)
        return [(transform, window)] * len(sizes)


@dataclass(frozen=True, kw_only=True)
class RandomApply:
    """All of ``steps`` or none of them, decided once per clip."""

    steps: tuple[Step, ...]
    probability: float = 0.5

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        if rng.random() >= self.probability:
            return [(NoOpTransform(), size) for size in sizes]
        return ClipAugmentation(steps=self.steps).draw(sizes, rng)


@dataclass(frozen=True, kw_only=True)
class EachFrame:
    """``steps`` drawn for every frame by itself, as if each were a clip."""

    steps: tuple[Step, ...]

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        augmentation = ClipAugmentation(steps=self.steps)
        return [drawn for size in sizes for drawn in augmentation.draw([size], rng)]


@dataclass(frozen=True, kw_only=True)
class SmoothRotation:
    """Rotation about one centre by angles that rise or fall through the clip; the frame keeps its size.

    T angles uniform in +-``max_angle`` degrees, sorted, reversed in half of the clips; centre uniform in the middle
    fifth (0.4 to 0.6 of height and width).
    """

    max_angle: float = 15.0

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        angles = np.sort(rng.uniform(-self.max_angle, self.max_angle, size=len(sizes)))
        if rng.random() < 0.5:
            angles = angles[::-1]
        x, y = rng.uniform(0.4, 0.6, size=2)
        return [
            (RotationTransform(*size, float(angle), expand=False, center=(x * size[1], y * size[0])), size)
            for size, angle in zip(sizes, angles, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Color:
    """Brightness, contrast or saturation by a factor drawn for each frame."""

    kind: str
    low: float = 0.9
    high: float = 1.1

    def __post_init__(self) -> None:
        one_of(self.kind, COLOR_KINDS, "INPUT.AUGMENTATIONS")

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        factors = rng.uniform(self.low, self.high, size=len(sizes))
        return [
            (ColorTransform(kind=self.kind, factor=float(factor)), size)
            for size, factor in zip(sizes, factors, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class ResizeScale:
    """Fits the frame into a square of ``target * s`` pixels, s uniform in [min_scale, max_scale], once per clip.

    The first half of large-scale jitter (Ghiasi et al., "Simple Copy-Paste ...", 2021).
    """

    min_scale: float
    max_scale: float
    target: int

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale or self.target < 1:
            raise ValueError(
                f"Large-scale jitter needs 0 < MIN_SCALE <= MAX_SCALE and IMAGE_SIZE >= 1, found "
                f"{self.min_scale}, {self.max_scale} and {self.target}."
            )

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        side = self.target * rng.uniform(self.min_scale, self.max_scale)
        result: Drawn = []
        for size in sizes:
            scale = side / max(size)
            result.append(_resize(size, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))))
        return result


@dataclass(frozen=True, kw_only=True)
class FixedSizeCrop:
    """Crops what is larger than ``size`` x ``size`` at a random place and pads what is smaller at the right and below.

    Padding is grey (``pad_value``) and belongs to no instance. The second half of large-scale jitter.
    """

    size: int
    pad_value: float = 128.0

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        height, width = _same_size(sizes)
        kept = min(height, self.size), min(width, self.size)
        room = np.array([height - kept[0], width - kept[1]])
        top, left = (int(value) for value in np.round(room * rng.random(2)))
        transforms: list[Transform] = [CropTransform(left, top, kept[1], kept[0], width, height)]
        pad_height, pad_width = self.size - kept[0], self.size - kept[1]
        if pad_height or pad_width:
            transforms.append(
                PadTransform(0, 0, pad_width, pad_height, kept[1], kept[0], self.pad_value, seg_pad_value=0)
            )
        return [(TransformList(transforms), (self.size, self.size))] * len(sizes)


@dataclass(frozen=True, kw_only=True)
class ClipAugmentation:
    """Steps in order; usable as a step itself."""

    steps: tuple[Step, ...]

    def draw(self, sizes: Sequence[Size], rng: np.random.Generator) -> Drawn:
        """See :class:`Step`."""
        current = list(sizes)
        chains: list[list[Transform]] = [[] for _ in sizes]
        for step in self.steps:
            drawn = step.draw(current, rng)
            current = [size for _, size in drawn]
            for chain, (transform, _) in zip(chains, drawn, strict=True):
                chain.append(transform)
        return [(TransformList(chain), size) for chain, size in zip(chains, current, strict=True)]

    def __call__(self, height: int, width: int, num_frames: int, rng: np.random.Generator) -> list[TransformList]:
        """One transform for each of ``num_frames`` frames of ``height`` x ``width`` pixels."""
        return [transform for transform, _ in self.draw([(height, width)] * num_frames, rng)]
