"""The temporal refiner against a slow formula, and its symmetries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.modeling.refiners import TemporalRefiner, temporal
from vis.structures import RefinerOutput

B, T, Q, K, C, MASK, LAYERS, HEADS = 2, 6, 5, 4, 12, 7, 3, 3


def refiner(**changes: Any) -> TemporalRefiner:
    options: dict[str, Any] = {
        "num_classes": K,
        "embed_dim": C,
        "mask_dim": MASK,
        "num_heads": HEADS,
        "feedforward_dim": 17,
        "num_layers": LAYERS,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    model = TemporalRefiner(**{**options, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def inputs(videos: int = B, frames: int = T, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tracks, memory = torch.randn(2, videos, frames, Q, C, generator=generator)
    return tracks, memory


def assert_same(found: RefinerOutput, expected: RefinerOutput) -> None:
    for name in ("pred_logits", "mask_embeds", "pred_embeds"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def attend(layer: nn.Module, attention: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    """Post-norm attention of one sequence (L, C) to another, by torch's own module."""
    other = nn.MultiheadAttention(C, HEADS, batch_first=True).eval()
    other.load_state_dict(attention.state_dict())
    return layer.norm(x + other(x[None], memory[None], memory[None])[0][0])  # type: ignore[operator]


def convolve(conv: nn.Conv1d, track: Tensor) -> Tensor:
    """(T, C) with the first and last frame repeated at the ends."""
    half, frames = conv.kernel_size[0] // 2, len(track)
    rows = [
        sum(conv.weight[:, :, k] @ track[min(max(t + k - half, 0), frames - 1)] for k in range(2 * half + 1))
        for t in range(frames)
    ]
    return torch.stack(rows) + conv.bias  # type: ignore[arg-type]


def naive(model: TemporalRefiner, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One video (T, Q, C): logits (L, Q, K+1), mask embeddings (L, T, Q, MASK), embeddings."""
    logits, masks, normed = [], [], x
    for i in range(LAYERS):
        time, own = model.transformer_time_self_attention_layers[i], model.transformer_obj_self_attention_layers[i]
        cross, feed = model.transformer_cross_attention_layers[i], model.transformer_ffn_layers[i]
        first, _, second = model.conv_short_aggregate_layers[i]
        tracks = []
        for track in x.unbind(1):
            track = attend(time, time.self_attn, track, track)
            tracks.append(model.conv_norms[i](track + convolve(second, convolve(first, track).relu())))
        frames = []
        for frame, seen in zip(torch.stack(tracks, 1), memory, strict=True):
            frame = attend(own, own.self_attn, frame, frame)
            frame = attend(cross, cross.multihead_attn, frame, seen)
            frames.append(feed.norm(frame + feed.linear2(feed.linear1(frame).relu())))
        x = torch.stack(frames)
        normed = model.decoder_norm(x)
        weights = F.softmax(normed @ model.activation_proj.weight[0] + model.activation_proj.bias, dim=0)  # (T, Q)
        logits.append(model.class_embed((weights[..., None] * normed).sum(0)))
        masks.append(model.mask_embed(normed))
    return torch.stack(logits), torch.stack(masks), normed


@torch.no_grad()
def test_equals_the_slow_formula() -> None:
    model, (tracks, memory) = refiner(), inputs()
    found = model.train()(tracks, memory)
    for b in range(B):
        logits, masks, embeds = naive(model, tracks[b], memory[b])
        torch.testing.assert_close(found.pred_logits[:, b], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mask_embeds[:, b], masks, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.pred_embeds[b], embeds, rtol=1e-4, atol=1e-4)


def test_layers_in_training_and_in_evaluation() -> None:
    model, given = refiner(), inputs()
    last = model(*given)
    assert last.pred_logits.shape == (1, B, Q, K + 1)
    output = model.train()(*given)
    assert output.pred_logits.shape == (LAYERS, B, Q, K + 1)
    assert output.mask_embeds.shape == (LAYERS, B, T, Q, MASK)
    torch.testing.assert_close(output.pred_logits[-1:], last.pred_logits)
    (output.pred_logits.sum() + output.mask_embeds.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_permuted_tracks_permute_the_result() -> None:
    model, (tracks, memory) = refiner(), inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    expected = model(tracks, memory)
    found = model(tracks[:, :, order], memory)
    torch.testing.assert_close(found.pred_logits, expected.pred_logits[:, :, order])
    torch.testing.assert_close(found.mask_embeds, expected.mask_embeds[:, :, :, order])


@torch.no_grad()
def test_the_order_of_the_memory_does_not_matter() -> None:
    model, (tracks, memory) = refiner(), inputs()
    orders = torch.stack([torch.randperm(Q) for _ in range(T)]).expand(B, -1, -1)
    assert_same(model(tracks, memory.gather(2, orders[..., None].expand(-1, -1, -1, C))), model(tracks, memory))


@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_time_is_known_to_the_convolutions_alone(symmetric: bool) -> None:
    """With kernels that are the same read backwards, a video run backwards gives the same result backwards."""
    model, (tracks, memory) = refiner(), inputs()
    for layer in model.conv_short_aggregate_layers if symmetric else ():
        for conv in (layer[0], layer[2]):  # type: ignore[index]
            conv.weight.add_(conv.weight.flip(2).clone())
    forward, backward = model(tracks, memory), model(tracks.flip(1), memory.flip(1))
    back = RefinerOutput(backward.pred_logits, backward.mask_embeds.flip(2), backward.pred_embeds.flip(1))
    if symmetric:
        assert_same(back, forward)
    else:
        assert not torch.allclose(back.mask_embeds, forward.mask_embeds, atol=1e-2)


@torch.no_grad()
def test_videos_of_a_batch_do_not_see_one_another() -> None:
    model, (tracks, memory) = refiner(), inputs(videos=3)
    both = model(tracks, memory)
    for b in range(3):
        alone = model(tracks[b : b + 1], memory[b : b + 1])
        assert_same(alone, RefinerOutput(both.pred_logits[:, [b]], both.mask_embeds[:, [b]], both.pred_embeds[[b]]))


@pytest.mark.parametrize("tokens", [1, 13, 20])
@pytest.mark.parametrize("frames", [1, 2, 9])
@torch.no_grad()
def test_any_length_and_in_parts(frames: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = refiner(), inputs(frames=frames)
    whole = model(*given)
    assert whole.mask_embeds.shape == (1, B, frames, Q, MASK)
    monkeypatch.setattr(temporal, "_TOKENS_AT_ONCE", tokens)
    assert_same(model(*given), whole)


@torch.no_grad()
def test_every_frame_counts_in_the_class() -> None:
    """Pooled over time: another last frame is another class, not only another mask."""
    model, (tracks, memory) = refiner(), inputs()
    other = tracks.clone()
    other[:, -1] += 1
    assert (model(other, memory).pred_logits - model(tracks, memory).pred_logits).abs().min() > 1e-6


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="no frame"):
        refiner()(*inputs(frames=0))
    with pytest.raises(ValueError, match="DECODER_LAYERS is 0"):
        refiner(num_layers=0)
