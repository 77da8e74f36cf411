"""Embeddings of detections and the matching loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vis.modeling.criterions.embedding import MatchCriterion, MatchPair, match_targets
from vis.modeling.heads.track_embedding import MatchLogits, TrackHead


def pair(embeds: Tensor, ids: list[int], known: Tensor, known_ids: list[int]) -> MatchPair:
    return MatchPair(embeds, torch.tensor(ids, dtype=torch.int64), known, torch.tensor(known_ids, dtype=torch.int64))


def test_the_head_is_two_layers_with_one_relu_or_two() -> None:
    torch.manual_seed(0)
    pooled = torch.randn(5, 3, 7, 7)
    head = TrackHead(in_features=147, hidden_dim=11, embed_dim=6)
    hidden = (pooled.reshape(5, 147) @ head.fc1.weight.T + head.fc1.bias).clamp(min=0)
    expected = hidden @ head.fc2.weight.T + head.fc2.bias
    torch.testing.assert_close(head(pooled), expected)
    assert (expected < 0).any()
    head.last_relu = True
    torch.testing.assert_close(head(pooled), expected.clamp(min=0))
    assert head(pooled[:0]).shape == (0, 6)


def test_logits_are_products_beside_a_zero() -> None:
    embeds, known = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    assert MatchLogits()(embeds, known).tolist() == [[0, 1, 2, 0], [0, 3, 4, 2]]
    assert MatchLogits()(embeds, known[:0]).tolist() == [[0], [0]]
    cosine = MatchLogits(kind="cosine", temperature=0.5)(embeds, known)
    assert cosine[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(cosine[1, 1:], torch.tensor([3 / 5, 4 / 5, 2 / 5 / math.sqrt(5)]) / 0.5)


def test_the_logits_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert MatchLogits()(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.float32


def test_targets_are_places_and_zero_for_the_absent() -> None:
    ids = torch.tensor([7, 3, 3, 9])
    assert match_targets(ids, torch.tensor([3, 5, 9])).tolist() == [0, 1, 1, 3]
    assert match_targets(ids, torch.tensor([], dtype=torch.int64)).tolist() == [0, 0, 0, 0]


def closed_form(logits: list[list[float]], targets: list[int]) -> list[float]:
    return [math.log(sum(math.exp(x) for x in row)) - row[target] for row, target in zip(logits, targets, strict=True)]


def test_the_loss_in_closed_form() -> None:
    embeds = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.3, 0.1]])
    known = torch.tensor([[2.0, 0.0], [0.5, 1.5]])
    logits = [[0.0, *row] for row in (embeds @ known.T).tolist()]
    first = closed_form(logits, [2, 0, 1])  # the second is absent in the reference frame
    pairs = [pair(embeds, [4, 8, 6], known, [6, 4]), pair(embeds[:1], [1], known[:1], [1])]
    second = closed_form([logits[0][:2]], [1])
    loss = MatchCriterion(logits=MatchLogits())(pairs)
    assert float(loss) == pytest.approx((sum(first) / 3 + second[0]) / 2, rel=1e-6)
    loss = MatchCriterion(logits=MatchLogits(), normalizer="matched")(pairs)
    assert float(loss) == pytest.approx((sum(first) / 2 + second[0]) / 2, rel=1e-6)


def test_an_absent_instance_is_to_be_new() -> None:
    embeds, known = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    for normalizer in ("positives", "matched"):  # the divisor is at least 1
        loss = MatchCriterion(logits=MatchLogits(), normalizer=normalizer)([pair(embeds, [1], known, [2])])
        assert float(loss) == pytest.approx(math.log1p(math.exp(6)))


@pytest.mark.parametrize("normalizer", ["positives", "matched"])
def test_without_positives_or_references(normalizer: str) -> None:
    embeds = torch.randn(0, 4, requires_grad=True)
    known = torch.randn(3, 4, requires_grad=True)
    some = torch.randn(2, 4, requires_grad=True)
    criterion = MatchCriterion(logits=MatchLogits(), normalizer=normalizer)
    loss = criterion([pair(embeds, [], known, [0, 1, 2])])
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(known.grad.abs().sum()) == 0
    loss = criterion([pair(some, [5, 6], known[:0], []), pair(embeds, [], known[:0], [])])
    assert float(loss.detach()) == 0  # nothing to choose from but "new"
    loss.backward()
    assert some.grad is not None


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"MODEL.MASKTRACK.SIMILARITY is 'dot'"):
        MatchLogits(kind="dot")
    with pytest.raises(ValueError, match=r"TEMPERATURE is 0"):
        MatchLogits(temperature=0)
    with pytest.raises(ValueError, match=r"MATCH_NORMALIZER is 'all'"):
        MatchCriterion(logits=MatchLogits(), normalizer="all")
