"""VITA's module beside the released way to compute it: padding, rolling and masks, one dense attention per layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.modeling.transformer_decoders.vita import VitaModule, frame_groups

LAYERS, CLIPS, QUERIES, FRAME_QUERIES, CLASSES, IN, HIDDEN, MASK, FEATURE, HEADS = 3, 2, 5, 4, 7, 20, 16, 12, 10, 2


def module(**changes: Any) -> VitaModule:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "num_classes": CLASSES,
        "num_frame_queries": FRAME_QUERIES,
        "num_queries": QUERIES,
        "in_dim": IN,
        "feature_dim": FEATURE,
        "hidden_dim": HIDDEN,
        "mask_dim": MASK,
        "num_heads": HEADS,
        "feedforward_dim": 24,
        "num_encoder_layers": 4,
        "num_decoder_layers": 3,
        "window_size": 6,
        "shift_in_training": False,
        "dropout": 0.0,
        "pre_norm": False,
        "enforce_input_proj": True,
        "deep_supervision": True,
    }
    built = VitaModule(**{**options, **changes})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built.eval()


def queries(frames: int, copies: int = 1, clips: int = 1) -> Tensor:
    return torch.randn(copies, clips, frames, FRAME_QUERIES, IN, generator=torch.Generator().manual_seed(frames))


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's own attention with the weights of a layer; ``bias`` (Lq, Lk) is added to the scores."""
    ours = getattr(layer, "self_attn", None) or layer.multihead_attn
    theirs = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs(query, key, value, attn_mask=bias, need_weights=True)[0]


def feed(layer: Any, x: Tensor) -> Tensor:
    return layer.norm(x + layer.linear2(F.relu(layer.linear1(x))))


def released_encoder(built: VitaModule, x: Tensor) -> Tensor:
    """(1, T, F, C): pad to whole windows, roll odd layers by half a window, let -1000 keep apart what is apart."""
    frames, window = x.shape[1], built.window_size
    if not window:
        window = frames
    padded = math.ceil(frames / window) * window
    x = F.pad(x, (0, 0, 0, 0, 0, padded - frames))
    for i, (attention, ffn) in enumerate(zip(built.enc_self_attn, built.enc_ffn, strict=True)):
        shift = math.ceil(window / 2) if built.window_size and i % 2 and not built.training else 0
        time = torch.arange(padded).roll(shift)
        x, out = x.roll(shift, dims=1), []
        for start in range(0, padded, window):
            t = time[start : start + window]
            # rolled in from the end of the video: later than what follows it, and another part of time
            part = (t >= padded - shift).long()
            apart = (part[:, None] != part) | (t >= frames)
            bias = (apart * -1000.0).repeat_interleave(FRAME_QUERIES, 0).repeat_interleave(FRAME_QUERIES, 1)
            tokens = x[:, start : start + window].flatten(1, 2)
            out.append(attention.norm(tokens + attend(attention, tokens, tokens, tokens, bias)))
        x = feed(ffn, torch.cat(out, dim=1)).unflatten(1, (padded, FRAME_QUERIES)).roll(-shift, dims=1)
    return x[:, :frames]


def released_decoder(built: VitaModule, tokens: Tensor) -> list[Tensor]:
    """(1, T, F, C) -> (1, Q, C) after each layer."""
    memory = tokens.flatten(1, 2)
    key = memory + torch.cat([built.fq_pos.weight] * tokens.shape[1])
    pos, x, out = built.query_embed.weight[None], built.query_feat.weight[None], []
    for cross, own, ffn in zip(
        built.transformer_cross_attention_layers,
        built.transformer_self_attention_layers,
        built.transformer_ffn_layers,
        strict=True,
    ):
        x = cross.norm(x + attend(cross, x + pos, key, memory))
        x = own.norm(x + attend(own, x + pos, x + pos, x))
        x = feed(ffn, x)
        out.append(built.decoder_norm(x))
    return out


@pytest.mark.parametrize(("window", "lengths"), [(6, (*range(1, 15), 18, 19, 25, 50)), (5, range(1, 13)), (0, (1, 8))])
@torch.no_grad()
def test_any_length_gives_the_released_numbers(window: int, lengths: Any) -> None:
    built = module(window_size=window)
    for frames in lengths:
        x = queries(frames)
        tokens = released_encoder(built, built.input_proj_dec(x)[0])
        torch.testing.assert_close(built.encode(x)[0], tokens, rtol=1e-4, atol=1e-5)
        last = released_decoder(built, tokens)[-1]
        found = built(x)
        assert found.pred_logits.shape == (1, 1, 1, QUERIES, CLASSES + 1)
        torch.testing.assert_close(found.pred_logits[0, 0], built.class_embed(last), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mask_embeds[0, 0], built.mask_embed(last), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.clip_embeds[0], built.sim_embed_clip(last), rtol=1e-4, atol=1e-5)
        assert found.frame_embeds is None


@torch.no_grad()
def test_training_gives_every_layer_and_does_not_shift() -> None:
    built, frames = module().train(), 9
    x = queries(frames, LAYERS, CLIPS)
    found = built(x)
    assert found.pred_logits.shape == (3, LAYERS, CLIPS, QUERIES, CLASSES + 1)
    assert found.mask_embeds.shape == (3, LAYERS, CLIPS, QUERIES, MASK)
    assert found.frame_embeds is not None
    for copy in range(LAYERS):
        for clip in range(CLIPS):
            tokens = released_encoder(built, built.input_proj_dec(x[copy, clip, None]))
            torch.testing.assert_close(
                found.frame_embeds[copy, clip, None], built.sim_embed_frame(tokens), rtol=1e-4, atol=1e-5
            )
            for depth, normed in enumerate(released_decoder(built, tokens)):
                torch.testing.assert_close(
                    found.pred_logits[depth, copy, clip, None], built.class_embed(normed), rtol=1e-4, atol=1e-5
                )
    shifting = module(shift_in_training=True).train()
    assert not torch.allclose(shifting.encode(x), built.encode(x), atol=1e-3)
    torch.testing.assert_close(shifting.encode(x), module().encode(x))


@torch.no_grad()
def test_in_training_four_frames_are_one_window_at_test_time_two() -> None:
    x = queries(4)
    trained, tested = module().train().encode(x), module().encode(x)
    assert not torch.allclose(trained, tested, atol=1e-3)
    torch.testing.assert_close(module().train().encode(x[:, :, :3]), module().encode(x[:, :, :3]))


@pytest.mark.parametrize("project", [True, False])
def test_gradients_or_not(project: bool) -> None:
    """Without them the encoder works in place, but not on what it was given."""
    built = module(in_dim=HIDDEN, enforce_input_proj=project)
    given = torch.randn(LAYERS, CLIPS, 40, FRAME_QUERIES, HIDDEN)
    kept = given.clone()
    with torch.no_grad():
        found = built.encode(given)
    assert torch.equal(given, kept)
    torch.testing.assert_close(found, built.encode(given).detach())


@torch.no_grad()
def test_order_within_a_window_does_not_matter() -> None:
    built, x = module(num_encoder_layers=1), queries(9)
    order = torch.tensor([3, 1, 5, 0, 2, 4, 8, 6, 7])
    torch.testing.assert_close(built(x[:, :, order]).pred_logits, built(x).pred_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 5, 6])
@pytest.mark.parametrize("shifted", [False, True])
def test_groups_cover_a_video_once(window: int, shifted: bool) -> None:
    for frames in (1, 2, 3, 4, 6, 7, 17, 18, 100, 301):
        expected = [
            0 if not window else (t + (math.ceil(window / 2) if shifted else 0)) // window for t in range(frames)
        ]
        found, number = [], 0
        for start, size, count in frame_groups(frames, window, shifted=shifted):
            assert start == len(found)
            for _ in range(count):
                found += [number] * size
                number += 1
        numbers = sorted(set(expected))
        assert found == [numbers.index(group) for group in expected]


def test_depths_and_widths() -> None:
    built = module(num_encoder_layers=3, num_decoder_layers=6, enforce_input_proj=False, in_dim=HIDDEN)
    assert not any(name.startswith("input_proj_dec") for name in built.state_dict())
    assert (len(built.enc_ffn), len(built.transformer_ffn_layers)) == (3, 6)
    assert built(torch.randn(1, 1, 3, FRAME_QUERIES, HIDDEN)).mask_embeds.shape == (1, 1, 1, QUERIES, MASK)
    assert built.mask_features(torch.randn(3, FEATURE, 4, 6)).shape == (3, MASK, 4, 6)
    for wrong in ({"num_encoder_layers": 0}, {"num_decoder_layers": 0}, {"window_size": -1}):
        with pytest.raises(ValueError, match=r"MODEL\.VITA"):
            module(**wrong)
