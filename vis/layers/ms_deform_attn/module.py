"""The module around the op, with the released parameter names and initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vis.layers.linear import Linear
from vis.layers.ms_deform_attn.op import SpatialShapes, ms_deform_attn, position_dtype, shape_pairs


class MSDeformAttn(nn.Module):
    """Deformable attention over several feature levels with learned offsets and weights."""

    def __init__(self, *, embed_dim: int = 256, num_levels: int = 3, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = Linear(embed_dim, embed_dim)
        self.output_proj = Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point p of head h starts p+1 pixels away in the direction of angle 2*pi*h/M; all points weigh the same."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        grid = direction[:, None, None, :] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid.expand(-1, self.num_levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        source: Tensor,
        spatial_shapes: SpatialShapes,
        level_start_index: Sequence[int] | Tensor,
    ) -> Tensor:
        """Attend from ``query`` (N, Lq, C) to ``source`` (N, S, C).

        Args:
            reference_points: (1 or N, Lq, L or 1, 2) as (x, y) in 0..1.
            spatial_shapes, level_start_index: as in :func:`ms_deform_attn`.

        Returns:
            (N, Lq, C).
        """
        n, lq, _ = query.shape
        shapes = shape_pairs(spatial_shapes)
        heads = (n, lq, self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(source).view(n, source.shape[1], self.num_heads, -1)
        # Linear layers may run in half precision (autocast, model.half()); positions are added up in float32.
        position = position_dtype(value.dtype)
        offsets = self.sampling_offsets(query).view(*heads, 2).to(position)
        weights = self.attention_weights(query).view(n, lq, self.num_heads, -1).softmax(dim=-1).view(heads)
        size = torch.tensor([[w, h] for h, w in shapes], device=query.device, dtype=position)
        locations = reference_points.to(position)[:, :, None, :, None, :] + offsets / size[:, None]
        return self.output_proj(ms_deform_attn(value, shapes, level_start_index, locations, weights))
