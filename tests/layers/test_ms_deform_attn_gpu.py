"""The compiled CUDA kernels against the float64 reference on the CPU. They need a GPU and ``vis._C`` built for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vis.layers.ms_deform_attn import backends
from vis.layers.ms_deform_attn.op import RUN
from vis.layers.ms_deform_attn.reference import gathered

pytestmark = pytest.mark.gpu

Levels = tuple[tuple[int, int], ...]
LEVELS: Levels = ((5, 7), (1, 4), (3, 1))
NAMES = ("output", "value", "locations", "weights")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def kernels() -> None:
    """Missing kernels are a failure on a machine with a GPU, not a reason to skip: tools/gpu_check.sh builds them."""
    assert backends.problem("compiled", "cuda") == ""


class Case:
    """Inputs on the CPU, and the same on the device."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        levels: Levels = LEVELS,
        n: int = 2,
        queries: int = 37,
        heads: int = 3,
        channels: int = 32,
        points: int = 4,
        spread: float = 0.4,
        wide: bool = False,
    ) -> None:
        self.shapes = list(levels)
        counts = [h * w for h, w in levels]
        self.starts = [sum(counts[:level]) for level in range(len(counts))]
        generator = torch.Generator().manual_seed(5)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = (n, queries, heads, len(levels), points)
        value = torch.randn(n, sum(counts), heads, channels, generator=generator, dtype=torch.float64).to(dtype)
        locations = torch.rand(*sizes, 2, generator=generator, dtype=real) * (1 + 2 * spread) - spread
        weights = (torch.rand(sizes, generator=generator, dtype=real) / points).to(real if wide else dtype)
        self.inputs = [value, locations, weights]
        self.grad = torch.randn(n, queries, heads * channels, generator=generator, dtype=torch.float64).to(dtype)

    def on_device(self) -> list[Tensor]:
        return [x.cuda().requires_grad_() for x in self.inputs]

    def run(self, inputs: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
        out = RUN["compiled"](inputs[0], self.shapes, self.starts, *inputs[1:])
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad.cuda() if grad is None else grad)]

    def expected(self) -> list[Tensor]:
        inputs = [x.double().requires_grad_() for x in self.inputs]
        out = gathered(inputs[0], self.shapes, self.starts, *inputs[1:])
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad.double())]

    def compare(self, found: list[Tensor]) -> None:
        for name, one, other, like in zip(NAMES, found, self.expected(), [self.grad, *self.inputs], strict=True):
            assert (one.dtype, one.shape) == (like.dtype, like.shape), name
            tolerance = TOLERANCE[one.dtype]
            atol = tolerance * max(1.0, float(other.abs().max()))
            torch.testing.assert_close(
                one.cpu().double(), other, rtol=tolerance, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )

    def check(self) -> None:
        self.compare(self.run(self.on_device()))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("channels", [1, 30, 32, 64, 71, 256])
def test_types_and_channels(dtype: torch.dtype, channels: int) -> None:
    Case(dtype, channels=channels).check()


@pytest.mark.parametrize("channels", [30, 32, 64])
@pytest.mark.parametrize("points", [1, 3, 5, 8])
def test_points_that_do_not_fill_a_round(channels: int, points: int) -> None:
    Case(channels=channels, points=points).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_weights_beside_half_values(dtype: torch.dtype) -> None:
    Case(dtype, wide=True).check()


@pytest.mark.parametrize("levels", [((1, 1),), ((1, 9), (9, 1)), ((64, 96), (1, 1), (2, 3))])
@pytest.mark.parametrize("channels", [8, 32])
def test_uneven_levels(levels: Levels, channels: int) -> None:
    Case(levels=levels, channels=channels).check()


def test_encoder_of_a_small_image() -> None:
    Case(levels=((24, 40), (12, 20), (6, 10)), heads=8, queries=1260, n=3, spread=0.05).check()


@pytest.mark.parametrize(("n", "queries", "points"), [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
@pytest.mark.parametrize("channels", [8, 32])
def test_nothing_to_do(n: int, queries: int, points: int, channels: int) -> None:
    case = Case(n=n, queries=queries, points=max(points, 1), channels=channels)
    case.inputs[1:] = [case.inputs[1][..., :points, :], case.inputs[2][..., :points]]
    found = case.run(case.on_device())
    assert [x.shape for x in found] == [x.shape for x in (case.grad, *case.inputs)]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("channels", [30, 32])
def test_more_images_than_a_line_of_blocks_has(channels: int) -> None:
    Case(n=66000, queries=1, heads=1, channels=channels, points=1, levels=((2, 2),)).check()


@pytest.mark.parametrize("channels", [30, 32])
def test_strided_and_misaligned_inputs(channels: int) -> None:
    case = Case(channels=channels)
    inputs = []
    for x in case.on_device():
        storage = torch.zeros(x.numel() + 1, device="cuda", dtype=x.dtype)
        storage[1:] = x.detach().flatten()
        inputs.append(storage[1:].view(x.shape).requires_grad_())  # 4 bytes off
    case.compare(case.run(inputs))
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    case.compare(case.run(strided, case.grad.cuda().transpose(1, 2).contiguous().transpose(1, 2)))


@pytest.mark.parametrize("far", [-1e9, 3e38, float("inf"), float("-inf")])
@pytest.mark.parametrize("channels", [8, 32])
def test_far_away_is_zero_and_without_gradient(far: float, channels: int) -> None:
    case = Case(channels=channels)
    case.inputs[1][..., 0] = far
    assert not any(x.any() for x in case.run(case.on_device()))


@pytest.mark.parametrize("channels", [8, 32])
def test_nan_shows_in_its_query_and_head_alone(channels: int) -> None:
    case = Case(channels=channels)
    case.inputs[1][1, 2, 1, 0, 3, 1] = float("nan")
    out = case.run(case.on_device())[0].unflatten(2, (3, channels))
    assert out[1, 2, 1].isnan().all()
    assert out.isnan().sum() == channels


def test_current_stream_is_used() -> None:
    """Inputs that a side stream fills late: another stream would read what was there before."""
    case = Case(levels=((64, 96),), queries=500, n=4)
    expected = case.expected()[0]
    ready = [torch.zeros_like(x, device="cuda") for x in case.inputs]
    late = [x.cuda() for x in case.inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for target, source in zip(ready, late, strict=True):
            target.copy_(source)
        out = RUN["compiled"](ready[0], case.shapes, case.starts, *ready[1:])
    stream.synchronize()
    torch.testing.assert_close(out.cpu().double(), expected, rtol=3e-5, atol=3e-4)


def test_forward_and_backward_never_wait_for_the_device() -> None:
    case = Case()
    inputs, grad = case.on_device(), case.grad.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(inputs, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture_replays() -> None:
    case = Case()
    inputs = [x.detach() for x in case.on_device()]
    grad = case.grad.cuda()

    def both() -> tuple[Tensor, ...]:
        flat = [size for pair in case.shapes for size in pair]
        out = torch.ops.vis.ms_deform_attn(inputs[0], flat, case.starts, *inputs[1:])
        return out, *torch.ops.vis.ms_deform_attn_backward(grad, inputs[0], flat, case.starts, *inputs[1:])

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    graph.replay()
    graph.replay()  # the gradient of the value starts from zero again
    case.compare(list(results))


def test_gradcheck() -> None:
    case = Case(torch.float64, n=1, queries=2, heads=2, channels=3, points=2)
    assert torch.autograd.gradcheck(
        lambda *x: RUN["compiled"](x[0], case.shapes, case.starts, *x[1:]), case.on_device(), nondet_tol=1e-9
    )


def test_too_many_levels_are_an_error() -> None:
    value, locations = torch.zeros(1, 1, 1, 32, device="cuda"), torch.zeros(1, 1, 1, 33, 1, 2, device="cuda")
    with pytest.raises(ValueError, match="33 levels, the CUDA kernels take 32"):
        torch.ops.vis.ms_deform_attn(value, [1, 1] * 33, [0] * 33, locations, locations[..., 0])


BROKEN_DEVICE = """
import torch
from vis.layers.ms_deform_attn.op import RUN
inputs = torch.zeros(1, 4, 1, 32, device="cuda"), [(2, 2)], [0], torch.zeros(1, 1, 1, 1, 1, 2, device="cuda")
inputs = *inputs, torch.ones(1, 1, 1, 1, 1, device="cuda")
RUN["compiled"](*inputs)
wrong = torch.tensor([9], device="cuda")
try:
    inputs[0].flatten()[:4][wrong].cpu()  # an assertion on the device: each launch after it fails
except RuntimeError:
    RUN["compiled"](*inputs)
"""


def test_launch_errors_are_raised(project_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_DEVICE], cwd=project_root, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert 'RUN["compiled"](*inputs)' in done.stderr or "ms_deform_attn" in done.stderr
    assert "CUDA error" in done.stderr.rpartition("During handling of the above exception")[2]


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = Case()
    inputs = [x.to("cuda:1").requires_grad_() for x in case.inputs]
    with torch.cuda.device(0):
        case.compare(case.run(inputs, case.grad.to("cuda:1")))


def test_compiles_without_a_break() -> None:
    case = Case()
    inputs = case.on_device()

    @torch.compile(fullgraph=True)
    def step(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return RUN["compiled"](value * 2, case.shapes, case.starts, locations, weights) / 2

    out = step(*inputs)
    case.compare([out.detach(), *torch.autograd.grad(out, inputs, case.grad.cuda())])


def test_same_seed_same_forward() -> None:
    """The forward adds in a fixed order; the backward's atomic additions do not, and say so where asked."""
    case = Case(queries=400)
    inputs = case.on_device()
    assert torch.equal(case.run(inputs)[0], case.run(inputs)[0])
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="vis::ms_deform_attn_backward"):
            case.run(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
