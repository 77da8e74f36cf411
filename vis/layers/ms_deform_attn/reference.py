"""The op in plain PyTorch: for devices without a kernel, for export to ONNX, and as what the kernels are compared with.

Arguments are those of :func:`vis.layers.ms_deform_attn.ms_deform_attn`, checked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def gathered(
    value: Tensor,
    shapes: list[tuple[int, int]],
    starts: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The backend "torch": one gather over all levels."""
    arguments = (value, shapes, starts, sampling_locations, attention_weights)
    differentiated = torch.is_grad_enabled() and any(
        x.requires_grad for x in (value, sampling_locations, attention_weights)
    )
    if not differentiated or torch.compiler.is_compiling():  # a compiler decides itself what to compute again
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

    if 0 in (levels, points):
        nothing = value[:, :0].sum() + sampling_locations.sum() + attention_weights.sum()  # 0, and part of the graph
        return value.new_zeros(n, lq, m * d) + nothing.to(value.dtype)

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


def by_grid_sample(
    value: Tensor,
    shapes: list[tuple[int, int]],
    starts: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """One ``grid_sample`` for each level: operators that every exporter knows; slower than :func:`gathered`."""
    n, _, m, d = value.shape
    lq, points = sampling_locations.shape[1], sampling_locations.shape[4]
    grids = (2 * sampling_locations - 1).to(value.dtype)
    levels = []
    for level, ((h, w), start) in enumerate(zip(shapes, starts, strict=True)):
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(n * m, d, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(n * m, lq, points, 2)
        levels.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.cat(levels, dim=-1)  # (N*M, D, Lq, L*P)
    weights = attention_weights.to(value.dtype).transpose(1, 2).reshape(n * m, 1, lq, len(shapes) * points)
    return (sampled * weights).sum(-1).view(n, m * d, lq).transpose(1, 2)
