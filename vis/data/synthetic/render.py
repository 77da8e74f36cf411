"""Scene -> pictures, visible masks and visible fractions.

Every pixel is the mean of four samples that differ in place (a 2 x 2 grid: smooth edges) and in time (spread over the
exposure: motion blur). The same samples give the masks, so that masks and pixels agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vis.data.synthetic.scene import Pose, Scene, SceneObject
from vis.data.synthetic.shapes import EXTENT, SHAPES, TEXTURES, Bools, Floats

# (row, column) of the sample inside its pixel in halves, and its place in time; neighbours are not successive in time.
_SAMPLES = ((0, 0, -0.5), (0, 1, 0.25), (1, 0, 0.0), (1, 1, -0.25))
_RIM = 0.84  # silhouettes shrunk to this keep their texture; what is left around is a darker rim


@dataclass(frozen=True)
class Frame:
    """One rendered frame of a scene with N objects (in the order of `scene.objects`).

    `image` (H, W, 3) uint8 RGB; `masks` (N, H, W) bool, visible parts, disjoint; `visible` (N,) float64, the seen part
    of each silhouette within the picture, 0 where it is outside; `silhouettes` (N,) int64, the samples (four per pixel)
    of each whole silhouette within the picture.
    """

    image: NDArray[np.uint8]
    masks: Bools
    visible: NDArray[np.float64]
    silhouettes: NDArray[np.int64]


def render_frame(scene: Scene, index: int) -> Frame:
    """Render frame `index` (0 <= index < scene.length) of `scene`."""
    times = [index + scene.shutter * s[2] for s in _SAMPLES]
    cameras = [scene.camera(t) for t in times]
    color, label = _background(scene, cameras), np.full((4, scene.height, scene.width), -1, dtype=np.int8)
    silhouettes = np.zeros(len(scene.objects), dtype=np.int64)
    far_to_near = sorted(range(len(scene.objects)), key=lambda k: scene.objects[k].depth)
    for k in far_to_near:
        poses = [scene.objects[k].pose(t, c) for t, c in zip(times, cameras, strict=True)]
        silhouettes[k] = _draw(scene.objects[k], poses, k, color, label)
    # floor(x + 0.5) instead of round(): plain IEEE operations only.
    mean = (color[0] + color[1] + color[2] + color[3]) * np.float32(0.25)
    image = np.floor(mean + np.float32(0.5)).astype(np.uint8)
    for _ in range(scene.blur[index]):
        image = _soften(image)
    # A pixel belongs to whatever has most of its samples; of two that have as many, to the nearer one.
    near_to_far = [*reversed(far_to_near), -1]
    counts = np.stack([(label == k).sum(axis=0) for k in near_to_far])
    winner = np.array(near_to_far)[counts.argmax(axis=0)]
    masks = np.stack([winner == k for k in range(len(scene.objects))])
    seen = np.bincount(label.reshape(-1) + 1, minlength=len(scene.objects) + 1)[1:]
    return Frame(image=image, masks=masks, visible=seen / np.maximum(silhouettes, 1), silhouettes=silhouettes)


def _background(scene: Scene, cameras: list[NDArray[np.float64]]) -> Floats:
    """(4, H, W, 3): the canvas at the camera's place, one slice per sample."""
    color = np.empty((4, scene.height, scene.width, 3), dtype=np.float32)
    for s, (row, column, _) in enumerate(_SAMPLES):
        top = 2 * scene.pad + math.floor(2 * float(cameras[s][1]) + 0.5) + row
        left = 2 * scene.pad + math.floor(2 * float(cameras[s][0]) + 0.5) + column
        color[s] = scene.canvas[top : top + 2 * scene.height : 2, left : left + 2 * scene.width : 2]
    return color


def _draw(item: SceneObject, poses: list[Pose], number: int, color: Floats, label: NDArray[np.int8]) -> int:
    """Paint `item` over `color` (4, H, W, 3) and `label` (4, H, W), in place; returns the samples of its silhouette."""
    height, width = label.shape[1:]
    reach = [EXTENT * p.radius * max(item.stretch, 1 / item.stretch) + 1 for p in poses]
    top = max(0, math.floor(min(p.y - r for p, r in zip(poses, reach, strict=True))))
    left = max(0, math.floor(min(p.x - r for p, r in zip(poses, reach, strict=True))))
    bottom = min(height, math.ceil(max(p.y + r for p, r in zip(poses, reach, strict=True))))
    right = min(width, math.ceil(max(p.x + r for p, r in zip(poses, reach, strict=True))))
    if top >= bottom or left >= right:
        return 0
    u, v = _local(item, poses, (top, bottom, left, right))
    inside = SHAPES[item.category](u, v)
    grown = np.float32(1 / _RIM)
    core = inside & SHAPES[item.category](u * grown, v * grown)
    blend = TEXTURES[item.category](
        u + np.float32(_texture_shift(item, 0)), v + np.float32(_texture_shift(item, 1)), item.frequency, item.grain
    )[inside][:, None]
    paint = item.colors[0] * (1 - blend) + item.colors[1] * blend
    paint *= np.where(core[inside], np.float32(1), np.float32(0.45))[:, None]
    color[:, top:bottom, left:right][inside] = paint
    label[:, top:bottom, left:right][inside] = number
    return int(inside.sum())


def _texture_shift(item: SceneObject, axis: int) -> float:
    # Rings and the gradient belong to the centre; patterns that repeat start anywhere.
    return 0.0 if item.category in ("disc", "star") else item.shift[axis]


def _local(item: SceneObject, poses: list[Pose], box: tuple[int, int, int, int]) -> tuple[Floats, Floats]:
    """(u, v), both (4, h, w) float32: the samples of the pixels in `box` in the object's own coordinates."""
    top, bottom, left, right = box
    y = np.arange(top, bottom, dtype=np.float32)[:, None]
    x = np.arange(left, right, dtype=np.float32)[None, :]
    u = np.empty((4, bottom - top, right - left), dtype=np.float32)
    v = np.empty_like(u)
    for s, (row, column, _) in enumerate(_SAMPLES):
        p = poses[s]
        dx = x + np.float32(0.25 + 0.5 * column - p.x)
        dy = y + np.float32(0.25 + 0.5 * row - p.y)
        u[s] = dx * np.float32(p.cos / (p.radius * item.stretch)) + dy * np.float32(p.sin / (p.radius * item.stretch))
        v[s] = dy * np.float32(p.cos * item.stretch / p.radius) - dx * np.float32(p.sin * item.stretch / p.radius)
    return u, v


def _soften(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One pass of the 3 x 3 binomial filter in integers; the border repeats."""
    wide = np.pad(image.astype(np.uint16), ((1, 1), (1, 1), (0, 0)), mode="edge")
    wide = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    wide = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    return ((wide + 8) // 16).astype(np.uint8)
