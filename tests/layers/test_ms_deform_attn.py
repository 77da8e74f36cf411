"""The deformable-attention op: each backend of this machine against a loop that follows the definition, and float64.

The Triton backend, which needs a GPU or a process of its own, has tests beside this file, and so have CUDA kernels.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vis.layers.ms_deform_attn import backends, ms_deform_attn, reference

SHAPES = [(2, 5), (4, 3), (7, 6)]
STARTS = [0, 10, 22]
ROWS, HEADS, CHANNELS, QUERIES, POINTS = 64, 2, 3, 4, 5
FLAT = [size for shape in SHAPES for size in shape]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file runs with every backend for CPUs that is there."""
    if reason := backends.problem(request.param, "cpu"):
        pytest.skip(reason)
    monkeypatch.setenv(backends.VARIABLE, request.param)
    return request.param


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


def test_starts_on_a_device_are_not_read() -> None:
    value, locations, weights = arguments(1)
    expected = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert torch.equal(ms_deform_attn(value, SHAPES, torch.tensor(STARTS, device="meta"), locations, weights), expected)
    with pytest.raises(ValueError, match="level_start_index is"):
        ms_deform_attn(value, SHAPES, torch.tensor(STARTS[:-1], device="meta"), locations, weights)


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


def test_types_that_do_not_fit() -> None:
    value, locations, weights = arguments(2, dtype=torch.float32)
    for half in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=f"sampling_locations are {half}.*more than a pixel"):
            ms_deform_attn(value, SHAPES, STARTS, locations.to(half), weights)
    with pytest.raises(ValueError, match="value is torch.int64"):
        ms_deform_attn(value.long(), SHAPES, STARTS, locations, weights)
    with pytest.raises(ValueError, match="attention_weights are torch.int32"):
        ms_deform_attn(value, SHAPES, STARTS, locations, weights.int())


def test_other_types_are_converted() -> None:
    value, locations, weights = arguments(2)
    expected = ms_deform_attn(value, SHAPES, STARTS, locations, weights).float()
    for types in ((32, 64, 32), (32, 32, 64), (64, 32, 32), (32, 32, 16)):
        named = {16: torch.float16, 32: torch.float32, 64: torch.float64}
        mixed = [x.to(named[bits]) for x, bits in zip((value, locations, weights), types, strict=True)]
        out = ms_deform_attn(mixed[0], SHAPES, STARTS, *mixed[1:])
        assert out.dtype == mixed[0].dtype
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=1e-3)


def test_devices_that_differ() -> None:
    value, locations, weights = arguments(2)
    with pytest.raises(ValueError, match="value lies on cpu, sampling_locations on meta"):
        ms_deform_attn(value, SHAPES, STARTS, locations.to("meta"), weights)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], shapes: list, starts: list) -> list[Tensor]:
    """The output and the gradients of the inputs, for a gradient of the output that is no constant."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(leaves[0], shapes, starts, *leaves[1:])
    weight = torch.arange(out.numel()).view(out.shape).cos().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


UNEVEN = [(1, 1), (2, 29), (31, 3), (1, 17)]
UNEVEN_STARTS = [17, 18, 76, 0]  # the last level lies first


def uneven_inputs(channels: int, dtype: torch.dtype, points: int = 3) -> list[Tensor]:
    """More queries than one block of the CPU kernels has, and as many as fill no block."""
    generator = torch.Generator().manual_seed(channels)
    value = torch.randn(2, 169, 3, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 37, 3, 4, points, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.randn(2, 37, 3, 4, points, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (value, locations, weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 30, 32, 64, 71, 256])
def test_equals_float64(channels: int, dtype: torch.dtype) -> None:
    inputs = uneven_inputs(channels, dtype)
    expected = with_gradients(reference.by_grid_sample, [x.double() for x in inputs], UNEVEN, UNEVEN_STARTS)
    found = with_gradients(ms_deform_attn, inputs, UNEVEN, UNEVEN_STARTS)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=float(b.abs().max()) * 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gradients(half: torch.dtype) -> None:
    value, locations, weights = uneven_inputs(30, torch.float32)
    inputs = [value.to(half), locations, weights]
    expected = with_gradients(reference.by_grid_sample, [x.double() for x in inputs], UNEVEN, UNEVEN_STARTS)
    found = with_gradients(ms_deform_attn, inputs, UNEVEN, UNEVEN_STARTS)
    assert [x.dtype for x in found] == [half, half, torch.float32, torch.float32]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=float(b.abs().max()) * 8 * torch.finfo(half).eps)


def test_on_and_beside_the_borders() -> None:
    """Every pair of: outside, one cell outside, the border, centres of the first and last cell, between them."""
    value, _, _ = uneven_inputs(5, torch.float64)
    places = []
    for h, w in UNEVEN:
        cells = [torch.tensor([-1.5, -1, -0.5, 0, 0.25, n - 1, n - 0.5, n, n + 3], dtype=torch.float64) for n in (w, h)]
        grid = torch.cartesian_prod(*cells) + 0.5
        places.append(grid / torch.tensor([w, h]))
    locations = torch.stack(places, dim=1)[None, None, None].expand(2, 1, 3, -1, -1, -1, -1).transpose(3, 4)
    locations = locations.reshape(2, 1, 3, 4, -1, 2).contiguous()
    locations = locations.expand(2, 37, 3, 4, -1, 2)
    weights = torch.randn(locations.shape[:-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reference.by_grid_sample(value, UNEVEN, UNEVEN_STARTS, locations, weights)
    found = ms_deform_attn(value, UNEVEN, UNEVEN_STARTS, locations, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_no_points_give_zeros() -> None:
    value, locations, weights = uneven_inputs(5, torch.float32, points=0)
    out, *gradients = with_gradients(ms_deform_attn, [value, locations, weights], UNEVEN, UNEVEN_STARTS)
    assert out.shape == (2, 37, 15)
    assert all(not x.any() for x in (out, *gradients))


@pytest.mark.parametrize(("n", "queries"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_gives_nothing(n: int, queries: int) -> None:
    inputs = [torch.randn(n, ROWS, 2, 3), torch.rand(n, queries, 2, 3, 5, 2), torch.rand(n, queries, 2, 3, 5)]
    out, *gradients = with_gradients(ms_deform_attn, inputs, SHAPES, STARTS)
    assert out.shape == (n, queries, 6)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert not any(x.any() for x in gradients)


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, one element off every boundary."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between them, dimensions in another order in memory."""
    wide = x.new_full((*x.shape[::-1], 2), float("nan"))
    wide[..., 1] = x.permute(*reversed(range(x.dim())))
    return wide[..., 1].permute(*reversed(range(x.dim())))


@pytest.mark.parametrize("lay", [misaligned, strided])
def test_memory_may_lie_anyhow(lay: Callable[[Tensor], Tensor]) -> None:
    inputs = uneven_inputs(30, torch.float32)
    expected = with_gradients(ms_deform_attn, inputs, UNEVEN, UNEVEN_STARTS)
    for a, b in zip(
        with_gradients(ms_deform_attn, [lay(x) for x in inputs], UNEVEN, UNEVEN_STARTS), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * 2e-6)
    out = ms_deform_attn(inputs[0].requires_grad_(), UNEVEN, UNEVEN_STARTS, *inputs[1:])
    out.backward(lay(torch.ones_like(out)))  # the gradient may come so, too
    assert inputs[0].grad is not None


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_do_not_disturb_one_another(three_threads: None) -> None:
    """More threads than heads: the queries are dealt out, and the gradients of their parts added."""
    inputs = [x[:1, :, :2] for x in uneven_inputs(32, torch.float32)]
    expected = with_gradients(reference.by_grid_sample, [x.double() for x in inputs], UNEVEN, UNEVEN_STARTS)
    found = with_gradients(ms_deform_attn, inputs, UNEVEN, UNEVEN_STARTS)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=float(b.abs().max()) * 2e-6)
    for a, b in zip(with_gradients(ms_deform_attn, inputs, UNEVEN, UNEVEN_STARTS), found, strict=True):
        assert torch.equal(a, b)


def test_only_the_inputs_are_kept_for_the_backward_pass() -> None:
    inputs = [x.requires_grad_() for x in uneven_inputs(32, torch.float32)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ms_deform_attn(inputs[0], UNEVEN, UNEVEN_STARTS, *inputs[1:])
    assert sum(x.nbytes for x in kept) <= sum(x.nbytes for x in inputs)


def doubled(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return 2 * ms_deform_attn(value, SHAPES, STARTS, locations, weights)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here: inductor writes C++"
)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_compiles_into_one_graph(compiler: str) -> None:
    inputs = [x.requires_grad_() for x in arguments(2, dtype=torch.float32)]
    expected = doubled(*inputs)
    out = torch.compile(doubled, fullgraph=True, backend=compiler)(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs), wanted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exporters_that_know_no_op_get_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = arguments(2, dtype=torch.float32)
    expected = doubled(*inputs)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    traced = torch.jit.trace(doubled, inputs)
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert "aten::grid_sampler" in kinds
    assert not [kind for kind in kinds if kind.startswith("vis::")]
    torch.testing.assert_close(traced(*inputs), expected, rtol=0, atol=1e-5)


def test_opcheck(backend: str) -> None:
    if backend != "compiled":
        pytest.skip("plain PyTorch is no op of its own")
    value, locations, weights = (x.requires_grad_() for x in arguments(2))
    torch.library.opcheck(torch.ops.vis.ms_deform_attn.default, (value, FLAT, STARTS, locations, weights))
    given = [x.detach() for x in (value, locations, weights)]
    grad = torch.randn(2, QUERIES, HEADS * CHANNELS, dtype=torch.float64)
    backward = torch.ops.vis.ms_deform_attn_backward.default
    torch.library.opcheck(backward, (grad, given[0], FLAT, STARTS, *given[1:]))


def test_the_op_itself_checks_what_it_reads(backend: str) -> None:
    """Whoever calls it without the function in front must not read foreign memory."""
    if backend != "compiled":
        pytest.skip("plain PyTorch is no op of its own")
    value, locations, weights = arguments(2)
    op, backward = torch.ops.vis.ms_deform_attn, torch.ops.vis.ms_deform_attn_backward
    grad = torch.randn(2, QUERIES, HEADS * CHANNELS, dtype=torch.float64)
    wrong = [
        ("level 2 of 7 x 6 from row 23", (value, FLAT, [0, 10, 23], locations, weights)),
        ("level 0 of 2 x -5", (value, [2, -5, *FLAT[2:]], STARTS, locations, weights)),
        ("level 1 of", (value, [2, 5, 2**40, 2**40, 7, 6], STARTS, locations, weights)),
        ("expected h and w of each of the 3", (value, FLAT[1:], STARTS, locations, weights)),
        ("sampling_locations is", (value, FLAT, STARTS, locations[1:], weights)),
        ("attention_weights is", (value, FLAT, STARTS, locations, weights[:, 1:])),
        ("expected .N, S, M, D.", (value[0], FLAT, STARTS, locations, weights)),
        ("sampling_locations are Float", (value, FLAT, STARTS, locations.float(), weights)),
        ("attention_weights are Float", (value, FLAT, STARTS, locations, weights.float())),
        ("value is Long", (value.long(), FLAT, STARTS, locations, weights)),
    ]
    for message, given in wrong:
        with pytest.raises(ValueError, match=message):
            op(*given)
        with pytest.raises(ValueError, match=message):
            backward(grad, *given)
    for bad in (grad[1:], grad.float()):
        with pytest.raises(ValueError, match="grad_output is"):
            backward(bad, value, FLAT, STARTS, locations, weights)
