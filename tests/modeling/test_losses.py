from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vis.modeling.losses import dice_cost, dice_loss, sigmoid_ce_cost, sigmoid_ce_loss

Q, N, P = 5, 3, 11


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), -math.log(3.0)]])  # s = 0.5, 0.75; 0.75, 0.25
    targets = torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    ce = [(math.log(2) - math.log(0.75)) / 2, (-math.log(0.75) - 0.5 * math.log(0.25) - 0.5 * math.log(0.75)) / 2]
    assert float(sigmoid_ce_loss(logits, targets, 4.0)) == pytest.approx(sum(ce) / 4, rel=1e-6)
    dice = [1 - (2 * 1.25 + 1) / (1.25 + 2 + 1), 1 - (2 * 0.875 + 1) / (1.0 + 1.5 + 1)]
    assert float(dice_loss(logits, targets, 4.0)) == pytest.approx(sum(dice) / 4, rel=1e-6)


def test_costs_are_the_losses_of_every_pair() -> None:
    torch.manual_seed(0)
    logits, targets = 4 * torch.randn(2, Q, P, dtype=torch.float64), torch.rand(N, P, dtype=torch.float64)
    ce, dice = sigmoid_ce_cost(logits, targets), dice_cost(logits, targets)
    assert ce.shape == dice.shape == (2, Q, N)
    for layer in range(2):
        for q in range(Q):
            for n in range(N):
                pair = logits[layer, q, None], targets[n, None], 1.0
                torch.testing.assert_close(ce[layer, q, n], sigmoid_ce_loss(*pair), rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(dice[layer, q, n], dice_loss(*pair), rtol=1e-12, atol=1e-12)


def test_cross_entropy_identity_for_large_logits() -> None:
    logits, targets = torch.tensor([[-300.0, 300.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(sigmoid_ce_cost(logits, targets)[0, 0], expected)


def test_no_mask_is_zero_with_a_graph() -> None:
    logits = torch.zeros(0, P, requires_grad=True)
    for loss in (sigmoid_ce_loss, dice_loss):
        value = loss(logits, torch.zeros(0, P), 1.0)
        assert float(value.detach()) == 0
        value.backward()
