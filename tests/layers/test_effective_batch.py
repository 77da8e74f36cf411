"""What sums are divided by where a batch is spread."""

from __future__ import annotations

import pytest
import torch

from vis.layers.effective_batch import EffectiveBatch, effective_mean, effective_mean_of_items

CPU = torch.device("cpu")


def test_one_part_is_divided_by_its_own_count() -> None:
    assert float(effective_mean("a", 6)) == 6
    assert float(effective_mean("a", 0)) == 1
    assert effective_mean("a", torch.tensor([3, 0]), minimum=0.5).tolist() == [3, 0.5]
    assert effective_mean_of_items("a", [4, 2], CPU).tolist() == [4, 2], "of each item alone, as released"


def test_steps_are_divided_by_their_mean() -> None:
    batch = EffectiveBatch(steps=2)
    batch.announce({"a": 3, "b": [2.0, 4.0]})
    batch.announce({"a": 5, "b": [0.0, 6.0]})
    batch.agree(CPU)
    with batch.active():
        for count in (3, 5):
            assert float(effective_mean("a", count)) == 4
            assert effective_mean("b", [2.0, 4.0]).tolist() == [1, 5]
            assert float(effective_mean("own", count, of_part=True)) == count, "not announced, since it is not asked"


def test_a_pass_that_counts() -> None:
    batch = EffectiveBatch(steps=2, exact=True)
    for count in (1, 0):
        with batch.counting() as found:
            assert float(effective_mean("a", count, of_part=True)) == 1
        assert list(found) == ["a"]
    batch.agree(CPU)
    with batch.active():
        assert float(effective_mean("a", 1, of_part=True)) == 0.5, "the least sum is 1 over both parts"


def test_exact_items_share_one_mean() -> None:
    whole, parts = EffectiveBatch(exact=True), EffectiveBatch(steps=2, exact=True)
    counts = [4.0, 2.0, 3.0, 7.0]
    with whole.active():
        expected = effective_mean_of_items("a", counts, CPU)
    assert expected.tolist() == [4] * 4
    for part in (counts[:2], counts[2:]):
        with parts.counting():
            effective_mean_of_items("a", part, CPU)
    parts.agree(CPU)
    with parts.active():
        assert effective_mean_of_items("a", counts[2:], CPU).tolist() == [4, 4]


def test_what_cannot_be() -> None:
    batch = EffectiveBatch(steps=2)
    batch.announce({"a": 1})
    batch.announce({"b": 1})
    with pytest.raises(RuntimeError, match="asked for different counts"):
        batch.agree(CPU)
    batch = EffectiveBatch(steps=2)
    batch.announce({"a": 1})
    batch.announce({"a": 1})
    batch.agree(CPU)
    with batch.active(), pytest.raises(RuntimeError, match="'b' was not announced: known are .'a'."):
        effective_mean("b", 3)
    with batch.counting():
        effective_mean("a", 1)
        with pytest.raises(RuntimeError, match="'a' was asked for twice"):
            effective_mean("a", 1)
