"""Areas of a recording: a pixel whose logit is zero but for rounding is nobody's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vis.engine.parity.outputs import _check_areas, _undecided_pixels

FRAMES = (2, 3, 8, 12)  # T, 3, H, W


def logits() -> torch.Tensor:
    """(Q, T, H/4, W/4) far from zero, but for the second query's second frame, which is near it in one corner."""
    maps = torch.full((3, 2, 2, 3), 20.0)
    maps[0] = -30.0
    maps[1, 1, 0, 0] = 5e-6
    return maps


def test_undecided_pixels() -> None:
    found = _undecided_pixels(logits(), FRAMES)
    assert found is not None
    assert found.tolist() == [[0, 0], [0, 4], [0, 0]]  # the corner of 2x2 pixels that see no other cell
    assert _undecided_pixels(None, FRAMES) is None
    assert _undecided_pixels(logits()[0], FRAMES) is None
    assert _undecided_pixels(logits(), (2, 3, 40, 48)) is None  # of another size: nothing is known


@pytest.mark.parametrize(
    ("found", "slack", "wrong", "rounded"),
    [
        ([[9, 7], [9, 6], [4, 4]], 0, 0, 0),
        ([[9, 6], [9, 7], [4, 4]], 0, 0, 0),  # the first two are a tie: any order
        ([[4, 4], [9, 6], [9, 7]], 0, 2, 0),
        ([[9, 7], [9, 8], [4, 4]], 0, 1, 0),
        ([[9, 8], [9, 6], [4, 4]], 1, 0, 1),
        ([[9, 6], [9, 8], [4, 4]], 1, 0, 1),
        ([[9, 7], [9, 6], [4, 6]], 1, 1, 0),
    ],
)
def test_slack(found: list[list[int]], slack: int, wrong: int, rounded: int) -> None:
    expected, groups = np.array([[9, 7], [9, 6], [4, 4]]), np.array([0, 0, 1])
    check = _check_areas(np.array(found), expected, groups, np.full((3, 2), slack))
    assert check.ok == (wrong == 0)
    assert (f"{wrong} of 3 tracks differ" in check.detail) == (wrong > 0)
    said = f"NOT EQUAL in {rounded} of 3 tracks, by up to {slack} pixels, all within rounding of a zero logit"
    assert (said in check.detail) == (rounded > 0)
    assert (check.detail == "equal in 3 tracks") == (wrong == rounded == 0)
