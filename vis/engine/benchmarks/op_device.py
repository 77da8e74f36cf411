"""Multi-scale deformable attention on a GPU: device times against the bytes and operations that it must move.

Times are sums over the kernels that a profiler saw: a host clock would measure the launches, which take longer than
most of the kernels. Floors follow ``performance.md``'s section on this op: every tensor once through memory, the four
neighbours of each sample once through L1, 8 operations for each channel and sample.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vis.engine.benchmarks.common import Settings
from vis.engine.benchmarks.op import BACKENDS, BARS, CHANNELS, HEADS, POINTS, STRIDES, calls, encoder_inputs, missing_on

#: Padded network inputs (height, width) of 360p and 720p video.
SIZES: tuple[tuple[int, int], ...] = ((384, 640), (736, 1280))
BATCHES = (1, 2, 8)
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: The same ways through the code, in seconds, where there is no GPU.
DRY_SIZES: tuple[tuple[int, int], ...] = ((32, 64),)
DRY_BATCHES = (1, 2)

#: Part of the device's name -> bytes per second of memory, multiprocessors, clock in Hz, float32 operations per second.
DEVICES = {
    "H200": (4.8e12, 132, 1.83e9, 67e12),
    "H100": (3.35e12, 132, 1.83e9, 67e12),
    "A100": (2.039e12, 108, 1.41e9, 19.5e12),
}
#: Warp instructions of the released kernels for a query of 8 heads (12 samples of 32 channels), sm_80 and sm_90.
RELEASED = {"forward": (9064, 9664), "forward_backward": (9064 + 27544, 9664 + 27928)}


def measure_device(settings: Settings) -> dict[str, Any]:
    """Microseconds of every backend, size, batch and type; on a CPU a dry run, whose figures mean nothing."""
    dry = settings.device == "cpu"
    measured = {**BACKENDS, "deformops": _deformops}
    missing = {name: _missing(name, settings.device) for name in measured}
    rows = []
    for size in DRY_SIZES if dry else SIZES:
        for batch in DRY_BATCHES if dry else BATCHES:
            for type_name, dtype in DTYPES.items():
                arguments, leaves = encoder_inputs(size, settings.device, batch=batch, dtype=dtype)
                row: dict[str, Any] = {"input": list(size), "batch": batch, "dtype": type_name}
                row["tokens"] = arguments[0].shape[1]
                row["floors"] = {kind: floors(settings.device, row["tokens"] * batch, dtype, kind) for kind in BARS}
                for name, backend in measured.items():
                    if not missing[name]:
                        timed = calls(backend, arguments, leaves)
                        row[name] = {kind: microseconds(settings, run) for kind, run in timed.items()}
                rows.append(row)
                del arguments, leaves
    return {"rows": rows, "missing": {name: why for name, why in missing.items() if why}, "dry_run": dry}


def _missing(name: str, device: str) -> str:
    if name != "deformops":
        return missing_on(name, device)
    if device == "cpu":
        return "a peer on GPUs"
    return "" if importlib.util.find_spec("deformops") else "deformops is not installed (Python 3.12 or 3.13)"


def _deformops(value: Tensor, shapes: list[tuple[int, int]], starts: list[int], *rest: Tensor) -> Tensor:
    """The package of that name; its levels are tensors on the device, which a caller would keep."""
    registry = importlib.import_module("deformops.registry")
    key = (tuple(shapes), value.device)
    if key not in _LEVELS:
        _LEVELS[key] = (torch.tensor(shapes, device=value.device), torch.tensor(starts, device=value.device))
    return registry.msda(value, *_LEVELS[key], *rest)


_LEVELS: dict[Any, tuple[Tensor, Tensor]] = {}


def microseconds(settings: Settings, run: Callable[[], object]) -> float:
    """Mean time of a call on the device (its kernels and fills), after the warm-up.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    for _ in range(settings.warmup):
        run()
    if settings.device == "cpu":
        start = time.perf_counter()
        for _ in range(settings.repeats):
            run()
        return 1e6 * (time.perf_counter() - start) / settings.repeats
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(settings.repeats):
            run()
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in profile.key_averages())
    if total == 0:
        raise RuntimeError("the profiler saw no kernel: CUPTI does not work on this machine")
    return total / settings.repeats


def floors(device: str, queries: int, dtype: torch.dtype, kind: str) -> dict[str, float] | None:
    """Microseconds that memory, L1 and arithmetic need at least, and the released kernel's instructions.

    None for a GPU whose figures are not listed. ``queries`` counts those of all images. The backward writes zeros into
    a float32 gradient of the value, then reads and writes it; it gathers the value once more.
    """
    name = torch.cuda.get_device_name() if device != "cpu" else ""
    found = next((figures for part, figures in DEVICES.items() if part in name), None)
    if found is None:
        return None
    memory, processors, clock, arithmetic = found
    element = torch.finfo(dtype).bits // 8
    samples = queries * HEADS * len(STRIDES) * POINTS
    features = queries * HEADS * CHANNELS
    inputs = element * features + 8 * samples + element * samples
    moved, gathered, operations = inputs + element * features, 4 * element * CHANNELS * samples, 8 * CHANNELS * samples
    if kind == "forward_backward":
        moved += inputs + element * features + 3 * 4 * features + (8 + element) * samples
        gathered, operations = 2 * gathered, 3 * operations
    instructions = RELEASED[kind][torch.cuda.get_device_capability()[0] >= 9]
    times = {
        "memory": moved / memory,
        "l1": gathered / (128 * processors * clock),
        "arithmetic": operations / arithmetic,
        "released_kernel_instructions": instructions * queries / (4 * processors * clock),
    }
    return {part: 1e6 * seconds for part, seconds in times.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """A table, one line for each size, batch, type and direction."""
    names = [name for name in (*BACKENDS, "deformops") if name not in result["missing"]]
    text = [f"{name}: not measured: {why}" for name, why in result["missing"].items()]
    text.append("DRY RUN on the CPU, host clock: the figures mean nothing" if result["dry_run"] else "device time, us")
    columns = [*names, "floor", "by", "of floor", "released >="]
    text.append(f"{'input':>9} {'batch':>5} {'type':>8} {'':>16} " + " ".join(f"{name:>11}" for name in columns))
    for row in result["rows"]:
        for kind in BARS:
            head = f"{'x'.join(map(str, row['input'])):>9} {row['batch']:>5} {row['dtype']:>8} {kind:>16} "
            text.append(head + " ".join(f"{cell:>11}" for cell in _cells(row, kind, names)))
    return text


def _cells(row: dict[str, Any], kind: str, names: list[str]) -> list[str]:
    cells = [f"{row[name][kind]:.1f}" for name in names]
    found = row["floors"][kind]
    if found is None:
        return [*cells, "-", "-", "-", "-"]
    released = found["released_kernel_instructions"]
    bounds = {part: value for part, value in found.items() if part != "released_kernel_instructions"}
    by = max(bounds, key=lambda part: bounds[part])
    ours = f"{row['compiled'][kind] / bounds[by]:.2f}x" if "compiled" in row else "-"
    return [*cells, f"{bounds[by]:.1f}", by, ours, f"{released:.1f}"]
