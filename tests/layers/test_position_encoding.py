from __future__ import annotations

import math

import pytest
import torch

from vis.layers.position_encoding import sine_position_encoding

CPU = torch.device("cpu")


def test_follows_the_formula() -> None:
    height, width, channels = 3, 5, 12
    found = sine_position_encoding(height, width, channels, CPU)
    assert found.shape == (1, channels, height, width)
    assert found.dtype == torch.float32
    half = channels // 2
    for row in range(height):
        for column in range(width):
            for axis, (position, size) in enumerate(((row + 1, height), (column + 1, width))):
                for i in range(half):
                    angle = position / (size + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / half)
                    wanted = math.cos(angle) if i % 2 else math.sin(angle)
                    assert float(found[0, axis * half + i, row, column]) == pytest.approx(wanted, abs=1e-5)


def test_computed_once_per_size() -> None:
    first = sine_position_encoding(4, 7, 8, CPU)
    assert sine_position_encoding(4, 7, 8, CPU) is first
    assert sine_position_encoding(7, 4, 8, CPU).shape == (1, 8, 7, 4)


def test_made_under_inference_mode_serves_training_too() -> None:
    with torch.inference_mode():
        pos = sine_position_encoding(2, 11, 4, CPU)
    weight = torch.ones(4, requires_grad=True)
    (pos.flatten(2).transpose(1, 2) * weight).sum().backward()  # multiplication keeps both factors for the gradient
    assert weight.grad is not None


def test_channels_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        sine_position_encoding(2, 3, 6, CPU)
