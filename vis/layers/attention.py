"""Attention layers with the parameter names of the released state dicts, batch first, on fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.layers.linear import Linear, linear


class MultiheadAttention(nn.Module):
    """Dot-product attention with ``nn.MultiheadAttention``'s parameters (in_proj ordered q, k, v).

    It differs in taking the mask as "may attend" and one for all heads, which fused attention uses without a copy.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend from ``query`` (B, Lq, C) to ``key``, ``value`` (B, Lk, C).

        Args:
            allowed: (B, 1, Lq, Lk) bool, True where a query may look; every row needs at least one True.

        Returns:
            (B, Lq, C).
        """
        dim = query.shape[-1]
        weights = self.in_proj_weight.split(dim)
        biases = self.in_proj_bias.split(dim)
        q, k, v = (
            linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SelfAttentionLayer(nn.Module):
    """Self-attention among queries with residual and layer norm (after it, or before with ``pre_norm``)."""

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, query_pos: Tensor | None = None) -> Tensor:
        """(B, Q, C) -> (B, Q, C); ``query_pos`` is added to queries and keys."""
        y = self.norm(x) if self.pre_norm else x
        with_pos = y if query_pos is None else y + query_pos
        out = x + self.dropout(self.self_attn(with_pos, with_pos, y))
        return out if self.pre_norm else self.norm(out)


class CrossAttentionLayer(nn.Module):
    """Attention from queries to a memory with residual and layer norm."""

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(
        self, x: Tensor, memory: Tensor, *, query_pos: Tensor, memory_pos: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """(B, Q, C) -> (B, Q, C), looking at ``memory`` (B, L, C) where ``allowed`` (B, 1, Q, L) is True."""
        y = self.norm(x) if self.pre_norm else x
        out = x + self.dropout(self.multihead_attn(y + query_pos, memory + memory_pos, memory, allowed))
        return out if self.pre_norm else self.norm(out)


class FFNLayer(nn.Module):
    """Two linear layers with ReLU, residual and layer norm."""

    def __init__(self, *, embed_dim: int, hidden_dim: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.linear1 = Linear(embed_dim, hidden_dim)
        self.linear2 = Linear(hidden_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y = self.norm(x) if self.pre_norm else x
        out = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(y)))))
        return out if self.pre_norm else self.norm(out)
