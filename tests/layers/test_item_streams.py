"""Random numbers by the place in the batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from vis.layers.item_streams import item_seed, of_item, part_streams


def drawn(first: int, clips: int, frames: int = 1, iteration: int = 3, seed: int = 5) -> list[Tensor]:
    """What the frames of a part draw, in two rounds over them."""
    rounds = []
    with part_streams(seed=seed, iteration=iteration, first=first, clips=clips):
        for _ in range(2):
            items = []
            for item in range(clips * frames):
                with of_item(item, clips * frames):
                    items.append(torch.rand(2))
            rounds.append(items)
    return [torch.cat(pair) for pair in zip(*rounds, strict=True)]


@pytest.mark.parametrize("frames", [1, 3])
def test_parts_of_any_size_draw_the_same(frames: int) -> None:
    whole = drawn(0, 4, frames)
    parts = [number for first in (0, 1) for number in drawn(2 * first, 2, frames)]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert len({tuple(numbers.tolist()) for numbers in whole}) == 4 * frames
    assert all((numbers[:2] != numbers[2:]).all() for numbers in whole), "a stream goes on"


def test_iteration_and_seed_decide() -> None:
    assert torch.equal(drawn(0, 1)[0], drawn(0, 1)[0])
    assert not torch.equal(drawn(0, 1)[0], drawn(0, 1, iteration=4)[0])
    assert not torch.equal(drawn(0, 1)[0], drawn(0, 1, seed=6)[0])


def test_the_stream_of_the_part_is_not_touched_by_items() -> None:
    def of_part(switch: bool) -> tuple[list[float], float, float]:
        with part_streams(seed=1, iteration=0, first=2, clips=2):
            numbers = torch.rand(2).tolist()
            if switch:
                with of_item(1, 2):
                    torch.rand(9)
            return [*numbers, *torch.rand(2).tolist()], random.random(), float(np.random.rand())

    assert of_part(True) == of_part(False)


def test_an_item_of_an_item() -> None:
    with part_streams(seed=1, iteration=0, first=0, clips=2):
        with of_item(0, 2):
            first = torch.rand(1), torch.rand(1)
        second = item_seed(1, 2)
    with part_streams(seed=1, iteration=0, first=0, clips=2), of_item(0, 2):
        with of_item(1, 3):
            assert torch.equal(torch.rand(1), first[0])
        assert torch.equal(torch.rand(1), first[1])
    with part_streams(seed=1, iteration=0, first=1, clips=1):
        assert item_seed(0, 1) == second


def test_outside_of_a_training_nothing_is_switched() -> None:
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    with of_item(7, 9):
        one = torch.rand(1)
    assert torch.equal(torch.cat([one, torch.rand(1)]), expected)
    assert item_seed(0, 1) is None
