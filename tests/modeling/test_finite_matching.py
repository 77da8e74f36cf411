"""Matching costs that are not finite: an error, or noted and replaced where a training asks for that."""

from __future__ import annotations

import math

import pytest
import torch

from vis.modeling.matchers import linear_assignment
from vis.modeling.matchers.finite import finite_or_error, problems_wait
from vis.modeling.matchers.ota import assign, ota_costs

Q, N, K = 5, 2, 3


def test_an_error_at_once_or_a_dear_pair() -> None:
    cost = torch.arange(float(Q * N)).view(Q, N)
    cost[0, 0], cost[1, 1] = math.nan, -math.inf
    with pytest.raises(FloatingPointError, match="2 of 10 matching costs are not finite"):
        linear_assignment(cost)
    with problems_wait() as problems:
        rows, columns = linear_assignment(cost)
    assert sorted(columns.tolist()) == [0, 1]
    assert (0, 0) not in zip(rows.tolist(), columns.tolist(), strict=True)
    assert (1, 1) not in zip(rows.tolist(), columns.tolist(), strict=True)
    assert len(problems) == 1
    assert not torch.isfinite(problems[0].values).all()
    with pytest.raises(FloatingPointError):
        linear_assignment(cost)


def test_nothing_but_broken_costs_still_gives_pairs() -> None:
    with problems_wait():
        rows, columns = linear_assignment(torch.full((Q, N), math.nan))
    assert len(set(rows.tolist())) == len(columns) == N


def test_inner_waits_do_not_reach_the_outer_one() -> None:
    bad = torch.tensor([math.inf])
    with problems_wait() as outer:
        with problems_wait() as inner:
            finite_or_error(bad, "inner")
        assert finite_or_error(bad, "outer {bad} of {all}", instead=2.0).item() == 2.0
    assert ([p.message for p in inner], [p.message for p in outer]) == (["inner"], ["outer 1 of 1"])
    values = torch.ones(3)
    assert finite_or_error(values, "") is values


@pytest.mark.parametrize("what", ["boxes", "logits"])
def test_several_queries_for_an_instance(what: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(Q, K, generator=generator), torch.rand(Q, 4, generator=generator)
    (boxes if what == "boxes" else logits)[2, 1] = math.nan
    arguments = logits, boxes, torch.tensor([0, 2]), torch.rand(N, 4, generator=generator)
    with pytest.raises(FloatingPointError, match="are not finite: the network's outputs have overflowed"):
        ota_costs(*arguments)
    with problems_wait() as problems:
        cost, iou = ota_costs(*arguments)
    assert len(problems) == 1
    assert torch.isfinite(cost).all()
    assert set(assign(cost, iou).instances.tolist()) == {0, 1}
