"""The association block: its windowed attention against one that is written with pads and unfolds; its parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.layers.hybrid_association import (
    ChannelGate,
    DropPath,
    HybridAssociationLayer,
    LocalAttention,
    Memory,
    window_slots,
)
from vis.layers.position_encoding import sine_position_encoding

DIM, HEADS = 12, 3


def local_attention(radius: int) -> LocalAttention:
    torch.manual_seed(3)
    module = LocalAttention(dim=DIM, num_heads=HEADS, radius=radius).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def by_unfolding(module: LocalAttention, query: Tensor, memory: Memory, size: tuple[int, int]) -> Tensor:
    """The released arithmetic: keys and values of each window are copied out of padded maps."""
    side, per_head = 2 * module.radius + 1, DIM // HEADS

    def windows(tokens: Tensor) -> Tensor:  # (B, heads, C/heads, slots, L)
        maps = tokens.transpose(1, 2).unflatten(2, size)
        unfolded = F.unfold(maps, side, padding=module.radius)
        return unfolded.unflatten(1, (HEADS, per_head, side * side))

    ones = torch.ones(1, 1, *size, dtype=query.dtype)
    outside = F.unfold(ones, side, padding=module.radius)[:, None] == 0  # (1, 1, slots, L)
    maps = query.transpose(1, 2).unflatten(2, size)
    relative = module.relative_emb(maps).flatten(2).unflatten(1, (HEADS, side * side))
    q = query.transpose(1, 2).unflatten(1, (HEADS, per_head))
    logits = (q[:, :, :, None] / math.sqrt(per_head) * windows(memory.keys)).sum(dim=2) + relative
    weights = logits.masked_fill(outside, -1e8).softmax(dim=2)
    values = windows(memory.values) + module.V_bias
    out = (weights[:, :, None] * values).sum(dim=3)  # (B, heads, C/heads, L)
    return module.fc(out.flatten(1, 2).transpose(1, 2))


@pytest.mark.parametrize(("size", "radius"), [((5, 7), 2), ((3, 4), 7), ((1, 9), 1), ((6, 1), 3), ((1, 1), 2)], ids=str)
def test_windowed_attention_equals_unfolding(size: tuple[int, int], radius: int) -> None:
    module = local_attention(radius)
    tokens = size[0] * size[1]
    query, keys, values = torch.randn(3, 2, tokens, DIM, dtype=torch.float64)
    found = module(query, Memory(keys, values), size)
    torch.testing.assert_close(found, by_unfolding(module, query, Memory(keys, values), size), rtol=1e-6, atol=1e-9)
    weights = module.weights(query, keys, size)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))


def test_windowed_attention_does_not_see_beyond_its_window() -> None:
    module, size = local_attention(1), (4, 6)
    query, keys, values = torch.randn(3, 1, 24, DIM, dtype=torch.float64)
    before = module(query, Memory(keys, values), size)
    far = [i for i in range(24) if i % 6 > 1]  # more than one column from the first
    keys, values = keys.clone(), values.clone()
    keys[:, far], values[:, far] = 9.0, -9.0
    after = module(query, Memory(keys, values), size)
    assert torch.equal(before[:, ::6], after[:, ::6])
    assert not torch.allclose(before[:, 1::6], after[:, 1::6])


def test_slots_are_row_by_row_offsets() -> None:
    at, inside = window_slots(3, 5, 1, torch.device("cpu"))
    assert at.shape == inside.shape == (15, 9)
    assert at[7].tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]  # the token in the middle
    assert inside[0].tolist() == [False] * 4 + [True, True, False, True, True]


def test_positions_may_count_from_zero() -> None:
    pos = sine_position_encoding(3, 5, 8, torch.device("cpu"), first=0)
    assert torch.equal(pos[0, :, 0, 0], torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1]))
    assert pos[0, 0, 2, 0].item() == pytest.approx(math.sin(2 / (2 + 1e-6) * 2 * math.pi), abs=1e-6)


def layer(**options: bool | float) -> HybridAssociationLayer:
    torch.manual_seed(4)
    return HybridAssociationLayer(dim=16, self_heads=4, attn_heads=2, ffn_dim=64, window_radius=2, **options).eval()


@pytest.mark.parametrize("off", ["use_self", "use_local", "use_global"])
def test_parts_of_the_block_can_be_left_out(off: str) -> None:
    block = layer(**{off: False})
    x, pos = torch.randn(2, 15, 16), torch.randn(15, 16)
    far, near = Memory(*torch.randn(2, 2, 30, 16)), Memory(*torch.randn(2, 2, 15, 16))

    def run(far: Memory, near: Memory) -> Tensor:
        seen, _, keys = block.look(x, pos)
        return block.read(seen, keys, far, near, (3, 5))

    out = run(far, near)
    other_far = run(Memory(*torch.randn(2, 2, 30, 16)), near)
    other_near = run(far, Memory(*torch.randn(2, 2, 15, 16)))
    assert torch.equal(out, other_far) == (off == "use_global")
    assert torch.equal(out, other_near) == (off == "use_local")
    assert torch.equal(block.look(x, pos)[0], x) == (off == "use_self")


def test_gate_begins_as_identity_and_weights_as_xavier() -> None:
    block, x = layer(), torch.randn(2, 64, 3, 5)
    assert torch.equal(block.activation.GCT(x), x)
    assert not block.short_term_attn.V_bias.any()
    bound = math.sqrt(6 / 32)
    assert block.linear_Q.weight.abs().max() <= bound
    gate = ChannelGate(3)
    with torch.no_grad():
        gate.beta.fill_(math.atanh(0.5))
    torch.testing.assert_close(gate(x[:, :3]), 1.5 * x[:, :3])


def test_dropped_paths_are_of_frames_or_of_tokens() -> None:
    x = torch.ones(40, 30, 2)
    for per_token in (False, True):
        torch.manual_seed(0)
        out = DropPath(0.25, per_token=per_token).train()(x)
        assert out.unique().tolist() == pytest.approx([0, 4 / 3])
        by_frame = out.flatten(1)
        whole = (by_frame == by_frame[:, :1]).all(dim=1)
        assert bool(whole.all()) is not per_token
        assert (out[..., 0] == out[..., 1]).all()
    assert torch.equal(DropPath(0.25).eval()(x), x)
    with pytest.raises(ValueError, match="DROP_PATH"):
        DropPath(1.0)


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        HybridAssociationLayer(dim=16, self_heads=3, attn_heads=2, ffn_dim=64, window_radius=2)
