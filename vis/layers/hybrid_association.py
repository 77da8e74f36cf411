"""The hybrid association block (Zhu et al., "Instance As Identity", ECCV 2022, section 3.2).

A transformer layer over the tokens of one frame, which attends to itself, to the frame before within a window, and to
a growing set of earlier frames. It is the long short-term transformer of AOT (Yang et al., NeurIPS 2021, section 3.4),
with the released attribute names. The window is read out of one dense product of queries and keys: with some hundred
tokens that costs little and needs no operator of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.layers.linear import Linear


class Memory(NamedTuple):
    """What tokens attend to: keys and values, both (B, tokens, C)."""

    keys: Tensor
    values: Tensor


class ChannelGate(nn.Module):
    """Gated channel transformation (Yang et al., CVPR 2020) with the l2 norm: channels compete by their energy."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares do not fit into half precision
        energy = self.alpha * (wide.square().sum(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
        norm = self.gamma / (energy.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return x * (1 + torch.tanh(energy * norm + self.beta)).to(x.dtype)


class MapActivation(nn.Module):
    """Middle of the feed-forward part, on the map: group norm, GELU, channel gate, depth-wise 5x5 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gn = nn.GroupNorm(min(32, channels), channels)
        self.GCT = ChannelGate(channels)
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, h*w, C) -> (B, h*w, C)."""
        x = self.gn(x.transpose(1, 2).unflatten(2, size))  # (B, C, h, w)
        x = self.conv(self.GCT(F.gelu(x)))
        return x.flatten(2).transpose(1, 2)


def _heads(x: Tensor, count: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, C/heads)."""
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, num_heads: int, allowed: Tensor | None = None) -> Tensor:
    """Attention of several heads without projections: (B, L, C), (B, M, C), (B, M, C) -> (B, L, C)."""
    q, k, v = (_heads(x, num_heads) for x in (query, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention among the tokens of a frame, positions in queries and keys."""

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_Q, self.linear_K, self.linear_V = (Linear(dim, dim) for _ in range(3))
        self.projection = Linear(dim, dim)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """(B, L, C), ``pos`` (L, C) -> (B, L, C)."""
        at = x + pos
        return self.projection(_attend(self.linear_Q(at), self.linear_K(at), self.linear_V(x), self.num_heads))


class GlobalAttention(nn.Module):
    """Attention to all tokens of the stored frames; queries and keys come projected."""

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projection = Linear(dim, dim)

    def forward(self, query: Tensor, memory: Memory, allowed: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C); ``allowed`` (B, 1, L, M) bool, True where a token may look."""
        return self.projection(_attend(query, memory.keys, memory.values, self.num_heads, allowed))


class LocalAttention(nn.Module):
    """Attention to the frame before within ``radius`` of a token, with learned terms for each offset.

    For the offset (dy, dx) of slot s = (dy + radius) * (2 * radius + 1) + dx + radius the logit of a query q gets
    ``relative_emb(q)[s]``, from the query before its scaling, and the value ``V_bias[:, s]`` is added to the key's.
    """

    def __init__(self, *, dim: int, num_heads: int, radius: int) -> None:
        super().__init__()
        self.num_heads, self.radius = num_heads, radius
        slots = (2 * radius + 1) ** 2
        self.relative_emb = nn.Conv2d(dim, num_heads * slots, 1, groups=num_heads)
        self.V_bias = nn.Parameter(torch.zeros(1, num_heads, dim // num_heads, slots, 1))
        self.fc = Linear(dim, dim)

    def weights(self, query: Tensor, keys: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, L, C), (B, L, C) -> (B, heads, L, slots), rows sum to one, 0 for a slot outside of the map."""
        at, inside = window_slots(*size, self.radius, query.device)
        q, k = _heads(query, self.num_heads), _heads(keys, self.num_heads)
        logits = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        logits = logits.gather(3, at.expand(*logits.shape[:3], -1))
        relative = self.relative_emb(query.transpose(1, 2)[..., None])  # (B, heads*slots, L, 1)
        logits = logits + relative[..., 0].unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        return logits.masked_fill(~inside, -math.inf).softmax(dim=-1)

    def forward(self, query: Tensor, memory: Memory, size: tuple[int, int]) -> Tensor:
        """(B, L, C), L = h*w tokens of ``size`` (h, w) -> (B, L, C)."""
        slots = self.weights(query, memory.keys, size)
        at, _ = window_slots(*size, self.radius, query.device)
        values = _heads(memory.values, self.num_heads)
        # Slots outside of the map have weight 0, wherever their index points.
        dense = slots.new_zeros(*slots.shape[:3], values.shape[2]).scatter_add(3, at.expand_as(slots), slots)
        out = dense.to(values.dtype) @ values + slots @ self.V_bias[..., 0].transpose(2, 3).to(slots.dtype)
        return self.fc(out.transpose(1, 2).flatten(2))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
def window_slots(height: int, width: int, radius: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token and slot of its window the token there, and whether there is one: both (h*w, slots).

    Where there is none the index is 0. The result depends on the sizes alone and is cached: do not change it in place.
    """
    offset = torch.arange(-radius, radius + 1, device=device)
    y = torch.arange(height, device=device)[:, None] + offset  # (h, side)
    x = torch.arange(width, device=device)[:, None] + offset  # (w, side)
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[None, :, None, :]
    at = (y[:, None, :, None] * width + x[None, :, None, :]).masked_fill(~inside, 0)
    return at.reshape(height * width, -1), inside.reshape(height * width, -1)


class DropPath(nn.Module):
    """Leaves out a residual branch at random, for a whole frame, or (as released) for each token by itself."""

    def __init__(self, probability: float, *, per_token: bool = False) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"MODEL.IAI.DROP_PATH is {probability}, expected a probability in 0 <= p < 1")
        self.drop_prob, self.per_token = probability, per_token

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        if not self.training or self.drop_prob == 0:
            return x
        shape = (x.shape[0], x.shape[1] if self.per_token else 1, 1)
        keep = torch.rand(shape, device=x.device) >= self.drop_prob
        return x * keep.to(x.dtype) / (1 - self.drop_prob)


class HybridAssociationLayer(nn.Module):
    """One layer. It runs in two steps, since what a frame offers as memory does not depend on what it reads."""

    def __init__(
        self,
        *,
        dim: int,
        self_heads: int,
        attn_heads: int,
        ffn_dim: int,
        window_radius: int,
        drop_path: float = 0.0,
        drop_per_token: bool = False,
        drop_global: bool = False,
        use_self: bool = True,
        use_local: bool = True,
        use_global: bool = True,
    ) -> None:
        """Args:
        drop_global: the residual of the attention to stored frames is dropped at random like the others (released: in
            all layers but the first).
        use_self, use_local, use_global: the parts of the block (paper, Table 5).
        """
        super().__init__()
        for heads in (self_heads, attn_heads):
            if dim % heads:
                raise ValueError(f"MODEL.IAI.DIM is {dim}, which {heads} attention heads do not divide")
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.linear_Q, self.linear_V = Linear(dim, dim), Linear(dim, dim)
        if use_self:
            self.norm2 = nn.LayerNorm(dim)
            self.self_attn = SelfAttention(dim=dim, num_heads=self_heads)
        if use_global:
            self.long_term_attn = GlobalAttention(dim=dim, num_heads=attn_heads)
        if use_local:
            self.short_term_attn = LocalAttention(dim=dim, num_heads=attn_heads, radius=window_radius)
        self.linear1, self.linear2 = Linear(dim, ffn_dim), Linear(ffn_dim, dim)
        self.activation = MapActivation(ffn_dim)
        self.drop_path = DropPath(drop_path, per_token=drop_per_token)
        self.use_self, self.use_local, self.use_global = use_self, use_local, use_global
        self.drop_global = drop_global
        for parameter in self.parameters():
            if parameter.dim() == 2 or (parameter.dim() == 4 and parameter.shape[0] > 1):
                nn.init.xavier_uniform_(parameter)

    def look(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L, C) after self-attention, the same normalised (what values are made of), and queries = keys."""
        if self.use_self:
            x = x + self.drop_path(self.self_attn(self.norm2(x), pos))
        normed = self.norm1(x)
        return x, normed, self.linear_Q(normed)

    def values(self, normed: Tensor, id_embeds: Tensor) -> Tensor:
        """What a frame offers as memory: ``normed`` of :meth:`look` and its identities (B, L, C) -> (B, L, C)."""
        return self.linear_V(normed + id_embeds)

    def read(
        self,
        x: Tensor,
        query: Tensor,
        stored: Memory,
        before: Memory,
        size: tuple[int, int],
        allowed: Tensor | None = None,
    ) -> Tensor:
        """``x`` and ``query`` of :meth:`look` (B, L, C), with what the memories say -> (B, L, C).

        Args:
            stored: tokens of all stored frames; before: those of the frame before; allowed: see
                :class:`GlobalAttention`; size: (h, w) of a frame's tokens.
        """
        y = x
        if self.use_global:
            far = self.long_term_attn(query, stored, allowed)
            y = y + (self.drop_path(far) if self.drop_global else far)
        if self.use_local:
            y = y + self.drop_path(self.short_term_attn(query, before, size))
        hidden = self.activation(self.linear1(self.norm3(y)), size)
        return y + self.drop_path(self.linear2(hidden))
