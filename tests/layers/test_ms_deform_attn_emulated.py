"""The CUDA kernels' own source, compiled for the CPU and run thread by thread, against the float64 reference.

It finds wrong indices, shuffles and sums without a GPU; tests/layers/test_ms_deform_attn_gpu.py runs on one.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vis.layers.ms_deform_attn.reference import gathered

HERE = Path(__file__).resolve().parent
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
POINTERS = ("grad", "value", "locations", "weights", "output", "grad_value", "grad_locations", "grad_weights", "shapes",
            "starts")  # fmt: skip
SIZES = ("images", "rows", "heads", "channels", "queries", "levels", "points", "wide")
GUARD = 64  # elements around each result that must stay as they are


class Call(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in SIZES)]


Emulate = Callable[[Call, int, int], int]


@pytest.fixture(scope="module", params=["vector atomics", "scalar atomics"])
def emulate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulate:
    """The kernels as for sm_90 and as for older devices."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    define = f"-DVIS_VECTOR_ATOMICS={int(request.param == 'vector atomics')}"
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-shared", "-fPIC", define]
    source = HERE / "ms_deform_attn_emulated.cpp"
    done = subprocess.run(
        [compiler, *flags, str(source), "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode and "_Float16" in done.stderr:
        pytest.skip("this g++ has no _Float16")
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library)).emulate
    return lambda call, kind, backward: loaded(ctypes.byref(call), kind, backward)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> tuple[Tensor, Tensor]:
    """A result full of ``fill``, 16-byte aligned, and the storage around it."""
    count = int(torch.tensor(shape).prod())
    storage = torch.full((count + 2 * GUARD,), 7.5, dtype=dtype)
    inner = storage[GUARD : GUARD + count]
    inner.fill_(fill)
    return inner.view(shape), storage


def intact(storage: Tensor) -> bool:
    return bool((storage[:GUARD] == 7.5).all() and (storage[-GUARD:] == 7.5).all())


class Case:
    """Inputs of a call; ``run`` returns the output and the gradients."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        shapes: tuple[tuple[int, int], ...] = ((5, 7), (1, 4), (3, 1)),
        n: int = 2,
        queries: int = 5,
        heads: int = 3,
        channels: int = 32,
        points: int = 4,
        wide: bool = False,
        spread: float = 0.4,
    ) -> None:
        self.dtype, self.shapes, self.wide = dtype, list(shapes), wide
        counts = [h * w for h, w in shapes]
        self.starts = [sum(counts[:level]) for level in range(len(counts))]
        real = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(11)
        sizes = (n, queries, heads, len(shapes), points)
        self.value = torch.randn(n, sum(counts), heads, channels, generator=generator, dtype=torch.float64).to(dtype)
        self.locations = torch.rand(*sizes, 2, generator=generator, dtype=real) * (1 + 2 * spread) - spread
        weights = torch.rand(sizes, generator=generator, dtype=real) / points
        self.weights = weights.to(real if wide else dtype)
        self.grad = torch.randn(n, queries, heads * channels, generator=generator, dtype=torch.float64).to(dtype)

    def run(self, emulate: Emulate) -> tuple[int, list[Tensor]]:
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        nan = float("nan")  # an element that is not written shows
        results = [
            guarded(tuple(self.grad.shape), self.dtype, nan),
            guarded(tuple(self.value.shape), real, 0),
            guarded(tuple(self.locations.shape), real, nan),
            guarded(tuple(self.weights.shape), self.weights.dtype, nan),
        ]
        shapes, starts = torch.tensor(self.shapes), torch.tensor(self.starts)
        tensors = [
            self.grad,
            self.value,
            self.locations,
            self.weights,
            *(inner for inner, _ in results),
            shapes,
            starts,
        ]
        n, rows, heads, channels = self.value.shape
        _, queries, _, levels, points = self.weights.shape
        numbers = (n, rows, heads, channels, queries, levels, points, int(self.weights.dtype != self.dtype))
        call = Call(*(tensor.data_ptr() for tensor in tensors), *numbers)
        kind = DTYPES[self.dtype]
        lanes = emulate(call, kind, 0)
        assert emulate(call, kind, 1) == lanes
        assert all(intact(storage) for _, storage in results)
        return lanes, [inner for inner, _ in results]

    def expected(self) -> list[Tensor]:
        inputs = [x.double().requires_grad_() for x in (self.value, self.locations, self.weights)]
        out = gathered(inputs[0], self.shapes, self.starts, inputs[1], inputs[2])
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad.double())]

    def check(self, emulate: Emulate) -> None:
        lanes, found = self.run(emulate)
        fixed = self.value.shape[-1] in (32, 64) and self.dtype != torch.float64
        assert lanes == (self.value.shape[-1] // 8 if fixed else 0)
        exact = 1e-11 if self.dtype == torch.float64 else 2e-5
        rounded = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
        for name, one, other in zip(("out", "value", "locations", "weights"), found, self.expected(), strict=True):
            tolerance = rounded.get(one.dtype, exact)
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(
                one.double(),
                other,
                rtol=tolerance,
                atol=tolerance * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("channels", [1, 30, 32, 64, 71])
def test_types_and_channels(emulate: Emulate, dtype: torch.dtype, channels: int) -> None:
    Case(dtype, channels=channels, n=3).check(emulate)


@pytest.mark.parametrize("channels", [30, 32, 64, 256])
@pytest.mark.parametrize("points", [1, 3, 5, 8])
def test_points_that_do_not_fill_a_round(emulate: Emulate, channels: int, points: int) -> None:
    Case(torch.float32, channels=channels, points=points, queries=3, n=1).check(emulate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 32])
def test_float32_weights_beside_half_values(emulate: Emulate, dtype: torch.dtype, channels: int) -> None:
    Case(dtype, channels=channels, wide=True).check(emulate)


@pytest.mark.parametrize("channels", [8, 32])
def test_many_images_with_a_part_of_a_block_each(emulate: Emulate, channels: int) -> None:
    """37 queries of 3 heads fill 3 blocks of 32 pairs and a part of a fourth: a block over two images would show."""
    Case(torch.float32, channels=channels, n=4, queries=37, points=2, shapes=((3, 4),)).check(emulate)


@pytest.mark.parametrize("channels", [8, 32])
@pytest.mark.parametrize("shapes", [((1, 1),), ((1, 9), (9, 1)), ((2, 2), (40, 3)), ((0, 3), (4, 2), (3, 0))])
def test_thin_and_empty_levels(emulate: Emulate, channels: int, shapes: tuple[tuple[int, int], ...]) -> None:
    case = Case(torch.float32, channels=channels, shapes=tuple(s for s in shapes if 0 not in s), queries=9)
    if all(0 not in shape for shape in shapes):
        case.check(emulate)
        return
    # the reference has no empty levels: they add nothing
    case = Case(torch.float32, channels=channels, shapes=shapes, queries=9)
    _, found = case.run(emulate)
    case.shapes, case.starts = [(4, 2)], [0]
    case.locations, case.weights = case.locations[:, :, :, 1:2], case.weights[:, :, :, 1:2]
    expected = case.expected()
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(one[:, :, :, 1:2].double(), other, rtol=1e-5, atol=1e-4)
        assert not one[:, :, :, ::2].any()


@pytest.mark.parametrize("channels", [8, 32])
def test_points_on_cells_and_borders(emulate: Emulate, channels: int) -> None:
    """Positions -1, -1/2, 0, ..., size: derivatives are those to the right."""
    case = Case(torch.float32, channels=channels, shapes=((8, 4), (4, 8), (2, 1)), queries=19)
    steps = torch.arange(-1, 8.5, 0.5)
    for level, (h, w) in enumerate(case.shapes):
        case.locations[:, :, :, level, :, 0] = ((steps.clamp(max=w) + 0.5) / w)[None, :, None, None]
        case.locations[:, :, :, level, :, 1] = ((steps.flip(0).clamp(max=h) + 0.5) / h)[None, :, None, None]
    case.check(emulate)


@pytest.mark.parametrize("channels", [8, 32])
@pytest.mark.parametrize("far", [-1e9, 3e38, float("inf")])
@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
def test_far_away_is_zero(emulate: Emulate, channels: int, far: float, axis: int) -> None:
    case = Case(torch.float32, channels=channels)
    case.locations[..., axis] = far
    assert not any(result.any() for result in case.run(emulate)[1])


@pytest.mark.parametrize("channels", [8, 32])
@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
def test_nan_shows_in_its_query_and_head_alone(emulate: Emulate, channels: int, axis: int) -> None:
    case = Case(torch.float32, channels=channels)
    case.locations[1, 2, 1, 0, 3, axis] = float("nan")
    out = case.run(emulate)[1][0].unflatten(2, (3, channels))
    assert out[1, 2, 1].isnan().all()
    assert out.isnan().sum() == channels
