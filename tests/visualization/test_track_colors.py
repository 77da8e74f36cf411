from __future__ import annotations

import numpy as np
import pytest

from vis.visualization import track_color
from vis.visualization.colors import text_color


def lab(color: tuple[int, int, int]) -> np.ndarray:
    """sRGB to CIELAB (D65), written out: the distance there is about what the eye sees."""
    rgb = np.asarray(color) / 255.0
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(matrix @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_a_colour_belongs_to_an_id() -> None:
    # Written down: these are the colours of every run on every machine.
    assert [track_color(number) for number in (0, 1, 39)] == [(242, 36, 36), (25, 255, 25), (255, 166, 188)]
    assert track_color(np.int64(3)) == track_color(3)
    assert track_color(40) == track_color(0)


def test_colours_differ_and_neighbours_most() -> None:
    points = np.stack([lab(track_color(number)) for number in range(44)])
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
    first, second = np.triu_indices(40, k=1)
    assert gaps[first, second].min() > 20
    assert min(gaps[i, i + k] for i in range(40) for k in range(1, 5)) > 40


@pytest.mark.parametrize("number", range(40))
def test_text_can_be_read_on_every_colour(number: int) -> None:
    def luminance(color: tuple[int, int, int]) -> float:
        return float(np.dot([0.2126, 0.7152, 0.0722], (np.asarray(color) / 255.0) ** 2.2))

    color = track_color(number)
    bright, dark = sorted((luminance(color), luminance(text_color(color))), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) > 4.5  # the contrast that WCAG 2 asks of small text
