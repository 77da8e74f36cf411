"""The evaluation of a large result file: time, processor time and memory, beside going pair by pair.

400 videos of 36 frames at 720p with 50 predictions and 6 objects each, of 40 categories; a video has objects of two.
Each of the two evaluations runs in a process of its own, from the files to the 12 numbers, which must be the same.
Going pair by pair does less than the official code, which also finds the box of every mask. On a machine that others
use, compare processor time: it is that of one core for the one, of all threads together for the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

from vis.engine.benchmarks.common import MIB, ROOT, Settings, peak_bytes
from vis.engine.benchmarks.pairwise_evaluation import pairwise_evaluation
from vis.evaluation.rle_kernels import compiled

VIDEOS, PREDICTIONS, OBJECTS, CATEGORIES = 400, 50, 6, 40
_COPIES = 5  # predictions near each object; the others are anything
_SHAPES, _STEPS = 48, 64


def measure_evaluation(
    settings: Settings, *, videos: int = VIDEOS, run: Callable[[str, str, int], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Both evaluations of one result file.

    Args:
        settings: gives the frames, the size of the videos and the threads.
        videos: how many.
        run: what runs one evaluation; None: :func:`main` in a process of its own.
    """
    run = run or _in_process
    if len(settings.frames) != 1:
        raise ValueError(f"give one length of the videos, found {settings.frames}")
    with tempfile.TemporaryDirectory(prefix="vis_benchmark_") as folder:
        masks = write_case(Path(folder), videos, settings.frames[0], settings.output_size)
        size = (Path(folder) / "results.json").stat().st_size
        found = {kind: run(kind, folder, settings.threads) for kind in ("vis", "pairwise")}
    difference = max(abs(a - b) for a, b in zip(found["vis"]["stats"], found["pairwise"]["stats"], strict=True))
    return {
        **found,
        "videos": videos,
        "predictions": videos * PREDICTIONS,
        "masks": masks,
        "megabytes": size / 1e6,
        "compiled": compiled(),
        "largest_difference": difference,
        "speedup": found["pairwise"]["seconds"] / found["vis"]["seconds"],
        "cpu_speedup": found["pairwise"]["cpu"] / found["vis"]["cpu"],
    }


def write_case(folder: Path, videos: int, frames: int, size: tuple[int, int]) -> int:
    """Write ``gt.json`` and ``results.json``; returns the number of predicted masks.

    The masks are wobbly outlines that wander: a track is a shape and the step it starts with; a prediction of it is up
    to two steps off in each frame, and misses one frame in twenty.
    """
    rng = np.random.default_rng(0)
    pool = [[json.dumps(code) for code in _wander(rng, size)] for _ in range(_SHAPES)]
    gt: dict[str, Any] = {
        "videos": [
            {"id": i + 1, "height": size[0], "width": size[1], "length": frames, "file_names": []}
            for i in range(videos)
        ],
        "categories": [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CATEGORIES)],
        "annotations": [],
    }
    masks = 0
    with open(folder / "results.json", "w", encoding="utf-8") as file:
        for video in gt["videos"]:
            lines = []
            for category, shape, steps, missing in _tracks(rng, frames, gt["annotations"], video["id"], pool):
                tube = ["null" if gone else pool[shape][step] for step, gone in zip(steps, missing, strict=True)]
                masks += len(tube) - int(missing.sum())
                head = f'"video_id": {video["id"]}, "category_id": {category}, "score": {rng.random():.6f}'
                lines.append(f'{{{head}, "segmentations": [{", ".join(tube)}]}}')
            file.write(("[" if video["id"] == 1 else ",") + ",\n".join(lines))
        file.write("]\n")
    (folder / "gt.json").write_text(json.dumps(gt), encoding="utf-8")
    return masks


def _wander(rng: np.random.Generator, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """One shape at every step of its way, as RLE."""
    height, width = size
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    radius = height * rng.uniform(0.05, 0.3, 2)
    wave = 1 + 0.15 * np.sin(angles * rng.integers(3, 9) + rng.uniform(0, 6)) + 0.03 * np.sin(41 * angles)
    start, move = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(-0.004, 0.004, 2) * height
    for step in range(_STEPS):
        y, x = (start + move * step)[:, None] + radius[:, None] * wave * np.stack([np.sin(angles), np.cos(angles)])
        outline = np.stack([x.clip(0, width - 1), y.clip(0, height - 1)], 1).ravel().tolist()
        code = mask_utils.merge(mask_utils.frPyObjects([outline], height, width))
        yield {"size": list(code["size"]), "counts": code["counts"].decode()}


def _tracks(
    rng: np.random.Generator, frames: int, annotations: list[dict[str, Any]], video: int, pool: list[list[str]]
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Predictions of a video: category, shape, steps, frames without a mask; adds its objects to ``annotations``."""
    chosen = rng.integers(1, CATEGORIES + 1, 2)
    objects = []
    for _ in range(OBJECTS):
        category, shape = int(rng.choice(chosen)), int(rng.integers(_SHAPES))
        steps = (rng.integers(_STEPS) + np.arange(frames)) % _STEPS
        objects.append((category, shape, steps))
        tube = [json.loads(pool[shape][step]) for step in steps]
        annotations.append(
            {"id": len(annotations) + 1, "video_id": video, "category_id": category, "iscrowd": 0}
            | {"segmentations": tube, "areas": [int(mask_utils.area(mask)) for mask in tube]}
        )
    for index in range(PREDICTIONS):
        missing = rng.random(frames) < 0.05
        if index < OBJECTS * _COPIES:
            category, shape, steps = objects[index % OBJECTS]
            yield category, shape, (steps + rng.integers(-2, 3, frames)) % _STEPS, missing
        else:
            steps = (rng.integers(_STEPS) + np.arange(frames)) % _STEPS
            yield int(rng.integers(1, CATEGORIES + 1)), int(rng.integers(_SHAPES)), steps, missing


def _in_process(kind: str, folder: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "vis.engine.benchmarks.evaluation", kind, folder, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"the evaluation ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(kind: str, folder: str, threads: int) -> dict[str, Any]:
    """One evaluation, in this process: its figures, memory without that of the imported libraries."""
    gt, results = (Path(folder) / name for name in ("gt.json", "results.json"))
    idle = peak_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    if kind == "vis":
        from vis.evaluation.ytvis_eval import evaluate_tracks, read_tracks
        from vis.evaluation.ytvis_io import load_ground_truth

        truth = load_ground_truth(gt)
        tracks, _ = read_tracks(truth, results)
        read = time.perf_counter()
        stats = evaluate_tracks(truth, tracks, workers=threads).stats
    else:
        contents = [json.loads(path.read_bytes()) for path in (gt, results)]
        read = time.perf_counter()
        stats = pairwise_evaluation(*contents)[0]
    end = time.perf_counter()
    return {
        "seconds": end - start,
        "evaluating": end - read,
        "cpu": time.process_time() - start_cpu,
        "peak_mib": (peak_bytes() - idle) / MIB,
        "stats": stats,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    way = "compiled" if result["compiled"] else "pycocotools"
    text = [
        f"{result['videos']} videos, {result['predictions']} predictions, {result['masks']} masks, "
        f"{result['megabytes']:.0f} MB of results; AP {100 * result['vis']['stats'][0]:.3f}"
    ]
    for kind, name in (("vis", f"vis.evaluation ({way})"), ("pairwise", "pair by pair")):
        row = result[kind]
        text.append(
            f"{name}: {row['seconds']:.1f} s (reading {row['seconds'] - row['evaluating']:.1f} s, the rest "
            f"{row['evaluating']:.1f} s; {row['cpu']:.1f} s of processor time), {row['peak_mib']:.0f} MiB of memory"
        )
    text.append(
        f"{result['speedup']:.1f}x faster, {result['cpu_speedup']:.1f}x in processor time; the 12 numbers differ by "
        f"{result['largest_difference']:.0e} at most"
    )
    return text


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
