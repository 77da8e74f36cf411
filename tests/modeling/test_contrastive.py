"""Contrastive losses against the formula, term by term."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.modeling.losses.contrastive import adjacent_frames_loss, contrastive_loss, cosine_loss, whole_track_loss

T, Q, C = 4, 6, 5


def formula(anchor: Tensor, positives: list[Tensor], negatives: list[Tensor]) -> float:
    """log(1 + sum over pairs of exp(v.k- - v.k+)), one pair after the other."""
    pairs = [math.exp(float(anchor @ minus - anchor @ plus)) for plus in positives for minus in negatives]
    return math.log(1 + sum(pairs))


def embeds(*shape: int) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(*shape)


def test_equals_the_sum_over_all_pairs() -> None:
    anchors, keys = embeds(3, C), embeds(9, C)[2:]
    torch.manual_seed(1)
    kind = torch.randint(0, 3, (3, 7))  # positive, negative, neither
    kind[:, 0], kind[:, 1] = 0, 1
    found = contrastive_loss(anchors @ keys.T, kind == 0, kind == 1)
    for row in range(3):
        plus, minus = ([keys[j] for j in range(7) if kind[row, j] == value] for value in (0, 1))
        assert float(found[row]) == pytest.approx(formula(anchors[row], plus, minus), rel=1e-5)


def test_large_products_do_not_overflow() -> None:
    similarity = torch.tensor([[900.0, -900.0, 0.0], [-900.0, 900.0, 0.0]], requires_grad=True)
    positive = torch.tensor([[True, False, False]] * 2)
    loss = contrastive_loss(similarity, positive, ~positive)
    assert loss.tolist() == pytest.approx([0.0, 1800.0])
    loss.sum().backward()
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()


@pytest.mark.parametrize("missing", ["positive", "negative"])
def test_without_partners_there_is_nothing_to_learn(missing: str) -> None:
    similarity = embeds(2, 4).requires_grad_()
    positive = torch.tensor([[True, False, False, True], [True, True, False, False]])
    negative = ~positive
    (positive if missing == "positive" else negative)[0] = False
    loss = contrastive_loss(similarity, positive, negative)
    assert float(loss[0].detach()) == 0
    assert float(loss[1].detach()) > 0
    loss.sum().backward()
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()
    assert not similarity.grad[0].any()


def test_cosines() -> None:
    anchors, keys = embeds(2, C), embeds(2, 3, C) + 1
    positive = torch.tensor([[True, False, False], [False, True, False]])
    found = cosine_loss(anchors, keys, positive)
    for row in range(2):
        terms = [
            (float(F.cosine_similarity(anchors[row], keys[row, j], dim=0)) - float(positive[row, j])) ** 2
            for j in range(3)
        ]
        assert float(found[row]) == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_adjacent_frames() -> None:
    x, queries = embeds(T, Q, C), torch.tensor([4, 1])
    terms = []
    for t in range(1, T):
        for q in queries.tolist():
            for other in (t - 1, t + 1):
                if other < T:
                    minus = [x[other, j] for j in range(Q) if j != q]
                    terms.append(formula(x[t, q], [x[other, q]], minus))
    assert float(adjacent_frames_loss(x, queries)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_whole_tracks_with_a_memory() -> None:
    """An item against the frame; where there is a memory, one more against it; the mean over all items."""
    x, queries, memory = embeds(T, Q, C), torch.tensor([3, 0]), embeds(20, C)[15:18]
    terms = []
    for q, remembered in zip(queries.tolist(), ([], list(memory)), strict=True):
        for t in range(T):
            plus = [x[s, q] for s in range(T)]
            terms.append(formula(x[t, q], plus, [x[t, j] for j in range(Q) if j != q]))
            if remembered:
                terms.append(formula(x[t, q], plus, remembered))
    assert len(terms) == 3 * T
    found = whole_track_loss(x, queries, [x.new_zeros(0, C), memory])
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize(("frames", "count"), [(1, 2), (T, 0)])
def test_nothing_to_compare_is_zero_with_a_graph(frames: int, count: int) -> None:
    x = embeds(frames, Q, C).requires_grad_()
    loss = adjacent_frames_loss(x, torch.arange(count))
    assert float(loss.detach()) == 0
    loss.backward()
    assert x.grad is not None
    assert float(whole_track_loss(x, torch.arange(0), []).detach()) == 0


def test_products_are_made_in_float32() -> None:
    """Embeddings without normalisation have products that half precision cannot hold."""
    x, queries = 300 * embeds(T, Q, C), torch.tensor([4, 1])
    memory = [embeds(2, C)] * 2
    expected = adjacent_frames_loss(x, queries), whole_track_loss(x, queries, memory)
    with torch.autocast("cpu", dtype=torch.float16):
        found = adjacent_frames_loss(x, queries), whole_track_loss(x, queries, memory)
    torch.testing.assert_close(found, expected)
