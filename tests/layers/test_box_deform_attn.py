"""Deformable attention with boxes and padding, against the plain module and against sampling one point at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vis.layers.box_deform_attn import BoxDeformAttn
from vis.layers.ms_deform_attn import MSDeformAttn

SHAPES = [(6, 10), (3, 5)]
STARTS = [0, 60]
N, Q, C, HEADS, POINTS = 2, 7, 12, 3, 4


def modules() -> tuple[BoxDeformAttn, MSDeformAttn]:
    torch.manual_seed(0)
    attention = BoxDeformAttn(embed_dim=C, num_levels=2, num_heads=HEADS, num_points=POINTS)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    plain = MSDeformAttn(embed_dim=C, num_levels=2, num_heads=HEADS, num_points=POINTS)
    plain.load_state_dict(attention.state_dict())
    return attention, plain


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, Q, C), torch.randn(N, 75, C)


def test_points_as_in_the_plain_module() -> None:
    attention, plain = modules()
    query, source = inputs()
    points = torch.rand(N, Q, 2, 2)
    torch.testing.assert_close(
        attention(query, points, source, SHAPES, STARTS), plain(query, points, source, SHAPES, STARTS)
    )


def test_boxes_scale_offsets() -> None:
    """Around a box of 2 * num_points cells, offsets count cells as around a point; twice the box, twice the offset."""
    attention, plain = modules()
    query, source = inputs()
    centre = torch.rand(N, Q, 1, 2).expand(-1, -1, 2, -1)
    cells = torch.tensor([[2 * POINTS / w, 2 * POINTS / h] for h, w in SHAPES]).expand(N, Q, -1, -1)
    torch.testing.assert_close(
        attention(query, torch.cat([centre, cells], -1), source, SHAPES, STARTS),
        plain(query, centre, source, SHAPES, STARTS),
    )
    with torch.no_grad():
        plain.sampling_offsets.weight.mul_(2)
        plain.sampling_offsets.bias.mul_(2)
    torch.testing.assert_close(
        attention(query, torch.cat([centre, 2 * cells], -1), source, SHAPES, STARTS),
        plain(query, centre, source, SHAPES, STARTS),
    )


def test_padding_reads_as_zero() -> None:
    """Whatever lies in padded rows has no effect, and the value's bias is not read there either."""
    attention, _ = modules()
    query, source = inputs()
    points = torch.rand(N, Q, 2, 2)
    padding = torch.rand(N, 75) < 0.4
    found = attention(query, points, source, SHAPES, STARTS, padding)
    changed = torch.where(padding[..., None], torch.full_like(source, 7.0), source)
    torch.testing.assert_close(attention(query, points, changed, SHAPES, STARTS, padding), found)
    everything = attention(query, points, source, SHAPES, STARTS, torch.ones(N, 75, dtype=torch.bool))
    torch.testing.assert_close(everything, attention.output_proj.bias.expand(N, Q, C))
