"""The Triton kernels in Triton's interpreter, against the definition in float64.

Not collected by itself: the interpreter replaces Triton for a whole process, so `test_ms_deform_attn_triton.py` runs
this file in one of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from vis.layers.ms_deform_attn import triton_kernels

LEVELS = [(2, 5), (1, 3), (7, 1)]  # uneven ones, one cell high or wide
HEADS, POINTS, QUERIES = 2, 2, 3
# numpy, on which the interpreter runs, comments on the infinite positions of some tests
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def sizes(levels: list[tuple[int, int]]) -> tuple[list[int], list[int], int]:
    """Flat sizes, first rows, number of rows; a row lies unused between two levels."""
    starts, end = [], 0
    for h, w in levels:
        starts.append(end)
        end += h * w + 1
    return [x for pair in levels for x in pair], starts, end


def inputs(
    channels: int, n: int = 2, queries: int = QUERIES, levels: list[tuple[int, int]] = LEVELS, points: int = POINTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations (a third of them outside) and weights, in float64."""
    generator = torch.Generator().manual_seed(channels)
    where = (n, queries, HEADS, len(levels), points)
    value = torch.randn(n, sizes(levels)[2], HEADS, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(*where, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    return value, locations, torch.randn(where, generator=generator, dtype=torch.float64)


def definition(value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Every cell of every level, weighted with max(0, 1 - distance) in x and in y: what bilinear sampling means."""
    total = torch.zeros(())
    for level, ((h, w), start) in enumerate(zip(levels, sizes(levels)[1], strict=True)):
        cells = value[:, start : start + h * w].unflatten(1, (h, w))
        x, y = (locations[:, :, :, level] * locations.new_tensor([w, h]) - 0.5).unbind(-1)
        near_x = (1 - (x[..., None] - torch.arange(w)).abs()).clamp(min=0)
        near_y = (1 - (y[..., None] - torch.arange(h)).abs()).clamp(min=0)
        total = total + torch.einsum("nyxmd,nqmpx,nqmpy,nqmp->nqmd", cells, near_x, near_y, weights[:, :, :, level])
    return total.flatten(2)


def triton(value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    return triton_kernels.triton_ms_deform_attn(value, *sizes(levels)[:2], locations, weights)


def with_gradients(function, tensors: tuple[Tensor, ...], levels: list[tuple[int, int]]) -> list[Tensor]:
    """Output, and the gradients of a sum of its elements, each with a factor of its own."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(leaves[0], levels, leaves[1], leaves[2])
    factors = (torch.arange(out.numel()) % 13 / 4 - 1).view_as(out).to(out.dtype)  # exact in every dtype
    out.backward(factors)
    return [out.detach(), *(x.grad for x in leaves)]


def compare(tensors: tuple[Tensor, ...], levels: list[tuple[int, int]]) -> None:
    """Output and gradients have the dtypes of the inputs and equal those of the same numbers in float64.

    Of a result in half precision only the last rounding is forgiven.
    """
    found = with_gradients(triton, tensors, levels)
    expected = with_gradients(definition, tuple(x.double() for x in tensors), levels)
    dtypes = [tensors[0].dtype, *(x.dtype for x in tensors)]
    for x, wanted, dtype in zip(found, expected, dtypes, strict=True):
        assert x.dtype == dtype
        near = 1e-10 if tensors[0].dtype == torch.float64 else 1e-4
        torch.testing.assert_close(x.double(), wanted, rtol=max(near, torch.finfo(dtype).eps), atol=near)


def test_available() -> None:
    assert triton_kernels.available()[0]
    assert "interpreter" in triton_kernels.available()[1]


@pytest.mark.parametrize("channels", [1, 30, 32, 64, 71])
def test_float32(channels: int) -> None:
    compare(tuple(x.float() for x in inputs(channels)), LEVELS)


def test_float64() -> None:
    compare(inputs(6), LEVELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights_too", [False, True])
def test_half_precision(dtype: torch.dtype, weights_too: bool) -> None:
    """Only the results are rounded: accumulation, positions and the gradient of the values are float32."""
    value, locations, weights = inputs(30)
    compare((value.to(dtype), locations.float(), weights.to(dtype if weights_too else torch.float32)), LEVELS)


def test_more_queries_than_a_tile_and_many_points() -> None:
    """Tiles of the second image begin with its own first query, and loops that are unrolled in parts end in time."""
    levels = [(3, 4)]
    for queries in (9, 21):  # the tiles of the two kernels have 16 and 4
        compare(inputs(32, 2, queries, levels, points=5 if queries == 9 else 1), levels)


@pytest.mark.parametrize("offset", [-1.0, -0.5, 0.0, 1.0])
def test_borders(offset: float) -> None:
    """Positions on whole cells from -1 to the size. The gradient is one-sided there, so only values are compared."""
    h, w = 3, 5
    value, _, _ = inputs(4, 1, levels=[(h, w)])
    x, y = torch.meshgrid(torch.arange(-1, w + 1), torch.arange(-1, h + 1), indexing="xy")
    cells = torch.stack([x, y], dim=-1).flatten(0, 1) + offset
    locations = ((cells + 0.5) / torch.tensor([w, h])).double()[None, :, None, None, None]
    locations = locations.expand(1, -1, HEADS, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1], dtype=torch.float64)
    found = triton(value, [(h, w)], locations, weights)
    torch.testing.assert_close(found, definition(value, [(h, w)], locations, weights), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("far", [-1e9, 1e20, 3e38, -3e38, math.inf, -math.inf])
def test_far_away_is_zero_and_without_gradient(far: float) -> None:
    value, locations, weights = (x.float() for x in inputs(3, 1, 3))
    locations[:, 0, ..., 0], locations[:, 1, ..., 1], locations[:, 2] = far, far, far
    found = with_gradients(triton, (value, locations, weights), LEVELS)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


def test_nan_is_not_hidden_and_stays_in_its_query() -> None:
    value, locations, weights = (x.float() for x in inputs(3))
    clean = with_gradients(triton, (value, locations, weights), LEVELS)
    locations[1, 2, 1, 2, 0, 0] = math.nan
    out, _, grad_locations, grad_weights = with_gradients(triton, (value, locations, weights), LEVELS)
    nan = out.view(2, QUERIES, HEADS, 3).isnan()
    assert nan[1, 2, 1].all()
    assert nan.sum() == 3
    torch.testing.assert_close(out[out == out], clean[0][out == out], rtol=0, atol=0)
    assert grad_weights.isnan().sum() == 1
    assert grad_weights[1, 2, 1, 2, 0].isnan()
    assert grad_locations[1, 2, 1, 2, 0].isnan().any()
    assert grad_locations.isnan().sum() <= 2


@pytest.mark.parametrize(("n", "queries", "points"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_do(n: int, queries: int, points: int) -> None:
    tensors = inputs(4, n, queries, points=points)
    found = with_gradients(triton, tensors, LEVELS)
    assert found[0].shape == (n, queries, HEADS * 4)
    assert [x.shape for x in found[1:]] == [x.shape for x in tensors]
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


def test_no_levels() -> None:
    value, locations, weights = inputs(4, levels=[])
    assert torch.equal(triton(value, [], locations, weights), torch.zeros(2, QUERIES, HEADS * 4).double())


def test_strided_and_misaligned() -> None:
    value, locations, weights = inputs(30)
    expected = with_gradients(triton, (value, locations, weights), LEVELS)
    shifted = torch.cat([value.new_zeros(1), value.flatten()])[1:].view_as(value)
    turned = locations.transpose(1, 4).contiguous().transpose(1, 4)
    sliced = torch.stack([weights, weights], dim=-1)[..., 0]
    torch.testing.assert_close(with_gradients(triton, (shifted, turned, sliced), LEVELS), expected)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = triton_kernels.launch_options
    monkeypatch.setattr(triton_kernels, "launch_options", lambda **sizes: {**usual(**sizes), "WIDE": True})
    compare(inputs(7), LEVELS)


def test_gradcheck() -> None:
    levels = [(2, 3), (1, 2)]
    leaves = [x.requires_grad_() for x in inputs(3, 1, 2, levels, points=1)]
    assert torch.autograd.gradcheck(lambda v, p, a: triton(v, levels, p, a), leaves, nondet_tol=1e-12, fast_mode=True)


def test_opcheck() -> None:
    levels = [(2, 3), (1, 2)]
    value, locations, weights = (x.float().requires_grad_() for x in inputs(3, 2, 1, levels, points=1))
    shapes, starts, _ = sizes(levels)
    arguments = (value, shapes, starts, locations, weights)
    torch.library.opcheck(torch.ops.vis.ms_deform_attn_triton, arguments)
    grad = torch.ones(2, 1, HEADS * 3)
    arguments = (grad, *(x.detach() if isinstance(x, Tensor) else x for x in arguments))
    torch.library.opcheck(torch.ops.vis.ms_deform_attn_triton_backward, arguments)


def test_compile_in_one_graph() -> None:
    tensors = tuple(x.float() for x in inputs(4, 1, 3))

    def layer(value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        return triton(value * 2, levels, locations + 0.01, weights.sigmoid()).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, tensors, LEVELS), with_gradients(layer, tensors, LEVELS))


def test_determinism_is_not_promised() -> None:
    tensors = inputs(3, 1, 1)
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="not deterministic; use the backend torch"):
            with_gradients(triton, tensors, LEVELS)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="not deterministic"):
            with_gradients(triton, tensors, LEVELS)
    finally:
        torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_gradients(triton, tensors, LEVELS)


def test_what_does_not_fit_is_refused() -> None:
    value, locations, weights = (x.float() for x in inputs(3))
    shapes, starts, rows = sizes(LEVELS)
    wrong = [
        ((value[0], shapes, starts, locations, weights), "value has 3 dimensions"),
        ((value, shapes, starts, locations[:1], weights), "locations is"),
        ((value, shapes, starts, locations, weights[..., 1:]), "attention"),
        ((value, shapes[2:], starts, locations, weights), "do not fit"),
        ((value, [2, rows, *shapes[2:]], starts, locations, weights), "do not fit"),
        ((value, shapes, [-1, *starts[1:]], locations, weights), "do not fit"),
        ((value, shapes, starts, locations.double(), weights), "locations torch.float64"),
        ((value.int(), shapes, starts, locations, weights), "value is torch.int32"),
        ((value, shapes, starts, locations.bfloat16(), weights), "locations torch.bfloat16"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            triton_kernels.triton_forward(*arguments)
    with pytest.raises(ValueError, match="grad is"):
        triton_kernels.triton_backward(torch.ones(2, QUERIES, 7), value, shapes, starts, locations, weights)
