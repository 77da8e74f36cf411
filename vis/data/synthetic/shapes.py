"""Silhouettes and surface textures of the six classes, in an object's own coordinates.

`u` and `v` are float32 arrays of one shape; the circle around a silhouette has radius 1. Only additions,
multiplications, divisions, comparisons and `floor` touch pixels: IEEE 754 rounds those the same way everywhere, so
pictures are equal bit for bit on every machine (sines of library functions would not be).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def exact(value: float) -> float:
    """`value` rounded to six decimals, so that the last bits of a machine's sine or cosine never matter."""
    return round(value, 6)


def _normals(count: int, first: float) -> list[tuple[float, float]]:
    angles = [first + 2 * math.pi * k / count for k in range(count)]
    return [(exact(math.cos(a)), exact(math.sin(a))) for a in angles]


_TRIANGLE = _normals(3, math.pi / 2)
_STAR = _normals(5, math.pi / 2)
_STAR_INRADIUS = 0.37  # distance of a pentagram's five lines from its centre; tips are at 0.37 / cos(72 deg) = 1.2


def _disc(u: Floats, v: Floats) -> Bools:
    return u * u + v * v < 0.88


def _square(u: Floats, v: Floats) -> Bools:
    return np.maximum(np.abs(u), np.abs(v)) < 0.8


def _triangle(u: Floats, v: Floats) -> Bools:
    inside = np.ones(u.shape, dtype=bool)
    for x, y in _TRIANGLE:
        inside &= u * np.float32(x) + v * np.float32(y) < 0.58
    return inside


def _star(u: Floats, v: Floats) -> Bools:
    # A pentagram is where at most one of its five lines is crossed.
    crossed = np.zeros(u.shape, dtype=np.int8)
    for x, y in _STAR:
        crossed += u * np.float32(x) + v * np.float32(y) > _STAR_INRADIUS
    return crossed <= 1


def _ring(u: Floats, v: Floats) -> Bools:
    square = u * u + v * v
    return (square < 0.98) & (square > 0.24)


def _cross(u: Floats, v: Floats) -> Bools:
    a, b = np.abs(u), np.abs(v)
    return (np.maximum(a, b) < 0.95) & (np.minimum(a, b) < 0.36)


def _fraction(x: Floats) -> Floats:
    return x - np.floor(x)


def _rings(u: Floats, v: Floats, f: float, grain: Floats) -> Floats:
    # Equal steps of the squared radius: rings get thinner outwards, as on a target seen through a lens.
    return (_fraction((u * u + v * v) * np.float32(f)) < 0.5).astype(np.float32)


def _checker(u: Floats, v: Floats, f: float, grain: Floats) -> Floats:
    total = np.floor(u * np.float32(f)) + np.floor(v * np.float32(f))
    return (_fraction(total * np.float32(0.5)) > 0.25).astype(np.float32)


def _stripes(u: Floats, v: Floats, f: float, grain: Floats) -> Floats:
    return (_fraction(u * np.float32(f)) < 0.5).astype(np.float32)


def _gradient(u: Floats, v: Floats, f: float, grain: Floats) -> Floats:
    return np.clip(u * np.float32(0.55) + np.float32(0.5), 0, 1).astype(np.float32)


def _grain(u: Floats, v: Floats, f: float, grain: Floats) -> Floats:
    size = grain.shape[0]
    row = np.floor((v + 2) * np.float32(1.7 * f)).astype(np.int64) % size
    column = np.floor((u + 2) * np.float32(1.7 * f)).astype(np.int64) % size
    return np.asarray(grain[row, column], dtype=np.float32)


def _dots(u: Floats, v: Floats, f: float, grain: Floats) -> Floats:
    a = _fraction(u * np.float32(f)) - np.float32(0.5)
    b = _fraction(v * np.float32(f)) - np.float32(0.5)
    return (a * a + b * b < 0.1).astype(np.float32)


SHAPES: dict[str, Callable[[Floats, Floats], Bools]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
"""Class name -> (u, v) -> inside."""

TEXTURES: dict[str, Callable[[Floats, Floats, float, Floats], Floats]] = {
    "disc": _rings,
    "square": _checker,
    "triangle": _stripes,
    "star": _gradient,
    "ring": _grain,
    "cross": _dots,
}
"""Class name -> (u, v, periods per radius, (G, G) random table) -> blend between an object's two colours, 0..1."""

EXTENT = 1.22
"""No silhouette reaches farther than this from its centre, in radii."""

OPAQUE: tuple[str, ...] = ("disc", "square")
"""Classes without holes or bays: the ones that can hide another object for long."""
