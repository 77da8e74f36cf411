"""The decoder of Deformable DETR with iterative box refinement (Zhu et al., ICLR 2021, sections 4.1 and A.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.layers.attention import MultiheadAttention
from vis.layers.box_deform_attn import BoxDeformAttn
from vis.layers.linear import Linear

Shapes = list[tuple[int, int]]


class Memory(NamedTuple):
    """What queries look at: cells (N, S, C) of L levels, their shapes and first rows, the valid share of each level
    (N, L, 2) as (width, height), and padded cells (N, S) or None."""

    cells: Tensor
    shapes: Shapes
    starts: list[int]
    valid_ratios: Tensor
    padding: Tensor | None


class DecodedLayer(NamedTuple):
    """One layer's queries (N, Q, C), refined boxes (N, Q, 4) as centre and size, and the points (N, Q, 2) before it."""

    queries: Tensor
    boxes: Tensor
    points: Tensor


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both sides kept above ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention into the memory, feed-forward network; post-norm."""

    def __init__(
        self, *, embed_dim: int, feedforward_dim: int, num_levels: int, num_heads: int, num_points: int, dropout: float
    ) -> None:
        super().__init__()
        self.cross_attn = BoxDeformAttn(
            embed_dim=embed_dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.self_attn = MultiheadAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.linear1 = Linear(embed_dim, feedforward_dim)
        self.linear2 = Linear(feedforward_dim, embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, query_pos: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """(N, Q, C) -> (N, Q, C); ``references`` (N, Q, L, 2 or 4)."""
        with_pos = x + query_pos
        x = self.norm2(x + self.dropout(self.self_attn(with_pos, with_pos, x)))
        found = self.cross_attn(x + query_pos, references, memory.cells, memory.shapes, memory.starts, memory.padding)
        x = self.norm1(x + self.dropout(found))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableDecoder(nn.Module):
    """A stack of layers, each of which refines the boxes of the one before."""

    def __init__(
        self,
        *,
        num_layers: int,
        bbox_embed: nn.ModuleList,
        embed_dim: int,
        feedforward_dim: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
        dropout: float,
    ) -> None:
        """Args: ``bbox_embed``: for each layer a head from queries to four box deltas."""
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(
                embed_dim=embed_dim,
                feedforward_dim=feedforward_dim,
                num_levels=num_levels,
                num_heads=num_heads,
                num_points=num_points,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.bbox_embed = bbox_embed

    def forward(self, x: Tensor, query_pos: Tensor, points: Tensor, memory: Memory) -> list[DecodedLayer]:
        """Queries (N, Q, C) from ``points`` (N, Q, 2), (x, y) in 0..1 -> every layer's result.

        The box of a layer has a gradient to its own queries and head; what the next layer starts from has none.
        """
        decoded = []
        references = points
        ratios = memory.valid_ratios[:, None]  # (N, 1, L, 2)
        for layer, bbox_embed in zip(self.layers, self.bbox_embed, strict=True):
            scale = ratios if references.shape[-1] == 2 else torch.cat([ratios, ratios], dim=-1)
            x = layer(x, query_pos, references[:, :, None] * scale, memory)
            delta = bbox_embed(x)
            known = inverse_sigmoid(references)
            # A point has no size yet: width and height come from the head alone.
            boxes = (delta + F.pad(known, (0, 4 - known.shape[-1]))).sigmoid()
            decoded.append(DecodedLayer(x, boxes, references[..., :2]))
            references = boxes.detach()
        return decoded


def stacked_boxes(decoded: Sequence[DecodedLayer]) -> Tensor:
    """(layers, N, Q, 4)."""
    return torch.stack([layer.boxes for layer in decoded])
