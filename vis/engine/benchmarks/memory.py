"""Peak memory of inference on a short and on a long video of one size."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from vis.engine.benchmarks.common import (
    MIB,
    Settings,
    build,
    in_subprocess,
    maxrss_bytes,
    peak_bytes,
    resident_bytes,
    sampled_memory,
    video,
)
from vis.engine.benchmarks.inference import encoded_bytes

#: Highest ratio of the longest video's peak to the shortest's.
RATIO_BAR = 1.1


def measure_memory(settings: Settings) -> dict[str, Any]:
    """Peaks for every length in ``settings.frames``, each in a process of its own, and the ratio of the extremes."""
    runs = [in_subprocess("memory:run_once", replace(settings, frames=(length,))) for length in sorted(settings.frames)]
    result: dict[str, Any] = {"runs": runs, "ratio": runs[-1]["peak_mib"] / runs[0]["peak_mib"], "bar": RATIO_BAR}
    if runs[0]["device_peak_mib"] is not None:
        result["device_ratio"] = runs[-1]["device_peak_mib"] / runs[0]["device_peak_mib"]
    return result


def run_once(settings: Settings) -> dict[str, Any]:
    """One video in this process. ``peak_mib`` counts everything: interpreter, libraries, weights, the work."""
    _, model = build(settings)
    sample = video(settings, settings.frames[0])
    cuda = settings.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = resident_bytes()
    start = time.perf_counter()
    with sampled_memory() as samples, torch.no_grad():
        prediction = model([sample])[0]
    return {
        "frames": settings.frames[0],
        "peak_mib": peak_bytes() / MIB,
        "sampled_peak_mib": max(samples) / MIB,
        "maxrss_mib": maxrss_bytes() / MIB,
        "before_mib": before / MIB,
        "device_peak_mib": torch.cuda.max_memory_allocated() / MIB if cuda else None,
        "seconds": time.perf_counter() - start,
        "tracks": len(prediction),
        "result_mib": encoded_bytes(prediction) / MIB,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    text = []
    for run in result["runs"]:
        device = f", device {run['device_peak_mib']:.0f} MiB" if run["device_peak_mib"] is not None else ""
        text.append(
            f"{run['frames']:>5} frames: peak {run['peak_mib']:.0f} MiB (sampled {run['sampled_peak_mib']:.0f}, "
            f"{run['before_mib']:.0f} before the video, RLEs of the result {run['result_mib']:.1f}){device}, "
            f"{run['seconds']:.1f} s"
        )
    verdict = "holds" if result["ratio"] <= result["bar"] else "DOES NOT HOLD"
    text.append(f"ratio of the peaks {result['ratio']:.3f}, bar {result['bar']}: {verdict}")
    if "device_ratio" in result:
        text.append(f"ratio of the device's peaks {result['device_ratio']:.3f}")
    return text
