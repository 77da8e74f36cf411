"""SimOTA on costs made by hand, the repair of instances without a query, and what the released repair does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vis.modeling.matchers.ota import Assignment, assign, ota_costs


def matched(found: Assignment) -> dict[int, list[int]]:
    pairs: dict[int, list[int]] = {}
    for query, instance in zip(found.queries.tolist(), found.instances.tolist(), strict=True):
        pairs.setdefault(instance, []).append(query)
    return pairs


def test_number_of_queries_follows_the_overlaps() -> None:
    """Sums of the best IoUs 2.9, 0.4 and 1.0: two, one (at least) and one query."""
    iou = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.1, 0.0], [0.7, 0.1, 0.0], [0.5, 0.1, 0.0], [0.0, 0.0, 1.0]])
    cost = torch.tensor([[3.0, 9, 9], [1.0, 9, 9], [2.0, 8, 9], [9.0, 1, 9], [9.0, 9, 5]])
    found = assign(cost, iou)
    assert matched(found) == {0: [1, 2], 1: [3], 2: [4]}
    assert found.best.tolist() == [1, 3, 4]
    assert found.queries.tolist() == sorted(found.queries.tolist())


def test_candidates_limit_the_sum() -> None:
    iou = torch.full((20, 1), 0.5)
    cost = torch.arange(20.0)[:, None]
    assert matched(assign(cost, iou, num_candidates=10)) == {0: list(range(5))}
    assert matched(assign(cost, iou, num_candidates=100)) == {0: list(range(10))}


def test_conflict_goes_to_the_cheaper() -> None:
    """Both want query 0; instance 1 pays less for it, instance 0 has another."""
    iou = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    cost = torch.tensor([[2.0, 1.0], [3.0, 9.0], [9.0, 9.0]])
    assert matched(assign(cost, iou)) == {0: [1], 1: [0]}


# Three instances want query 0 alone, the first pays least; the other two then both want query 1.
CROWD = torch.tensor([[1.0, 2.0, 3.0], [9.0, 4.0, 5.0], [9.0, 8.0, 6.0], [9.0, 9.0, 9.0]])


def test_repair_leaves_no_instance_and_no_query_twice() -> None:
    found = assign(CROWD, torch.zeros_like(CROWD))
    assert matched(found) == {0: [0], 1: [1], 2: [2]}
    assert found.best.tolist() == [0, 1, 2]


def test_released_repair_shares_a_query() -> None:
    """Query 1 was in no conflict before, so nobody looks whether it is in one now; the losses see the first."""
    cost = CROWD.clone()
    found = assign(cost, torch.zeros_like(CROWD), released=True)
    assert matched(found) == {0: [0], 1: [1]}
    assert found.best.tolist() == [0, 1, 1]
    assert float(cost[0, 0]) > 1e4, "released code changes the costs in place"


@pytest.mark.parametrize("seed", range(8))
def test_every_instance_has_a_query_of_its_own(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost, iou = torch.rand(40, 17, generator=generator), torch.rand(40, 17, generator=generator) * 0.3
    before = cost.clone()
    found = assign(cost, iou)
    assert torch.equal(cost, before)
    assert len(set(found.queries.tolist())) == len(found.queries)
    assert set(matched(found)) == set(range(17))
    for instance, queries in matched(found).items():
        assert int(found.best[instance]) == min(queries, key=lambda query: float(cost[query, instance]))


def test_edges() -> None:
    none = assign(torch.zeros(5, 0), torch.zeros(5, 0))
    assert [len(x) for x in none] == [0, 0, 0]
    same = assign(torch.ones(6, 2), torch.full((6, 2), 0.5))  # twins: one box, one class
    assert set(matched(same)) == {0, 1}
    crowded = assign(torch.rand(2, 3), torch.zeros(2, 3))  # more instances than queries
    assert sorted(crowded.queries.tolist()) == [0, 1]
    assert (crowded.best == -1).sum() == 1
    assert [len(x) for x in assign(torch.rand(2, 3), torch.zeros(2, 3), released=True)][0] == 2


def slow_cost(logit: Tensor, box: list[float], label: int, target: list[float]) -> tuple[float, bool, float]:
    """Cost without the row's penalty, whether the box lies in or near the target, IoU: one pair, in plain numbers."""
    p = 1 / (1 + math.exp(-float(logit[label])))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    (ax, ay, aw, ah), (bx, by, bw, bh) = box, target
    a, b = (ax - aw / 2, ay - ah / 2, ax + aw / 2, ay + ah / 2), (bx - bw / 2, by - bh / 2, bx + bw / 2, by + bh / 2)
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = aw * ah + bw * bh - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    giou = inter / union - (hull - union) / hull
    in_box = b[0] < ax < b[2] and b[1] < ay < b[3]
    near = abs(ax - bx) < 2.5 / 32 and abs(ay - by) < 2.5 / 32
    return focal - 3 * giou + (0 if in_box and near else 100), in_box or near, inter / union


def test_costs_against_plain_numbers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 30, 4)
    boxes = torch.cat([torch.rand(2, 30, 2), torch.rand(2, 30, 2) * 0.4 + 0.05], dim=-1)
    targets = torch.tensor([[0.3, 0.3, 0.4, 0.3], [0.8, 0.6, 0.1, 0.2], [0.5, 0.1, 0.05, 0.05]])
    labels = torch.tensor([2, 0, 2])
    cost, iou = ota_costs(logits, boxes, labels, targets)
    outside = 0
    for layer in range(2):
        for query in range(30):
            row = [
                slow_cost(logits[layer, query], boxes[layer, query].tolist(), label, target)
                for label, target in zip(labels.tolist(), targets.tolist(), strict=True)
            ]
            far = 0 if any(near for _, near, _ in row) else 10000
            outside += far > 0
            assert cost[layer, query].tolist() == pytest.approx([value + far for value, _, _ in row], abs=2e-3)
            assert iou[layer, query].tolist() == pytest.approx([value for _, _, value in row], abs=1e-5)
    assert 0 < outside < 60
    with pytest.raises(FloatingPointError, match="boxes are not finite"):
        ota_costs(logits, boxes * float("nan"), labels, targets)
