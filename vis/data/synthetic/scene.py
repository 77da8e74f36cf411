"""Draws one random clip: objects, their paths, the camera and the background. Pure functions of a random generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vis.data.synthetic.presets import CATEGORIES, Preset
from vis.data.synthetic.shapes import EXTENT, OPAQUE, Floats, exact

Colors = NDArray[np.float32]


@dataclass(frozen=True)
class Curve:
    """A smooth curve through `knots` (K, D), one every `spacing` frames (Catmull-Rom; polynomials only)."""

    knots: NDArray[np.float64]
    spacing: float

    def __call__(self, time: float) -> NDArray[np.float64]:
        """The point (D,) at `time`; before the first and after the last knot the curve rests."""
        last = len(self.knots) - 1
        position = min(max(time / self.spacing, 0.0), float(last))
        k = min(int(position), last - 1)
        s = position - k
        p0, p1, p2, p3 = (self.knots[min(max(i, 0), last)] for i in (k - 1, k, k + 1, k + 2))
        bend = 2 * p0 - 5 * p1 + 4 * p2 - p3
        twist = 3 * (p1 - p2) + p3 - p0
        value: NDArray[np.float64] = p1 + 0.5 * s * ((p2 - p0) + s * (bend + s * twist))
        return value


@dataclass(frozen=True)
class Pose:
    """Where an object is at one instant: centre (pixels), radius (pixels), cosine and sine of its rotation."""

    x: float
    y: float
    radius: float
    cos: float
    sin: float


@dataclass(frozen=True)
class SceneObject:
    """One object of a clip. `depth` orders overlaps: larger is nearer. `colors` (2, 3) in 0..255."""

    category: str
    depth: int
    radius: float
    stretch: float
    path: Curve  # (x, y) in the picture while the camera rests
    scale: Curve  # (1,)
    angle: float
    turn: float
    colors: Colors
    frequency: float
    shift: tuple[float, float]  # of the texture under the silhouette
    grain: Floats

    def pose(self, time: float, camera: NDArray[np.float64]) -> Pose:
        """The object at `time` seen by a camera moved by `camera` (x, y) pixels."""
        x, y = self.path(time) - camera
        angle = self.angle + self.turn * time
        return Pose(
            x=exact(float(x)),
            y=exact(float(y)),
            radius=exact(self.radius * float(self.scale(time)[0])),
            cos=exact(math.cos(angle)),
            sin=exact(math.sin(angle)),
        )


@dataclass(frozen=True)
class Scene:
    """One clip before rendering. `canvas` is the background at twice the picture's resolution, with a border of `pad`
    pixels (of the picture) for the camera to move in."""

    height: int
    width: int
    length: int
    objects: tuple[SceneObject, ...]
    camera: Curve
    shutter: float
    canvas: Floats
    pad: int
    blur: tuple[int, ...]  # passes of defocus blur per frame


def make_scene(preset: Preset, rng: np.random.Generator, index: int) -> Scene:
    """Draw clip `index` of `preset`. Everything random comes from `rng`; the index only sets the first object's class,
    so that six clips in a row hold every class."""
    length = int(rng.integers(preset.length[0], preset.length[1] + 1))
    count = int(rng.integers(preset.objects[0], preset.objects[1] + 1))
    knots = math.ceil((length - 1) / preset.knot_spacing) + 1
    upper = preset.radius[1] if count < 3 else preset.crowded_radius
    radii = [float(rng.uniform(preset.radius[0], upper)) for _ in range(count)]
    categories = _draw_categories(preset, rng, count, CATEGORIES[index % len(CATEGORIES)])
    depths = [int(d) for d in rng.permutation(count)]
    paths: list[NDArray[np.float64]] = []
    for radius in radii:
        paths.append(_free_path(preset, rng, knots, radius, paths, radii))
    if preset.scripted:
        _script(preset, rng, paths, radii, categories, depths)
    camera = rng.uniform(-preset.pan, preset.pan, (knots, 2))
    pad = math.ceil(preset.pan * 1.5) + 2
    objects = tuple(
        _make_object(preset, rng, categories[i], depths[i], radii[i], Curve(paths[i], preset.knot_spacing), knots)
        for i in range(count)
    )
    return Scene(
        height=preset.height,
        width=preset.width,
        length=length,
        objects=objects,
        camera=Curve(camera, preset.knot_spacing),
        shutter=float(rng.uniform(0.0, preset.shutter)),
        canvas=make_background(rng, 2 * (preset.height + 2 * pad), 2 * (preset.width + 2 * pad)),
        pad=pad,
        blur=_defocus(rng, length),
    )


def _draw_categories(preset: Preset, rng: np.random.Generator, count: int, first: str) -> list[str]:
    names = [first]
    for _ in range(count - 1):
        if rng.random() < preset.same_class:
            names.append(names[int(rng.integers(len(names)))])
        else:
            names.append(CATEGORIES[int(rng.integers(len(CATEGORIES)))])
    return names


def _defocus(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    """Passes of blur per frame: most clips stay sharp, in some the focus is lost for a while."""
    passes = [0] * length
    if rng.random() < 0.3:
        start = int(rng.integers(length))
        for t in range(start, min(length, start + max(2, length // 4))):
            passes[t] = int(rng.integers(1, 3))
    return tuple(passes)


def _fold(value: float, low: float, high: float) -> float:
    """`value` reflected at the two borders until it lies between them: a bounce."""
    while not low <= value <= high:
        value = 2 * low - value if value < low else 2 * high - value
    return value


def _walk(preset: Preset, rng: np.random.Generator, knots: int, radius: float) -> NDArray[np.float64]:
    """Turning points (knots, 2) of an object that keeps its direction roughly and bounces at the border."""
    margin = 0.9 * radius
    x = float(rng.uniform(margin, preset.width - margin))
    y = float(rng.uniform(margin, preset.height - margin))
    dx, dy = _direction(rng)
    points = [(x, y)]
    for _ in range(knots - 1):
        ax, ay = _direction(rng)
        dx, dy = 0.6 * dx + 0.4 * ax, 0.6 * dy + 0.4 * ay
        size = float(rng.uniform(*preset.step)) / max(math.sqrt(dx * dx + dy * dy), 0.1)
        new_x, new_y = x + size * dx, y + size * dy
        x, y = _fold(new_x, margin, preset.width - margin), _fold(new_y, margin, preset.height - margin)
        dx, dy = (dx if x == new_x else -dx), (dy if y == new_y else -dy)
        points.append((x, y))
    return np.array(points, dtype=np.float64)


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    angle = float(rng.uniform(0, 2 * math.pi))
    return exact(math.cos(angle)), exact(math.sin(angle))


def _free_path(
    preset: Preset,
    rng: np.random.Generator,
    knots: int,
    radius: float,
    others: list[NDArray[np.float64]],
    radii: list[float],
) -> NDArray[np.float64]:
    """The one of a few random paths that comes least close to the paths drawn before."""
    best, best_cost = None, math.inf
    for _ in range(preset.path_candidates):
        path = _walk(preset, rng, knots, radius)
        cost = 0.0
        for other, other_radius in zip(others, radii, strict=False):
            gap = path - other
            distance = np.sqrt(gap[:, 0] * gap[:, 0] + gap[:, 1] * gap[:, 1])
            cost += sum(max(0.0, 1.0 - float(d) / (radius + other_radius)) for d in distance)
        if cost < best_cost:
            best, best_cost = path, cost
    if best is None:
        raise ValueError(f"path_candidates of preset {preset.name!r} is {preset.path_candidates}; expected at least 1.")
    return best


def _script(
    preset: Preset,
    rng: np.random.Generator,
    paths: list[NDArray[np.float64]],
    radii: list[float],
    categories: list[str],
    depths: list[int],
) -> None:
    """Bend the paths of the first three objects: 0 leaves and returns, 1 is hidden by 2 for long, 0 and 1 cross."""
    knots = len(paths[0])
    leave = int(rng.integers(2, knots - 3)) if knots > 5 else knots // 2
    _leave_and_return(preset, rng, paths[0], radii[0], leave)

    # The occluder is opaque, larger and nearer; both rest together for three knots, with a small drift between them.
    categories[2] = OPAQUE[int(rng.integers(len(OPAQUE)))]
    radii[2] = max(radii[2], min(1.35 * radii[1], preset.radius[1]))
    radii[1] = min(radii[1], radii[2] / 1.3)
    if depths[2] < depths[1]:
        depths[1], depths[2] = depths[2], depths[1]
    start = int(rng.integers(2, knots - 2)) if knots > 4 else 1
    for k in range(start, min(start + 3, knots)):
        drift = rng.uniform(-0.2, 0.2, 2) * radii[1]
        paths[1][k] = paths[2][k] + drift

    # Objects 0 and 1 swap places over the first two knots: they meet in the middle.
    paths[1][0] = paths[0][1]
    paths[1][1] = paths[0][0]


def _leave_and_return(
    preset: Preset, rng: np.random.Generator, path: NDArray[np.float64], radius: float, first: int
) -> None:
    """Move the knots `first` and `first + 1` of `path` outside the nearest vertical border, in place."""
    beyond = EXTENT * radius * (1 + preset.scale_change) + preset.pan + 4.0
    left = path[first - 1, 0] < preset.width / 2
    for k in (first, first + 1):
        away = beyond + float(rng.uniform(0, 4))
        path[k, 0] = -away if left else preset.width + away


def _make_object(
    preset: Preset,
    rng: np.random.Generator,
    category: str,
    depth: int,
    radius: float,
    path: Curve,
    knots: int,
) -> SceneObject:
    scale = rng.uniform(1 - preset.scale_change, 1 + preset.scale_change, (knots, 1))
    return SceneObject(
        category=category,
        depth=depth,
        radius=radius,
        stretch=float(rng.uniform(0.9, 1.1)),
        path=path,
        scale=Curve(scale, preset.knot_spacing),
        angle=float(rng.uniform(0, 2 * math.pi)),
        turn=float(rng.uniform(-preset.turn, preset.turn)),
        colors=_object_colors(rng),
        frequency=exact(float(rng.uniform(1.7, 2.4))),
        shift=(exact(float(rng.uniform(0, 1))), exact(float(rng.uniform(0, 1)))),
        grain=rng.integers(0, 2, (8, 8)).astype(np.float32),
    )


def _luminance(color: Colors) -> float:
    red, green, blue = color.tolist()  # NumPy 1 and 2 would give sums of NumPy scalars different precision
    return float(0.3 * red + 0.6 * green + 0.1 * blue)


def _object_colors(rng: np.random.Generator) -> Colors:
    """Two saturated colours (2, 3), one clearly lighter, in random order."""
    pair: list[Colors] = []
    for low, high in ((15.0, 100.0), (150.0, 235.0)):
        while True:
            color = rng.integers(0, 256, 3).astype(np.float32)
            if low <= _luminance(color) <= high and float(color.max() - color.min()) > 80:
                break
        pair.append(color)
    if rng.random() < 0.5:
        pair.reverse()
    return np.stack(pair)


def _interpolate(grid: Floats, size: int) -> Floats:
    """(G, M) -> (size, M): smooth interpolation along the first axis."""
    position = np.arange(size, dtype=np.float32) * np.float32((len(grid) - 1) / size)
    low = np.floor(position).astype(np.int64)
    f = (position - low)[:, None]
    f = f * f * (3 - 2 * f)
    return np.asarray(grid[low] * (1 - f) + grid[low + 1] * f, dtype=np.float32)


def smooth_noise(rng: np.random.Generator, height: int, width: int, octaves: tuple[int, ...]) -> Floats:
    """(height, width) noise in 0..1, a sum of smooth random fields whose cells shrink from one octave to the next."""
    total = np.zeros((height, width), dtype=np.float32)
    weight, weights = 1.0, 0.0
    for cells in octaves:
        grid = rng.random((cells + 1, cells * width // height + 2)).astype(np.float32)
        total += np.float32(weight) * _interpolate(_interpolate(grid, height).T.copy(), width).T
        weights += weight
        weight *= 0.5
    return total / np.float32(weights)


def make_background(rng: np.random.Generator, height: int, width: int) -> Floats:
    """(height, width, 3) in 0..255: noise between three muted colours, a gradient, and a patch of faint pattern.

    The patch has a random outline and shares its patterns with the objects, so that texture alone does not give them
    away.
    """
    colors = rng.uniform(50, 200, (3, 1)).astype(np.float32) + rng.uniform(-35, 35, (3, 3)).astype(np.float32)
    first = smooth_noise(rng, height, width, (3, 6, 12, 24))[..., None]
    second = smooth_noise(rng, height, width, (2, 5, 10))[..., None]
    second = np.clip(second * 2 - np.float32(0.5), 0, 1)
    canvas = (colors[0] * (1 - first) + colors[1] * first) * (1 - second) + colors[2] * second
    slope_x, slope_y = rng.uniform(-30, 30, 2)
    canvas += np.float32(slope_x) * (np.arange(width, dtype=np.float32) / width - np.float32(0.5))[None, :, None]
    canvas += np.float32(slope_y) * (np.arange(height, dtype=np.float32) / height - np.float32(0.5))[:, None, None]

    patch = smooth_noise(rng, height, width, (3, 7)) > 0.58
    period = int(rng.integers(8, 17))
    row = np.arange(height)[:, None] // period
    column = np.arange(width)[None, :] // period
    patterns = ((row + column) % 2, row % 2 + 0 * column, column % 2 + 0 * row, (row % 2) * (column % 2))
    pattern = patterns[int(rng.integers(len(patterns)))]
    strength = float(rng.uniform(10, 30))
    canvas += np.where(patch & (pattern == 1), np.float32(strength), np.float32(0))[..., None]
    return np.clip(canvas, 0, 255).astype(np.float32)
