"""The deformable-attention module against sampled grids."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.layers.ms_deform_attn import MSDeformAttn

SHAPES = [(2, 5), (4, 3), (7, 6)]
STARTS = [0, 10, 22]
ROWS = 64


def by_grid_sample(module: MSDeformAttn, query: Tensor, reference: Tensor, source: Tensor) -> Tensor:
    """The module's formula with a grid for each level: location = reference + offset / (w, h)."""
    n, queries, dim = query.shape
    m, points, d = module.num_heads, module.num_points, dim // module.num_heads
    values = module.value_proj(source).view(n, -1, m, d)
    offsets = module.sampling_offsets(query).view(n, queries, m, len(SHAPES), points, 2)
    weights = module.attention_weights(query).view(n, queries, m, -1).softmax(-1).view(offsets.shape[:-1])
    total = query.new_zeros(n, queries, m, d)
    for level, ((h, w), start) in enumerate(zip(SHAPES, STARTS, strict=True)):
        maps = values[:, start : start + h * w].permute(0, 2, 3, 1).reshape(n * m, d, h, w)
        at = reference[:, :, min(level, reference.shape[2] - 1)][:, :, None, None]
        grid = 2 * (at + offsets[:, :, :, level] / query.new_tensor([w, h])) - 1
        grid = grid.transpose(1, 2).reshape(n * m, queries, points, 2)
        sampled = F.grid_sample(maps, grid, align_corners=False).view(n, m, d, queries, points)
        total = total + torch.einsum("nmdqp,nqmp->nqmd", sampled, weights[:, :, :, level])
    return module.output_proj(total.flatten(2))


@pytest.mark.parametrize("reference_shape", [(1, 6, 1, 2), (2, 6, 3, 2)])
def test_module_equals_grid_sample(reference_shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    module = MSDeformAttn(embed_dim=12, num_levels=3, num_heads=4, num_points=2).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    query, source = torch.randn(2, 6, 12).double(), torch.randn(2, ROWS, 12).double()
    reference = torch.rand(reference_shape).double()
    expected = by_grid_sample(module, query, reference, source)
    found = module(query, reference, source, SHAPES, STARTS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    got = torch.autograd.grad(found.square().sum(), list(module.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_initial_offsets_and_weights() -> None:
    module = MSDeformAttn(embed_dim=16, num_levels=3, num_heads=8, num_points=4)
    bias = module.sampling_offsets.bias.detach().view(8, 3, 4, 2)
    around = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]  # (x, y), angle 2*pi*h/8
    for head, direction in enumerate(around):
        for point in range(4):
            expected = torch.tensor(direction).float() * (point + 1)
            torch.testing.assert_close(bias[head, :, point], expected.expand(3, 2), atol=1e-5, rtol=0)
    for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert float(module.value_proj.weight.detach().abs().max()) <= math.sqrt(6 / 32)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="10 must be divisible by num_heads 4"):
        MSDeformAttn(embed_dim=10, num_heads=4)


def forward(module: MSDeformAttn, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    query, source = torch.randn(2, 6, 24, generator=generator), torch.randn(2, ROWS, 24, generator=generator)
    return module(
        query.to(dtype), torch.rand(1, 6, 1, 2, generator=generator).to(dtype), source.to(dtype), SHAPES, STARTS
    )


def test_positions_are_float32_whatever_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    module = MSDeformAttn(embed_dim=24, num_levels=3, num_heads=4, num_points=5)
    expected = forward(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward(module)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    found = forward(module.bfloat16(), torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_module_compiles_into_one_graph() -> None:
    torch.manual_seed(4)
    module = MSDeformAttn(embed_dim=24, num_levels=3, num_heads=4, num_points=5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(compiled), forward(module), rtol=0, atol=1e-5)


class AtFixedSizes(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(embed_dim=12, num_levels=3, num_heads=4, num_points=5)

    def forward(self, query: Tensor, reference: Tensor, source: Tensor) -> Tensor:
        return self.attention(query, reference, source, SHAPES, STARTS)


@pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="before torch 2.6 an export names its dimensions")
@pytest.mark.parametrize("strict", [False, True])
def test_module_is_exported(strict: bool) -> None:
    """With any number of images and queries."""
    torch.manual_seed(4)
    module, several = AtFixedSizes(), torch.export.Dim.AUTO
    given = (torch.randn(2, 6, 12), torch.rand(1, 6, 1, 2), torch.randn(2, ROWS, 12))
    program = torch.export.export(
        module, given, dynamic_shapes=({0: several, 1: several}, {1: several}, {0: several}), strict=strict
    )
    for x in (given, (torch.randn(3, 7, 12), torch.rand(1, 7, 1, 2), torch.randn(3, ROWS, 12))):
        torch.testing.assert_close(program.module()(*x), module(*x), rtol=0, atol=1e-5)
