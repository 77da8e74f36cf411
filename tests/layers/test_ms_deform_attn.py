"""The deformable-attention op against a loop that follows its definition, and its module against sampled grids."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.layers.ms_deform_attn import MSDeformAttn, ms_deform_attn

SHAPES = [(2, 5), (4, 3), (7, 6)]
STARTS = [0, 10, 22]
ROWS, HEADS, CHANNELS, QUERIES, POINTS = 64, 2, 3, 4, 5


def arguments(n: int, spread: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations (some of them outside of the levels) and weights."""
    generator = torch.Generator().manual_seed(7)
    value = torch.randn(n, ROWS, HEADS, CHANNELS, generator=generator, dtype=dtype)
    cells = torch.rand(n, QUERIES, HEADS, len(SHAPES), POINTS, 2, generator=generator, dtype=dtype)
    weights = torch.randn(n, QUERIES, HEADS, len(SHAPES), POINTS, generator=generator, dtype=dtype)
    return value, cells * (1 + 2 * spread) - spread, weights.flatten(3).softmax(-1).view_as(weights)


def pixel(value: Tensor, level: int, y: int, x: int) -> Tensor:
    """One cell (D,) of a level of (S, D); zero outside."""
    height, width = SHAPES[level]
    if not (0 <= y < height and 0 <= x < width):
        return value.new_zeros(value.shape[-1])
    return value[STARTS[level] + y * width + x]


def by_loop(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    n, queries, heads = locations.shape[:3]
    out = value.new_zeros(n, queries, heads, value.shape[-1])
    for i, q, m, level, p in torch.cartesian_prod(*map(torch.arange, locations.shape[:-1])).tolist():
        height, width = SHAPES[level]
        x = float(locations[i, q, m, level, p, 0]) * width - 0.5
        y = float(locations[i, q, m, level, p, 1]) * height - 0.5
        left, top = math.floor(x), math.floor(y)
        for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
            for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
                sample = pixel(value[i, :, m], level, row, column)
                out[i, q, m] += weights[i, q, m, level, p] * share_y * share_x * sample
    return out.flatten(2)


@pytest.mark.parametrize("n", [1, 3])
def test_equals_the_loop(n: int) -> None:
    value, locations, weights = arguments(n)
    out = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert out.shape == (n, QUERIES, HEADS * CHANNELS)
    torch.testing.assert_close(out, by_loop(value, locations, weights), rtol=1e-10, atol=1e-10)


def test_sizes_may_be_cpu_tensors() -> None:
    value, locations, weights = arguments(2)
    expected = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert torch.equal(ms_deform_attn(value, torch.tensor(SHAPES), torch.tensor(STARTS), locations, weights), expected)


def test_sizes_on_a_device_are_refused() -> None:
    value, locations, weights = arguments(1)
    with pytest.raises(ValueError, match="spatial_shapes lies on meta"):
        ms_deform_attn(value, torch.tensor(SHAPES, device="meta"), STARTS, locations, weights)
    with pytest.raises(ValueError, match="level_start_index lies on meta"):
        ms_deform_attn(value, SHAPES, torch.tensor(STARTS, device="meta"), locations, weights)


def test_gradients() -> None:
    value, locations, weights = arguments(2)
    inputs = [x[:, :, :1] if i == 0 else x[:, :2, :1] for i, x in enumerate((value, locations, weights))]

    def op(*args: Tensor) -> Tensor:
        return ms_deform_attn(args[0], SHAPES, STARTS, args[1], args[2])

    assert torch.autograd.gradcheck(op, [x.contiguous().requires_grad_() for x in inputs], fast_mode=True)
    slow = [inputs[0], inputs[1][:1, :1, :, :, :2], inputs[2][:1, :1, :, :, :2]]
    slow[0] = slow[0][:1, :, :, :1]
    assert torch.autograd.gradcheck(op, [x.contiguous().requires_grad_() for x in slow])


@pytest.mark.parametrize("far", [-1e9, 1e9, 1e20, 3e38, -3e38, float("inf"), float("-inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_far_away_is_zero_and_without_gradient(far: float, axis: int) -> None:
    value, locations, weights = (x.float() for x in arguments(1))
    locations[..., axis] = far
    for x in (value, locations, weights):
        x.requires_grad_()
    out = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    for x in (value, locations, weights):
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_nan_is_not_hidden() -> None:
    value, locations, weights = arguments(1)
    locations[0, 1, 0, 2, 3, 0] = float("nan")
    out = ms_deform_attn(value, SHAPES, STARTS, locations, weights).view(QUERIES, HEADS, CHANNELS)
    assert out[1, 0].isnan().all()
    assert out.isnan().sum() == CHANNELS


@pytest.mark.parametrize(
    ("x", "share"),
    [
        (0.0, 0.5),  # the border itself: half of the sample lies outside
        (1.0, 0.5),
        (0.5 / 5, 1.0),  # centre of the first column
        (4.5 / 5, 1.0),
        (-0.5 / 5, 0.0),  # one whole cell outside
        (5.5 / 5, 0.0),
    ],
)
def test_borders(x: float, share: float) -> None:
    value = torch.ones(1, ROWS, 1, 1, dtype=torch.float64)
    locations = torch.full((1, 1, 1, 3, 1, 2), 9.0, dtype=torch.float64)
    locations[0, 0, 0, 0, 0] = torch.tensor([x, 0.5])
    out = ms_deform_attn(value, SHAPES, STARTS, locations, torch.ones(1, 1, 1, 3, 1, dtype=torch.float64))
    assert float(out) == pytest.approx(share, abs=1e-9)


def test_levels_do_not_leak_into_one_another() -> None:
    value = torch.zeros(1, ROWS, 1, 1, dtype=torch.float64)
    value[0, STARTS[1] : STARTS[2]] = 1  # the middle level alone
    locations = torch.rand(1, 50, 1, 3, 1, 2, dtype=torch.float64) * 3 - 1
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 3, 1).expand(1, 50, 1, 3, 1)
    assert ms_deform_attn(value, SHAPES, STARTS, locations, weights).abs().sum() == 0


def test_half_precision_values_keep_their_dtype() -> None:
    value, locations, weights = arguments(2, dtype=torch.float32)
    out = ms_deform_attn(value.bfloat16(), SHAPES, STARTS, locations, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), ms_deform_attn(value, SHAPES, STARTS, locations, weights), rtol=0, atol=0.03
    )


def test_sizes_that_do_not_fit() -> None:
    value, locations, weights = arguments(2)
    with pytest.raises(ValueError, match="value has 63 rows.*need 64"):
        ms_deform_attn(value[:, 1:], SHAPES, STARTS, locations, weights)
    with pytest.raises(ValueError, match="sampling_locations is"):
        ms_deform_attn(value, SHAPES, STARTS, locations[:1], weights)
    with pytest.raises(ValueError, match="sampling_locations is"):
        ms_deform_attn(value, SHAPES, STARTS, locations[:, :, :, :2], weights)
    with pytest.raises(ValueError, match="attention_weights is"):
        ms_deform_attn(value, SHAPES, STARTS, locations, weights[..., 1:])
    for starts in ([0], [0, 10, 23], [0, 10, -1], [0, 10, 22, 64]):
        with pytest.raises(ValueError, match="level_start_index is"):
            ms_deform_attn(value, SHAPES, starts, locations, weights)


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
