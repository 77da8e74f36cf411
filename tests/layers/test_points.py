from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vis.layers.points import sample_points, uncertain_points


def read(grid: Tensor, x: float, y: float) -> float:
    """Bilinear sample of (h, w) at (x, y) in 0..1, by the definition."""
    height, width = grid.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += float(grid[i, j]) * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def test_sampling_by_the_definition() -> None:
    torch.manual_seed(0)
    maps, points = torch.randn(2, 3, 5, 7), torch.rand(2, 11, 2) * 1.4 - 0.2
    found = sample_points(maps, points)
    assert found.shape == (2, 3, 11)
    for r in range(2):
        for c in range(3):
            for p in range(11):
                x, y = points[r, p].tolist()
                assert float(found[r, c, p]) == pytest.approx(read(maps[r, c], x, y), abs=1e-4)


def test_uncertain_share_and_ranges() -> None:
    """A ramp whose sign changes at x = 0.3: kept points crowd there, the others do not."""
    torch.manual_seed(1)
    rows, width, count = 3, 40, 400
    ramp = (torch.arange(width) + 0.5) / width - 0.3
    logits = ramp.expand(rows, 9, width).clone().requires_grad_()
    points = uncertain_points(logits, count, 3.0, 0.75)
    assert points.shape == (rows, count, 2)
    assert not points.requires_grad
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1
    distance = (points[..., 0] - 0.3).abs()
    # The nearest 300 of 1200 uniform points lie within 0.125 of the edge, where chance puts a quarter of the others.
    # (A few lie elsewhere: at the top and bottom border half of a sample is zero.)
    assert float(distance[:, :300].quantile(0.9)) < 0.14
    assert 0.15 < float((distance[:, 300:] < 0.125).float().mean()) < 0.35
    assert points[:, :, 1].std() > 0.25
    assert not torch.equal(points[0], points[1])  # every mask has its own


@pytest.mark.parametrize(("share", "near"), [(0.0, 0.25), (1.0, 1.0)])
def test_extreme_shares(share: float, near: float) -> None:
    torch.manual_seed(2)
    logits = ((torch.arange(64) + 0.5) / 64 - 0.5).expand(1, 8, 64)
    points = uncertain_points(logits, 300, 4.0, share)
    assert points.shape == (1, 300, 2)
    assert float(((points[..., 0] - 0.5).abs() < 0.14).float().mean()) == pytest.approx(near, abs=0.1)


def test_no_mask_gives_no_points() -> None:
    assert uncertain_points(torch.zeros(0, 4, 6), 12, 3.0, 0.75).shape == (0, 12, 2)
