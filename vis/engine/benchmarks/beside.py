"""Several configurations on the same video in one run, in turn, so that what else the machine does meets all."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from vis.engine.benchmarks.common import ROOT, Settings, build, spread, summary, synchronize, video
from vis.engine.benchmarks.inference import NETWORK, ModuleClock

#: What is timed apart, where a model has it.
_PARTS: dict[str, tuple[str, ...]] = {"network": NETWORK, "tracker": ("tracker",), "refiner": ("refiner",)}


class _Timed:
    """One model and the seconds of its runs."""

    def __init__(self, settings: Settings, config_file: str) -> None:
        _, self._model = build(replace(settings, config_file=config_file))
        self._device, self._frames = settings.device, settings.frames[0]
        self._sample = video(settings, self._frames)
        self._clocks = {
            name: ModuleClock(self._model, modules, settings.device)
            for name, modules in _PARTS.items()
            if any(hasattr(self._model, module) for module in modules)
        }
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.parts: dict[str, list[float]] = {name: [] for name in self._clocks}

    def run(self) -> None:
        """Once through the video; all figures are seconds per frame."""
        for clock in self._clocks.values():
            clock.seconds = 0.0
        synchronize(self._device)
        start, start_cpu = time.perf_counter(), time.process_time()
        self._model([self._sample])
        synchronize(self._device)
        self.wall.append((time.perf_counter() - start) / self._frames)
        self.cpu.append((time.process_time() - start_cpu) / self._frames)
        for name, clock in self._clocks.items():
            self.parts[name].append(clock.seconds / self._frames)

    def figures(self, warmup: int) -> dict[str, Any]:
        return {
            "seconds_per_frame": {**summary(self.wall[warmup:]), "cpu": statistics.median(self.cpu[warmup:])},
            "parts": {name: statistics.median(values[warmup:]) for name, values in self.parts.items()},
        }


def measure_beside(settings: Settings) -> dict[str, Any]:
    """Seconds per frame of ``settings.config_file`` and of each of ``settings.beside``, and of their parts."""
    timed = {name: _Timed(settings, name) for name in (settings.config_file, *settings.beside)}
    with torch.no_grad():
        for _ in range(settings.warmup + settings.repeats):
            for model in timed.values():
                model.run()
    return {
        "frames": settings.frames[0],
        "models": {name: model.figures(settings.warmup) for name, model in timed.items()},
    }


def lines(result: dict[str, Any]) -> list[str]:
    """A line for each configuration, with the share of each part."""
    text = [f"video of {result['frames']} frames, configurations in turn"]
    first = None
    for name, figures in result["models"].items():
        total = figures["seconds_per_frame"]
        first = first or total["median"]
        parts = ", ".join(
            f"{part} {seconds:.3f} ({seconds / total['median']:.0%})" for part, seconds in figures["parts"].items()
        )
        text.append(
            f"{name.removeprefix(f'{ROOT}/')}: {spread(total, 's per frame')}, {1 / total['median']:.2f} frames/s"
        )
        text.append(f"    {parts}; {total['median'] / first:.2f} times the first")
    return text
