"""Peak memory of inference on a short and on a long video of one size.

The network alone, on frames that are drawn when they are asked for, or with ``end_to_end`` a whole evaluation: frames
from files through the test loader, results on disk.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vis.checkpoint import load_weights
from vis.data.synthetic import generate
from vis.engine.benchmarks.common import (
    MIB,
    ROOT,
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
from vis.engine.config import load_cfg
from vis.engine.trainer import evaluate

#: The model of ``end_to_end`` where no other is named: small, so that what frames and results need is not hidden.
END_TO_END_CONFIG = str(ROOT / "configs" / "demo" / "minvis_synthetic.yaml")
_DATA_SET = "memory_benchmark"
#: Highest ratio of the longest video's peak to the shortest's.
RATIO_BAR = 1.1


def measure_memory(settings: Settings) -> dict[str, Any]:
    """Peaks for every length in ``settings.frames``, each in a process of its own, and the ratio of the extremes."""
    if settings.end_to_end:
        with tempfile.TemporaryDirectory(prefix="vis_benchmark_") as folder:
            return _compare([_evaluate_in_subprocess(settings, n, Path(folder)) for n in sorted(settings.frames)])
    lengths = sorted(settings.frames)
    return _compare([in_subprocess("memory:run_once", replace(settings, frames=(length,))) for length in lengths])


def _compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": runs, "ratio": runs[-1]["peak_mib"] / runs[0]["peak_mib"], "bar": RATIO_BAR}
    if runs[0]["device_peak_mib"] is not None:
        result["device_ratio"] = runs[-1]["device_peak_mib"] / runs[0]["device_peak_mib"]
    return result


def _evaluate_in_subprocess(settings: Settings, length: int, folder: Path) -> dict[str, Any]:
    """Writes a video of ``length`` frames and evaluates it; what drawing it takes is not in the figures."""
    folder = folder / str(length)
    num_classes = load_cfg(settings.config_file, settings.opts).MODEL.SEM_SEG_HEAD.NUM_CLASSES
    name = f"{_DATA_SET}_{length}"
    custom = {"NAME": name, "JSON": str(folder / "video.json"), "ROOT": str(folder / "frames")}
    write_video(folder, length, settings.output_size, num_classes)
    options = {"DATASETS.CUSTOM": [custom], "DATASETS.TEST": (name,), "OUTPUT_DIR": str(folder / "output")}
    opts = (*settings.opts, *(str(word) for pair in options.items() for word in pair))
    return in_subprocess("memory:run_end_to_end", replace(settings, frames=(length,), opts=opts))


def write_video(folder: Path, length: int, size: tuple[int, int], num_classes: int) -> None:
    """A video without annotations: ``video.json`` and ``frames/*.jpg``, hard links of the few frames of an embedded
    clip, which runs forward and backward."""
    generate("synthetic_ytvis", folder, splits=("val",), num_videos={"val": 1})
    drawn = sorted((folder / "synthetic_ytvis" / "val" / "JPEGImages").glob("*/*.png"))
    (folder / "frames").mkdir()
    pictures = []
    for number, path in enumerate(drawn):
        pictures.append(folder / f"{number}.jpg")
        with Image.open(path) as picture:
            picture.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC).save(pictures[-1])
    names = [f"{index:06d}.jpg" for index in range(length)]
    there_and_back = [*range(len(pictures)), *range(len(pictures) - 2, 0, -1)]
    for index, name in enumerate(names):
        os.link(pictures[there_and_back[index % len(there_and_back)]], folder / "frames" / name)
    video = {"id": 1, "height": size[0], "width": size[1], "length": length, "file_names": names}
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, num_classes + 1)]
    content = {"videos": [video], "categories": categories}
    (folder / "video.json").write_text(json.dumps(content), encoding="utf-8")


def run_end_to_end(settings: Settings) -> dict[str, Any]:
    """Evaluate the data set that ``_evaluate_in_subprocess`` wrote, in this process."""
    cfg, model = build(settings)
    weights = ROOT / cfg.MODEL.WEIGHTS
    if not settings.weights and not settings.manifest and weights.is_file():
        load_weights(model, weights)
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    before = resident_bytes()
    start = time.perf_counter()
    with sampled_memory() as samples:
        evaluate(cfg, model)
    results = folder / "results.json"
    figures = _figures(settings, before, start, samples)  # before the results are read
    tracks = json.loads(results.read_bytes())
    return figures | {"tracks": len(tracks), "result_mib": results.stat().st_size / MIB}


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
    figures = _figures(settings, before, start, samples)
    return figures | {"tracks": len(prediction), "result_mib": encoded_bytes(prediction) / MIB}


def _figures(settings: Settings, before: int, start: float, samples: Sequence[int]) -> dict[str, Any]:
    cuda = settings.device.startswith("cuda")
    return {
        "frames": settings.frames[0],
        "peak_mib": peak_bytes() / MIB,
        "sampled_peak_mib": max(samples) / MIB,
        "maxrss_mib": maxrss_bytes() / MIB,
        "before_mib": before / MIB,
        "device_peak_mib": torch.cuda.max_memory_allocated() / MIB if cuda else None,
        "seconds": time.perf_counter() - start,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    text = []
    for run in result["runs"]:
        device = f", device {run['device_peak_mib']:.0f} MiB" if run["device_peak_mib"] is not None else ""
        text.append(
            f"{run['frames']:>5} frames: peak {run['peak_mib']:.0f} MiB (sampled {run['sampled_peak_mib']:.0f}, "
            f"{run['before_mib']:.0f} before the video, results {run['result_mib']:.1f}){device}, "
            f"{run['seconds']:.1f} s"
        )
    verdict = "holds" if result["ratio"] <= result["bar"] else "DOES NOT HOLD"
    text.append(f"ratio of the peaks {result['ratio']:.3f}, bar {result['bar']}: {verdict}")
    if "device_ratio" in result:
        text.append(f"ratio of the device's peaks {result['device_ratio']:.3f}")
    return text
