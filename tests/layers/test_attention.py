"""Attention layers against torch's own multi-head attention with the same state dict."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.layers.attention import CrossAttentionLayer, FFNLayer, MultiheadAttention, SelfAttentionLayer
from vis.layers.mlp import MLP

N, Q, L, C, HEADS = 2, 5, 7, 12, 3


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6)
    return module.eval()


def torch_attention(module: nn.Module) -> nn.MultiheadAttention:
    other = nn.MultiheadAttention(C, HEADS, batch_first=True).eval()
    other.load_state_dict(module.state_dict())  # strict: the same names and shapes
    return other


def rows_allowed() -> Tensor:
    allowed = torch.rand(N, 1, Q, L, generator=torch.Generator().manual_seed(2)) > 0.6
    allowed[..., 3] = True
    return allowed


@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch(masked: bool) -> None:
    module = randomised(MultiheadAttention(embed_dim=C, num_heads=HEADS))
    query, key, value = torch.randn(N, Q, C), torch.randn(N, L, C), torch.randn(N, L, C)
    allowed = rows_allowed() if masked else None
    forbidden = None if allowed is None else ~allowed[:, 0].repeat_interleave(HEADS, dim=0)
    expected, _ = torch_attention(module)(query, key, value, attn_mask=forbidden)
    torch.testing.assert_close(module(query, key, value, allowed), expected, rtol=1e-5, atol=1e-5)


def test_forbidden_places_have_no_influence() -> None:
    module = randomised(MultiheadAttention(embed_dim=C, num_heads=HEADS))
    query, memory, allowed = torch.randn(N, Q, C), torch.randn(N, L, C), torch.ones(N, 1, Q, L, dtype=torch.bool)
    allowed[:, :, 2, 4] = False
    before = module(query, memory, memory, allowed)
    changed = memory.clone()
    changed[:, 4] += 3
    after = module(query, changed, changed, allowed)
    assert torch.equal(before[:, 2], after[:, 2])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_dropout_only_in_training() -> None:
    module = randomised(MultiheadAttention(embed_dim=C, num_heads=HEADS, dropout=0.5))
    x = torch.randn(N, Q, C)
    assert torch.equal(module(x, x, x), module(x, x, x))
    module.train()
    assert not torch.equal(module(x, x, x), module(x, x, x))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("positioned", [False, True])
def test_self_attention_layer(pre_norm: bool, positioned: bool) -> None:
    layer = randomised(SelfAttentionLayer(embed_dim=C, num_heads=HEADS, pre_norm=pre_norm))
    x, pos = torch.randn(N, Q, C), torch.randn(Q, C)
    y = layer.norm(x) if pre_norm else x
    looked = y + pos if positioned else y
    attended, _ = torch_attention(layer.self_attn)(looked, looked, y)  # no position in the value
    expected = x + attended if pre_norm else layer.norm(x + attended)
    torch.testing.assert_close(layer(x, pos if positioned else None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_cross_attention_layer(pre_norm: bool) -> None:
    layer = randomised(CrossAttentionLayer(embed_dim=C, num_heads=HEADS, pre_norm=pre_norm))
    x, memory, pos, memory_pos = (
        torch.randn(N, Q, C),
        torch.randn(N, L, C),
        torch.randn(Q, C),
        torch.randn(1, L, C),
    )
    allowed = rows_allowed()
    y = layer.norm(x) if pre_norm else x
    forbidden = ~allowed[:, 0].repeat_interleave(HEADS, dim=0)
    attended, _ = torch_attention(layer.multihead_attn)(y + pos, memory + memory_pos, memory, attn_mask=forbidden)
    expected = x + attended if pre_norm else layer.norm(x + attended)
    found = layer(x, memory, query_pos=pos, memory_pos=memory_pos, allowed=allowed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_feed_forward_layer(pre_norm: bool) -> None:
    layer = randomised(FFNLayer(embed_dim=C, hidden_dim=17, pre_norm=pre_norm))
    x = torch.randn(N, Q, C)
    state = layer.state_dict()
    y = F.layer_norm(x, (C,), state["norm.weight"], state["norm.bias"]) if pre_norm else x
    hidden = (y @ state["linear1.weight"].T + state["linear1.bias"]).clamp(min=0)
    out = x + hidden @ state["linear2.weight"].T + state["linear2.bias"]
    expected = out if pre_norm else F.layer_norm(out, (C,), state["norm.weight"], state["norm.bias"])
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_mlp() -> None:
    mlp = randomised(MLP(input_dim=4, hidden_dim=9, output_dim=5))
    state = mlp.state_dict()
    assert sorted(state) == [f"layers.{i}.{kind}" for i in range(3) for kind in ("bias", "weight")]
    x = torch.randn(2, 3, 4)
    y = x
    for i in range(3):
        y = y @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        y = y.clamp(min=0) if i < 2 else y
    torch.testing.assert_close(mlp(x), y)
    assert float(y.min()) < 0  # no ReLU at the end


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="embed_dim 10 must be divisible by num_heads 3"):
        MultiheadAttention(embed_dim=10, num_heads=3)
