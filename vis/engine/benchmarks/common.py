"""What the benchmarks share: settings, the machine's description, timing, memory, frames, the model."""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import vis
from vis.checkpoint import load_weights
from vis.config import CfgNode
from vis.engine.benchmarks.plain_idol import enliven
from vis.engine.config import load_cfg
from vis.engine.parity import fill_weights, in_our_names, read_manifest
from vis.modeling import build_model
from vis.modeling.meta_arch.idol import IDOL
from vis.structures import ClipSample

logger = logging.getLogger(__name__)

MIB = 2**20
ROOT = Path(vis.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What a figure depends on; written beside it.

    Attributes:
        config_file, opts: the model.
        device: "cpu" or "cuda".
        threads: of PyTorch.
        input_size, output_size: (height, width) in pixels of the network's input and of the results.
        frames: of the video (``inference``), or of each video (``memory``).
        weights: a checkpoint; empty for initial weights.
        manifest: a parity manifest whose formula fills the weights; empty for initial weights.
        warmup, repeats: runs before, and runs that count.
        beside: more configurations that ``inference`` times in turn with the first.
        end_to_end: ``memory`` evaluates a video in files instead of passing frames to the network.
        variants: ways to train that ``train`` measures side by side; empty: the bare step alone.
    """

    config_file: str = str(ROOT / "configs" / "minvis" / "ytvis19_r50.yaml")
    opts: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    input_size: tuple[int, int] = (192, 320)
    output_size: tuple[int, int] = (720, 1280)
    frames: tuple[int, ...] = (15,)
    weights: str = ""
    manifest: str = ""
    warmup: int = 1
    repeats: int = 3
    beside: tuple[str, ...] = ()
    end_to_end: bool = False
    variants: tuple[str, ...] = ()


class MovingFrames(Sequence[Tensor]):
    """A lazy video: a smooth random texture with coarse blobs that moves; the same frames at every access.

    Args:
        length: number of frames; costs nothing.
        size: (height, width).
    """

    def __init__(self, *, length: int, size: tuple[int, int], seed: int = 0) -> None:
        self._length, self._size = length, size
        generator = torch.Generator().manual_seed(seed)
        height, width = size
        coarse = torch.rand(1, 3, 9, 15, generator=generator)
        fine = torch.rand(1, 3, height // 4 + 1, width // 4 + 1, generator=generator)
        margin = (height * 2, width * 2)
        mix = 0.75 * nn.functional.interpolate(coarse, margin, mode="bicubic")
        mix = mix + 0.25 * nn.functional.interpolate(fine, margin, mode="bilinear")
        self._canvas = mix[0].clamp(0, 1).mul(255).to(torch.uint8)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(f"frame {index} of {self._length}")
        height, width = self._size
        y, x = (3 * index) % height, (5 * index) % width
        return self._canvas[:, y : y + height, x : x + width].contiguous()


def video(settings: Settings, length: int) -> ClipSample:
    """A lazy video of ``length`` frames with results at ``settings.output_size``."""
    height, width = settings.output_size
    return ClipSample(
        image=MovingFrames(length=length, size=settings.input_size),
        height=height,
        width=width,
        video_id=0,
        frame_ids=list(range(length)),
        length=length,
        file_names=[],
    )


def build(settings: Settings) -> tuple[CfgNode, nn.Module]:
    """The configuration and its model in evaluation mode, with the weights that the settings name."""
    cfg = load_cfg(settings.config_file, [*settings.opts, "MODEL.DEVICE", settings.device])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if settings.weights and settings.manifest:
        raise ValueError("weights come from a checkpoint or from a manifest, not from both")
    if settings.weights:
        load_weights(model, settings.weights)
    if settings.manifest:
        fill_weights(model, in_our_names(model, read_manifest(settings.manifest)))
    if isinstance(model, IDOL) and not settings.weights and not settings.manifest:
        enliven(model, MovingFrames(length=1, size=settings.input_size)[0])
    return cfg, model


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock that is read next means something."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def repeat(settings: Settings, run: Callable[[], Any], *, scale: float = 1.0) -> dict[str, Any]:
    """Seconds times ``scale`` of the counted calls of ``run``, after the warm-up, as :func:`summary` gives them.

    ``cpu`` is the median of the processor time over all threads: on a machine that is shared it moves less.
    """
    wall, cpu = [], []
    for index in range(settings.warmup + settings.repeats):
        synchronize(settings.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        run()
        synchronize(settings.device)
        if index >= settings.warmup:
            wall.append(scale * (time.perf_counter() - start))
            cpu.append(scale * (time.process_time() - start_cpu))
    return {**summary(wall), "cpu": statistics.median(cpu)}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and single values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}


def spread(figures: dict[str, Any], unit: str, digits: int = 3) -> str:
    """``0.29 s (0.28 to 0.31, 3 runs; 0.27 of processor time)``."""
    runs = f"{figures['min']:.{digits}f} to {figures['max']:.{digits}f}, {len(figures['runs'])} runs"
    cpu = f"; {figures['cpu']:.{digits}f} of processor time" if "cpu" in figures else ""
    return f"{figures['median']:.{digits}f} {unit} ({runs}{cpu})"


# --- memory


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """Highest resident memory of this process so far.

    ``VmHWM`` rather than ``ru_maxrss`` where there is one: the latter starts from the parent's at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return maxrss_bytes()


def maxrss_bytes() -> int:
    """``ru_maxrss`` of this process (kilobytes on Linux, bytes on macOS)."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


@contextmanager
def sampled_memory(every: float = 0.02) -> Iterator[list[int]]:
    """Collects the resident memory at intervals in the list it gives, while the body runs."""
    samples: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            samples.append(resident_bytes())
            stop.wait(every)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def in_subprocess(function: str, settings: Settings) -> dict[str, Any]:
    """Call ``module:function(settings)`` in a new Python process, so that its memory is its own, and return its dict.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", "vis.engine.benchmarks.worker", function]
    done = subprocess.run(
        command, input=json.dumps(asdict(settings)), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{function} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def settings_of(values: dict[str, Any]) -> Settings:
    """Settings from their json form, in which tuples are lists."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Settings(**fields)


# --- the machine


def environment() -> dict[str, Any]:
    """Versions, processor, device and commit, for the json file."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "vis": getattr(vis, "__version__", "unknown"),
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def device_name(device: str) -> str | None:
    """Name of the CUDA device that is measured, None on the CPU."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else None


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    """The checkout's commit, with ``+`` where files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"
