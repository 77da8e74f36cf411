"""Multi-scale deformable attention alone, forward and backward, at the shapes of the pixel decoder's encoder.

On a CPU: all backends side by side, on host clocks (:func:`measure_op`). On a GPU: :mod:`.op_device`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vis.engine.benchmarks.common import Settings, summary
from vis.layers.ms_deform_attn import backends, reference
from vis.layers.ms_deform_attn.op import RUN

HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32)
#: Images (height, width) whose encoder is measured.
SIZES: tuple[tuple[int, int], ...] = ((360, 640),)
#: What can be measured, by name. "grid_sample" is what the released models run without their kernel.
BACKENDS: dict[str, Callable[..., Tensor]] = {"grid_sample": reference.by_grid_sample, **RUN}
#: How many times the speed of "grid_sample" the compiled backend must reach on a CPU.
BARS = {"forward": 6.0, "forward_backward": 5.0}


def measure_op(settings: Settings) -> dict[str, Any]:
    """One image's encoder layer in float32, for every backend and size.

    The backends take turns, so that a machine that is busy for a while slows them all. ``best`` is the least processor
    time of a call, and ``speedup`` the ratio of the bests: they move less than wall times on a machine that is shared.
    """
    if settings.device != "cpu":
        raise ValueError("`op` runs on host clocks, for CPUs; `op-device` measures a GPU")
    missing = {name: missing_on(name, settings.device) for name in BACKENDS}
    rows: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    for size in SIZES:
        arguments, leaves = encoder_inputs(size, settings.device)
        tokens = arguments[0].shape[1]
        runs = {name: calls(backend, arguments, leaves) for name, backend in BACKENDS.items() if not missing[name]}
        for kind in BARS:
            timed = in_turns(settings, {name: pair[kind] for name, pair in runs.items()})
            for name in BACKENDS:
                start = {"backend": name, "input": list(size), "tokens": tokens, "missing": missing[name]}
                row = rows.setdefault((name, size), start)
                if name in timed:
                    row[kind] = {**timed[name], "speedup": timed["grid_sample"]["best"] / timed[name]["best"]}
    ordered = [rows[name, size] for name in BACKENDS for size in SIZES]
    return {"rows": ordered, "heads": HEADS, "channels": CHANNELS, "points": POINTS, "strides": list(STRIDES)}


def missing_on(name: str, device: str) -> str:
    """Why a backend cannot be measured on a device; "" if it can."""
    return "" if name == "grid_sample" else backends.problem(name, torch.device(device).type)


def encoder_inputs(
    size: tuple[int, int], device: str, *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments of the op for images of ``size``, and those of them that get gradients.

    A query for each cell samples around it, as the encoder's do; offsets have a standard deviation of two cells.
    """
    shapes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in STRIDES]
    counts = [h * w for h, w in shapes]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    tokens, levels = sum(counts), len(shapes)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, tokens, HEADS, CHANNELS, generator=generator)
    centres = []
    for h, w in shapes:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).view(-1, 2))
    extent = torch.tensor([[w, h] for h, w in shapes])
    offsets = 2 * torch.randn(batch, tokens, HEADS, levels, POINTS, 2, generator=generator) / extent[:, None]
    locations = torch.cat(centres)[:, None, None, None] + offsets
    logits = torch.randn(batch, tokens, HEADS, levels * POINTS, generator=generator)
    weights = logits.softmax(-1).view(batch, tokens, HEADS, levels, POINTS)
    tensors = (value.to(dtype), locations, weights.to(dtype))
    leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
    return (leaves[0], shapes, starts, leaves[1], leaves[2]), leaves


def calls(
    backend: Callable[..., Tensor], arguments: tuple[Any, ...], leaves: list[Tensor]
) -> dict[str, Callable[[], object]]:
    """What is timed: the forward without a graph, and the forward with all gradients."""
    value, _, _, locations, _ = arguments
    n, queries = locations.shape[:2]
    grad = torch.ones(n, queries, value.shape[2] * value.shape[3], device=value.device, dtype=value.dtype)
    return {
        "forward": partial(_forward, backend, arguments),
        "forward_backward": partial(_forward_backward, backend, arguments, leaves, grad),
    }


@torch.no_grad()
def _forward(backend: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
    return backend(*arguments)


def _forward_backward(
    backend: Callable[..., Tensor], arguments: tuple[Any, ...], leaves: list[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(backend(*arguments), leaves, grad)


def in_turns(settings: Settings, runs: dict[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """Milliseconds of each: the wall times as :func:`summary` gives them, median and best processor time."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(settings.warmup + settings.repeats):
        for name, run in runs.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            if index >= settings.warmup:
                wall[name].append(1e3 * (time.perf_counter() - start))
                cpu[name].append(1e3 * (time.process_time() - start_cpu))
    return {name: {**summary(wall[name]), "cpu": statistics.median(cpu[name]), "best": min(cpu[name])} for name in runs}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words, one line for each backend and size."""
    text = []
    for row in result["rows"]:
        head = f"{row['backend']:<11} {row['input'][0]}x{row['input'][1]} ({row['tokens']} tokens): "
        if row["missing"]:
            text.append(head + f"not measured: {row['missing']}")
            continue
        parts = []
        for kind, bar in BARS.items():
            one = row[kind]
            part = (
                f"{kind.replace('_', ' + ')} {one['best']:.1f} ms (median {one['cpu']:.1f}; wall {one['median']:.1f}), "
            )
            part += f"{one['speedup']:.2f}x"
            if row["backend"] == "compiled":
                part += f" (bar {bar:g}: {'holds' if one['speedup'] >= bar else 'DOES NOT HOLD'})"
            parts.append(part)
        text.append(head + "; ".join(parts))
    return text
