"""The referring tracker against a slow formula, and what tracking has to be: orders undone, windows, videos apart."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.modeling.trackers import ReferringTracker
from vis.modeling.trackers.noise import StartNoise
from vis.structures import SegmenterClip, TrackerOutput

B, T, Q, K, C, MASK, LAYERS, HEADS = 2, 5, 7, 4, 12, 6, 3, 3
SIZE = (3, 8)


def tracker(plus: bool = False, noise: str = "none", ratio: float = 1.0, **changes: Any) -> ReferringTracker:
    options: dict[str, Any] = {
        "num_classes": K,
        "embed_dim": C,
        "mask_in_dim": MASK,
        "mask_dim": MASK,
        "num_heads": HEADS,
        "feedforward_dim": 17,
        "num_layers": LAYERS,
        "dropout": 0.0,
        "matching": "correct",
        "raw_embeds": plus,
        "reference_proj": plus,
        "mask_feature_proj": plus,
        "noise": StartNoise(mode=noise, ratio=ratio, base="matched", partner="iid"),
    }
    torch.manual_seed(0)
    model = ReferringTracker(**{**options, **changes})
    with torch.no_grad():
        for parameter in model.parameters():  # norms stay near 1, or all slots come out alike
            parameter.copy_(torch.randn_like(parameter) * 0.4 if parameter.dim() > 1 else parameter)
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def clip(seed: int = 1, videos: int = B, frames: int = T) -> SegmenterClip:
    """Objects that drift slowly, their queries in the same order in every frame."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    drift = (0.15 * draw(videos, frames, Q, C)).cumsum(1)
    embeds = draw(videos, 1, Q, C) + drift
    return SegmenterClip(
        pred_logits=draw(videos, frames, Q, K + 1),
        pred_embeds=embeds,
        raw_embeds=1.5 * embeds + 0.1 * draw(videos, frames, Q, C),
        mask_embeds=draw(videos, frames, Q, MASK),
        mask_features=draw(videos, frames, MASK, *SIZE),
    )


def shuffled(of: SegmenterClip, seed: int = 4) -> tuple[SegmenterClip, Tensor]:
    """Queries in another order in every frame but the first; and the orders (B, T, Q)."""
    generator = torch.Generator().manual_seed(seed)
    videos, frames = of.pred_embeds.shape[:2]
    orders = torch.stack([torch.randperm(Q, generator=generator) for _ in range(videos * frames)])
    orders = orders.view(videos, frames, Q)
    orders[:, 0] = torch.arange(Q)

    def mixed(x: Tensor) -> Tensor:
        return x.gather(2, orders[..., None].expand(-1, -1, -1, x.shape[-1]))

    assert of.raw_embeds is not None
    new = replace(
        of,
        pred_logits=mixed(of.pred_logits),
        pred_embeds=mixed(of.pred_embeds),
        raw_embeds=mixed(of.raw_embeds),
        mask_embeds=mixed(of.mask_embeds),
    )
    return new, orders


def part(of: SegmenterClip, videos: slice, frames: slice) -> SegmenterClip:
    return SegmenterClip(**{field.name: getattr(of, field.name)[videos, frames] for field in fields(of)})


def assert_same(found: TrackerOutput, expected: TrackerOutput, but: tuple[str, ...] = ()) -> None:
    for field in fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name not in but and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=field.name: f"{n}: {m}")


def joined(parts: list[TrackerOutput], axis: int) -> TrackerOutput:
    """Outputs one after the other along the videos (0) or the frames (1)."""
    together = {}
    for field in fields(parts[0]):
        values = [getattr(x, field.name) for x in parts]
        first = 1 if field.name in ("pred_logits", "mask_embeds") else 0
        together[field.name] = None if values[0] is None else torch.cat(values, dim=first + axis)
    return TrackerOutput(**together)


def attention(layer: nn.Module) -> nn.MultiheadAttention:
    other = nn.MultiheadAttention(C, HEADS, batch_first=True).eval()
    other.load_state_dict(layer.state_dict())
    return other


def naive(model: ReferringTracker, of: SegmenterClip, plus: bool) -> dict[str, Tensor]:
    """One video, its queries matched already: torch's own attention, frame after frame, layer after layer."""
    states = of.raw_embeds[0] if plus else of.pred_embeds[0]  # type: ignore[index]

    def lead(x: Tensor) -> Tensor:
        if not plus:
            return x
        for i, linear in enumerate(model.ref_proj.layers):  # type: ignore[union-attr]
            x = F.linear(x if i == 0 else x.relu(), linear.weight, linear.bias)
        return x

    last, found = None, []
    for t, now in enumerate(states):
        x, layers, reference = now[None], [], None
        for i in range(LAYERS):
            query = lead(x) if last is None else lead(last)
            reference = query if reference is None else reference
            cross, own = model.transformer_cross_attention_layers[i], model.transformer_self_attention_layers[i]
            feed = model.transformer_ffn_layers[i]
            x = cross.norm(x + attention(cross.multihead_attn)(query, now[None], now[None])[0])
            x = own.norm(x + attention(own.self_attn)(x, x, x)[0])
            x = feed.norm(x + feed.linear2(feed.linear1(x).relu()))
            normed = model.decoder_norm(x)
            seen = torch.cat([reference, normed], -1) if plus else normed
            features = of.mask_features[:, t]
            features = model.mask_feature_proj(features) if plus else features  # type: ignore[misc]
            masks = torch.einsum("qc,chw->qhw", model.mask_embed(normed)[0], features[0])
            layers.append((model.class_embed(seen)[0], masks, (x if plus else normed)[0], reference[0]))
        last = x
        found.append([torch.stack(values) for values in zip(*layers, strict=True)])
    logits, masks, embeds, references = (torch.stack(values, dim=1) for values in zip(*found, strict=True))
    return {"logits": logits, "masks": masks, "embeds": embeds[-1], "references": references[-1]}


@pytest.mark.parametrize("plus", [False, True])
@torch.no_grad()
def test_equals_the_slow_formula(plus: bool) -> None:
    model, of = tracker(plus).train(), clip(videos=1)
    found, _ = model(shuffled(of)[0], None)
    expected = naive(model, of, plus)
    masks = torch.einsum("lbtqc,btchw->lbtqhw", found.mask_embeds, found.mask_features)
    torch.testing.assert_close(found.pred_logits[:, 0], expected["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masks[:, 0], expected["masks"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pred_embeds[0], expected["embeds"], rtol=1e-4, atol=1e-4)
    if plus:
        assert found.references is not None
        torch.testing.assert_close(found.references[0], expected["references"], rtol=1e-4, atol=1e-4)
    else:
        assert found.references is None


@pytest.mark.parametrize("plus", [False, True])
@torch.no_grad()
def test_orders_are_undone(plus: bool) -> None:
    of = clip()
    mixed, orders = shuffled(of)
    model = tracker(plus)
    found, state = model(mixed, None)
    expected, _ = model(of, None)
    assert torch.equal(found.order, orders.argsort(dim=-1))
    assert_same(found, expected, but=("order",))
    assert torch.equal(state.embeds, of.pred_embeds[:, -1])


@torch.no_grad()
def test_the_release_used_the_inverse() -> None:
    """In the second frame of a video the released order is that of the correct one undone."""
    mixed, orders = shuffled(clip(frames=2))
    found, state = tracker(matching="dvis_v1")(mixed, None)
    assert not torch.equal(orders, orders.argsort(dim=-1))
    assert torch.equal(found.order, orders)
    assert torch.equal(state.embeds, mixed.pred_embeds[:, 1].gather(1, orders[:, 1, :, None].expand(-1, -1, C)))


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [1, 3, T])
@torch.no_grad()
def test_windows_carry_the_state(plus: bool, size: int) -> None:
    mixed, _ = shuffled(clip())
    model, state, found = tracker(plus), None, []
    whole, last = model(mixed, None)
    for start in range(0, T, size):
        output, state = model(part(mixed, slice(None), slice(start, start + size)), state)
        found.append(output)
    assert_same(joined(found, axis=1), whole)
    assert state is not None
    torch.testing.assert_close(state.outputs, last.outputs)
    assert torch.equal(state.embeds, last.embeds)


@pytest.mark.parametrize("plus", [False, True])
@torch.no_grad()
def test_videos_of_a_batch_do_not_see_one_another(plus: bool) -> None:
    mixed, _ = shuffled(clip(videos=3))
    model = tracker(plus).train()
    both, state = model(mixed, None)
    alone = [model(part(mixed, slice(b, b + 1), slice(None)), None) for b in range(3)]
    assert_same(joined([output for output, _ in alone], axis=0), both)
    torch.testing.assert_close(torch.cat([x.outputs for _, x in alone]), state.outputs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_interleaved_videos_and_untouched_inputs() -> None:
    model, videos = tracker(), [shuffled(clip(seed, videos=1), seed)[0] for seed in (6, 7)]
    states: list[Any] = [None, None]
    found: list[list[TrackerOutput]] = [[], []]
    for t in range(T):
        for i, video in enumerate(videos):
            before = None if states[i] is None else states[i].outputs.clone()
            given = states[i]
            output, states[i] = model(part(video, slice(None), slice(t, t + 1)), given)
            assert given is None or torch.equal(given.outputs, before)
            found[i].append(output)
    for i, video in enumerate(videos):
        assert_same(joined(found[i], axis=1), model(video, None)[0])


def test_layers_in_training_and_in_evaluation() -> None:
    model, of = tracker(True), clip()
    assert model(of, None)[0].pred_logits.shape == (1, B, T, Q, K + 1)
    output, _ = model.train()(of, None)
    assert output.pred_logits.shape == (LAYERS, B, T, Q, K + 1)
    assert output.mask_embeds.shape == (LAYERS, B, T, Q, MASK)
    assert output.mask_features.shape == (B, T, MASK, *SIZE)
    sum(x.sum() for x in (output.pred_logits, output.mask_embeds, output.mask_features)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_frame_memory() -> None:
    """DVIS: each frame as the first of a video of its own; DVIS++: the queries as they are."""
    of = clip()
    assert tracker(True).frame_memory(of) is of.raw_embeds
    model = tracker()
    memory = model.frame_memory(of)
    for t in range(T):
        alone, _ = model(part(of, slice(None), slice(t, t + 1)), None)
        torch.testing.assert_close(memory[:, t], alone.pred_embeds[:, 0])


@pytest.mark.parametrize("mode", ["rs", "wa", "cc"])
@torch.no_grad()
def test_noise_only_in_training_and_never_in_the_first_frame(mode: str) -> None:
    of = clip()
    clean, noisy = tracker(), tracker(noise=mode)
    assert_same(noisy(of, None)[0], clean(of, None)[0])
    expected, _ = clean.train()(of, None)
    torch.manual_seed(3)
    found, state = noisy.train()(of, None)
    torch.testing.assert_close(found.pred_logits[:, :, 0], expected.pred_logits[:, :, 0])
    assert torch.equal(found.order[:, 0], expected.order[:, 0])
    for t in range(1, T):
        assert not torch.allclose(found.pred_embeds[:, t], expected.pred_embeds[:, t], atol=1e-2)
        assert not torch.equal(found.order[:, t], expected.order[:, t])
    kept = of.pred_embeds[:, -1].gather(1, found.order[:, -1, :, None].expand(-1, -1, C))
    assert torch.equal(state.embeds, kept)  # the next frame is matched with what the noise made of this one


@torch.no_grad()
def test_noise_persists_in_the_next_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame is shuffled, the next is not: it follows the shuffled slots."""
    model, of, calls = tracker(noise="rs").train(), clip(), []
    draw = model.noise.draw

    def once(order: Tensor, channels: int) -> Any:
        calls.append(order)
        model.noise.ratio = float(len(calls) == 1)
        return draw(order, channels)

    monkeypatch.setattr(model.noise, "draw", once)
    found, _ = model(of, None)
    assert len(calls) == T - 1
    assert not torch.equal(found.order[:, 1], found.order[:, 0])
    for t in range(2, T):
        assert torch.equal(found.order[:, t], found.order[:, 1])


def test_wrong_use() -> None:
    model, of = tracker(), clip()
    with pytest.raises(ValueError, match="no frame"):
        model(part(of, slice(None), slice(0, 0)), None)
    with pytest.raises(ValueError, match="RAW_EMBEDS is True, but the segmenter gives no queries"):
        tracker(True)(replace(of, raw_embeds=None), None)
    with pytest.raises(ValueError, match="MATCHING is 'dvis', expected one of correct, dvis_v1"):
        tracker(matching="dvis")
    with pytest.raises(ValueError, match="DECODER_LAYERS is 0"):
        tracker(num_layers=0)
    of.pred_embeds[1, 2, 3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        model(of, None)
