from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from vis.modeling.losses import dice_loss, sigmoid_ce_loss
from vis.modeling.matchers import HungarianMatcher, linear_assignment

LAYERS, Q, N, K, P = 3, 5, 4, 6, 13


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    classes, logits = torch.randn(LAYERS, Q, K + 1), 3 * torch.randn(LAYERS, Q, P)
    return classes, logits, torch.tensor([5, 0, 2, 2]), (torch.rand(N, P) > 0.5).float()


def matcher() -> HungarianMatcher:
    return HungarianMatcher(class_weight=2.0, mask_weight=5.0, dice_weight=3.0)


def test_cost_is_the_sum_of_its_terms() -> None:
    classes, logits, labels, masks = inputs()
    cost = matcher().cost(classes, logits, labels, masks)
    assert cost.shape == (LAYERS, Q, N)
    for layer, q, n in ((0, 0, 0), (1, 4, 3), (2, 2, 1)):
        pair = logits[layer, q, None], masks[n, None], 1.0
        probability = classes[layer, q].softmax(-1)[labels[n]]
        expected = 5 * sigmoid_ce_loss(*pair) + 3 * dice_loss(*pair) - 2 * probability
        torch.testing.assert_close(cost[layer, q, n], expected)


def test_matching_is_the_cheapest() -> None:
    arguments = inputs()
    costs = matcher().cost(*arguments)
    for cost, (queries, instances) in zip(costs, matcher()(*arguments), strict=True):
        assert sorted(instances.tolist()) == list(range(N))
        assert len(set(queries.tolist())) == N
        best = min(sum(float(cost[q, n]) for n, q in enumerate(chosen)) for chosen in permutations(range(Q), N))
        assert float(cost[queries, instances].sum()) == pytest.approx(best, rel=1e-6)


def test_all_layers_at_once_equal_one_by_one() -> None:
    classes, logits, labels, masks = inputs()
    together = matcher()(classes, logits, labels, masks)
    for layer, (queries, instances) in enumerate(together):
        ((alone, alone_instances),) = matcher()(classes[layer, None], logits[layer, None], labels, masks)
        assert torch.equal(queries, alone)
        assert torch.equal(instances, alone_instances)


def test_more_instances_than_queries() -> None:
    classes, logits, labels, masks = inputs()
    for queries, instances in matcher()(classes[:, :2], logits[:, :2], labels, masks):
        assert queries.tolist() == [0, 1]
        assert len(set(instances.tolist())) == 2


def test_no_instance() -> None:
    classes, logits, labels, masks = inputs()
    for queries, instances in matcher()(classes, logits, labels[:0], masks[:0]):
        assert len(queries) == len(instances) == 0


@pytest.mark.parametrize("where", ["classes", "masks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflow_is_an_error_with_advice(where: str, value: float) -> None:
    classes, logits, labels, masks = inputs()
    (classes if where == "classes" else logits)[1, 3, 2] = value
    with pytest.raises(
        FloatingPointError, match=r"not finite.*training: lower SOLVER.BASE_LR.*bfloat16.*test time: the weights"
    ):
        matcher()(classes, logits, labels, masks)


def test_an_impossible_class_is_not_an_overflow() -> None:
    classes, logits, labels, masks = inputs()
    classes[:, :, 3] = float("-inf")  # probability 0
    assert torch.isfinite(matcher().cost(classes, logits, labels, masks)).all()
    assert len(matcher()(classes, logits, labels, masks)) == LAYERS
    classes[0, 0] = float("-inf")  # nothing is possible: no probabilities
    with pytest.raises(FloatingPointError):
        matcher()(classes, logits, labels, masks)


def test_half_precision_is_matched_in_float32() -> None:
    classes, logits, labels, masks = inputs()
    cost = matcher().cost(classes.bfloat16(), logits.bfloat16(), labels, masks)
    assert cost.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matcher().cost(classes.bfloat16(), logits.bfloat16(), labels, masks), cost)
    expected = matcher().cost(classes.bfloat16().float(), logits.bfloat16().float(), labels, masks)
    assert torch.equal(cost, expected)


def test_linear_assignment_of_costs_with_a_gradient() -> None:
    rows, columns = linear_assignment(torch.tensor([[3.0, 1.0], [1.0, 3.0]], requires_grad=True))
    assert rows.tolist() == [0, 1]
    assert columns.tolist() == [1, 0]
    with pytest.raises(FloatingPointError, match="1 of 4"):
        linear_assignment(torch.tensor([[3.0, float("-inf")], [1.0, 3.0]]))
