from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vis.modeling.trackers import QueryMatchingTracker, match_queries
from vis.modeling.trackers.query_matching import cosine_similarity
from vis.modeling.transformer_decoders.masked import DecoderOutput

T, Q, C, K, MASK = 6, 9, 16, 4, 7


def tracker() -> QueryMatchingTracker:
    return QueryMatchingTracker()


def outputs(seed: int = 0, drift: float = 0.05) -> tuple[DecoderOutput, Tensor, Tensor]:
    """Queries in a new order in every frame after the first; also the orders (T, Q) and the sorted embeddings."""
    generator = torch.Generator().manual_seed(seed)
    steps = drift * torch.randn(T, Q, C, generator=generator)
    sorted_embeds = torch.randn(Q, C, generator=generator) + steps.cumsum(0)
    logits, masks = torch.randn(Q, K, generator=generator), torch.randn(Q, MASK, generator=generator)
    orders = torch.stack([torch.arange(Q), *(torch.randperm(Q, generator=generator) for _ in range(T - 1))])
    output: DecoderOutput = {
        "pred_embeds": torch.stack([embeds[order] for embeds, order in zip(sorted_embeds, orders, strict=True)]),
        "pred_logits": torch.stack([logits[order] + t for t, order in enumerate(orders)]),
        "mask_embeds": torch.stack([masks[order] - t for t, order in enumerate(orders)]),
        "mask_features": torch.randn(T, MASK, 3, 5, generator=generator),
        "aux_outputs": [],
    }
    return output, orders, sorted_embeds


def part(output: DecoderOutput, start: int, end: int) -> DecoderOutput:
    return {key: value[start:end] for key, value in output.items() if key != "aux_outputs"}  # type: ignore[return-value]


def test_permutations_are_undone() -> None:
    output, _, sorted_embeds = outputs()
    tracked, state = tracker()(output, None)
    assert torch.equal(tracked["pred_embeds"], sorted_embeds)
    assert torch.equal(state.embeds, sorted_embeds[-1])
    for name, sign in (("pred_logits", 1), ("mask_embeds", -1)):
        values = tracked[name]  # type: ignore[literal-required]
        for t in range(T):
            torch.testing.assert_close(values[t] - sign * t, values[0])
    assert tracked["mask_features"] is output["mask_features"]


def test_the_first_frame_keeps_its_order() -> None:
    output, _, _ = outputs(3)
    tracked, _ = tracker()(part(output, 2, 3), None)
    assert torch.equal(tracked["pred_embeds"], output["pred_embeds"][2:3])


def test_memory_is_the_last_frame_alone() -> None:
    """Embeddings on a circle turn until each stands where another began; matching with the first would swap them."""
    angle = torch.arange(Q) * (2 * math.pi / Q) + torch.arange(T)[:, None] * (0.4 * 2 * math.pi / Q)
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (T, Q, 2)
    assert match_queries(circle[0], circle[-1]).tolist() == [(q - 2) % Q for q in range(Q)]
    output, orders, _ = outputs(1)
    output["pred_embeds"] = circle.gather(1, orders[..., None].expand(-1, -1, 2))
    tracked, _ = tracker()(output, None)
    assert torch.equal(tracked["pred_embeds"], circle)


@pytest.mark.parametrize("size", [1, 3, T])
def test_windows_carry_the_state(size: int) -> None:
    output, _, sorted_embeds = outputs(2)
    state, found = None, []
    for start in range(0, T, size):
        tracked, state = tracker()(part(output, start, start + size), state)
        found.append(tracked["pred_embeds"])
    assert torch.equal(torch.cat(found), sorted_embeds)


def test_interleaved_videos_do_not_mix() -> None:
    videos, one = [outputs(seed) for seed in (4, 5)], tracker()
    states: list = [None, None]
    for t in range(T):
        for i, (output, _, sorted_embeds) in enumerate(videos):
            tracked, states[i] = one(part(output, t, t + 1), states[i])
            assert torch.equal(tracked["pred_embeds"][0], sorted_embeds[t])


def test_inputs_are_not_modified() -> None:
    output, _, _ = outputs()
    copies = {key: value.clone() for key, value in output.items() if isinstance(value, Tensor)}
    _, state = tracker()(part(output, 0, 2), None)
    before = state.embeds.clone()
    tracker()(part(output, 2, T), state)
    assert torch.equal(state.embeds, before)
    assert all(torch.equal(output[key], copy) for key, copy in copies.items())  # type: ignore[literal-required]


def test_match_gives_the_index_and_not_its_inverse() -> None:
    reference = torch.randn(Q, C, generator=torch.Generator().manual_seed(6))
    turn = torch.tensor([1, 2, 0, *range(3, Q)])  # a circle of three is not its own inverse
    current = reference[turn]
    index = match_queries(reference, current)
    assert index.dtype == torch.int64
    assert torch.equal(current[index], reference)
    assert index.tolist() == turn.argsort().tolist()


def test_match_is_by_angle_not_by_length() -> None:
    reference = torch.eye(3)
    current = torch.tensor([[0.0, 9.0, 1.0], [0.0, 0.02, 0.1], [5.0, 4.0, 0.0]])
    assert match_queries(reference, current).tolist() == [2, 0, 1]


def test_match_of_zero_and_half_precision_embeddings() -> None:
    assert sorted(match_queries(torch.zeros(4, 3), torch.zeros(4, 3)).tolist()) == [0, 1, 2, 3]
    reference = torch.randn(Q, C, generator=torch.Generator().manual_seed(8))
    order = torch.randperm(Q, generator=torch.Generator().manual_seed(9))
    assert torch.equal(match_queries(reference.bfloat16(), reference[order]), order.argsort())


def test_cosine_similarity() -> None:
    reference, current = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[4.0, 3.0]])
    assert cosine_similarity(reference, current).tolist() == [[pytest.approx(24 / 25)], [0.0]]
    assert cosine_similarity(reference, current, added=1.0).tolist() == [[pytest.approx(24 / 36)], [0.0]]


def test_overflow_is_an_error() -> None:
    output, _, _ = outputs()
    output["pred_embeds"][3, 2, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        tracker()(output, None)


def test_no_frame_is_an_error() -> None:
    output, _, _ = outputs()
    with pytest.raises(ValueError, match="no frame"):
        tracker()(part(output, 0, 0), None)


def test_there_is_nothing_to_train() -> None:
    assert list(tracker().state_dict()) == []
