"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, section 4.1): the op and its module.

The op is a function of tensors; :class:`MSDeformAttn` is a thin shell around it with the released parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vis.layers.linear import Linear

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def shape_pairs(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """The L level sizes (h, w) as Python integers.

    Raises:
        ValueError: a tensor on an accelerator was given; reading it would stall the device at every call.
    """
    return [(int(h), int(w)) for h, w in _on_host(spatial_shapes, "spatial_shapes")]


def _on_host(values: Sequence[Any] | Tensor, name: str) -> Sequence[Any]:
    if not isinstance(values, Tensor):
        return values
    if values.device.type != "cpu":
        raise ValueError(
            f"{name} lies on {values.device}; pass Python ints or a CPU tensor, so that no call waits for the device"
        )
    return values.tolist()


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum of bilinear samples of ``value``, weighted by attention, over the levels and points of each query and head.

    Args:
        value: (N, S, M, D) features of all levels, S = sum of h*w, M heads of D channels.
        spatial_shapes: the L level sizes (h, w), as ints or a CPU tensor (L, 2).
        level_start_index: (L,) first row of each level in S.
        sampling_locations: (N, Lq, M, L, P, 2) as (x, y), 0..1 over the level; outside of it the value is zero.
        attention_weights: (N, Lq, M, L, P).

    Returns:
        (N, Lq, M*D) in the dtype of ``value``.

    Raises:
        ValueError: the sizes do not fit one another.
    """
    shapes = shape_pairs(spatial_shapes)
    starts = [int(start) for start in _on_host(level_start_index, "level_start_index")]
    _check_sizes(value, shapes, starts, sampling_locations, attention_weights)
    arguments = (value, shapes, starts, sampling_locations, attention_weights)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (value, sampling_locations, attention_weights))):
        return _weighted_samples(*arguments)
    # Rows and weights of the samples are several times the size of everything else in the layer. They are cheap to
    # compute, so the backward pass does that again instead of keeping them for every layer.
    return checkpoint(_weighted_samples, *arguments, use_reentrant=False, preserve_rng_state=False)


def _weighted_samples(
    value: Tensor,
    shapes: list[tuple[int, int]],
    starts: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    n, s, m, d = value.shape
    lq, levels, points = sampling_locations.shape[1], sampling_locations.shape[3], sampling_locations.shape[4]

    # Row of `value`, seen as a table (N*S*M, D), and weight of the four neighbours of every sample. One embedding_bag
    # then gathers, weights and adds: it keeps D contiguous and stores no sample, unlike grid_sample per level.
    device, dtype = value.device, sampling_locations.dtype
    integer = torch.int32 if n * s * m < 2**31 else torch.int64
    size = torch.tensor([[w, h] for h, w in shapes], device=device)  # (L, 2) as (w, h)
    start = torch.tensor(starts, device=device, dtype=integer)[:, None]  # (L, 1)
    image = torch.arange(n, device=device, dtype=integer).view(n, 1, 1, 1, 1) * s
    head = torch.arange(m, device=device, dtype=integer).view(1, 1, m, 1, 1)
    position = sampling_locations * size.to(dtype)[:, None] - 0.5  # (N, Lq, M, L, P, 2), pixel centres at integers
    columns = _neighbours(position[..., 0], size[:, 0, None], integer)
    lines = _neighbours(position[..., 1], size[:, 1, None], integer)
    width = size[:, 0, None].to(integer)
    rows, weights = [], []
    for y, share_y in lines:
        line, share = (y * width + (start + image)) * m + head, share_y * attention_weights
        for x, share_x in columns:
            rows.append(line + x * m)
            weights.append(share_x * share)
    bags = (n * lq * m, 4 * levels * points)
    out = F.embedding_bag(
        torch.stack(rows, dim=-1).view(bags),
        value.reshape(n * s * m, d),
        per_sample_weights=torch.stack(weights, dim=-1).view(bags).to(value.dtype),
        mode="sum",
    )
    return out.view(n, lq, m * d)


def _neighbours(position: Tensor, size: Tensor, integer: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The two cells beside ``position`` along one axis of ``size`` cells, and their shares; 0 for a cell outside."""
    lower = position.floor()
    share = position - lower
    both = []
    for cell, weight in ((lower, 1 - share), (lower + 1, share)):
        outside = (cell < 0) | (cell >= size)
        # Filled while still a float: positions far outside, and NaN, would not fit the integer. A share is filled, not
        # multiplied by 0: it is NaN where the position has overflowed. A NaN position is not outside and stays visible.
        index = cell.masked_fill(outside | cell.isnan(), 0).to(integer)
        both.append((index, weight.masked_fill(outside, 0)))
    return both


def _check_sizes(
    value: Tensor, shapes: list[tuple[int, int]], starts: list[int], locations: Tensor, weights: Tensor
) -> None:
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(
            f"value is {tuple(value.shape)} and sampling_locations {tuple(locations.shape)}, "
            "expected (N, S, M, D) and (N, Lq, M, L, P, 2)"
        )
    total = sum(h * w for h, w in shapes)
    if total != value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} rows, but the levels {shapes} need {total}")
    if len(starts) != len(shapes) or any(
        not 0 <= start <= total - h * w for start, (h, w) in zip(starts, shapes, strict=False)
    ):
        raise ValueError(f"level_start_index is {starts}, which does not place the levels {shapes} in {total} rows")
    expected = (value.shape[0], locations.shape[1], value.shape[2], len(shapes), locations.shape[4], 2)
    if tuple(locations.shape) != expected:
        raise ValueError(f"sampling_locations is {tuple(locations.shape)}, expected (N, Lq, M, L, P, 2) = {expected}")
    if tuple(weights.shape) != expected[:-1]:
        raise ValueError(f"attention_weights is {tuple(weights.shape)}, expected (N, Lq, M, L, P) = {expected[:-1]}")


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
        offsets = self.sampling_offsets(query).view(*heads, 2)
        weights = self.attention_weights(query).view(n, lq, self.num_heads, -1).softmax(dim=-1).view(heads)
        size = torch.tensor([[w, h] for h, w in shapes], device=query.device, dtype=offsets.dtype)
        locations = reference_points[:, :, None, :, None, :] + offsets / size[:, None]
        return self.output_proj(ms_deform_attn(value, shapes, level_start_index, locations, weights))
