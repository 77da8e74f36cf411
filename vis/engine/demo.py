"""What ``make demo`` and ``make demo-weights`` do: data, training, AP before and after, pictures, a summary."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from vis.checkpoint import load_weights, save_atomic
from vis.config import CfgNode
from vis.data.paths import datasets_root
from vis.data.synthetic import generate
from vis.engine.config import load_cfg
from vis.engine.defaults import default_setup
from vis.engine.trainer import Trainer, evaluate
from vis.modeling import build_model

logger = logging.getLogger(__name__)

CONFIG = "configs/demo/minvis_synthetic.yaml"
SCRATCH_CONFIG = "configs/demo/minvis_synthetic_scratch.yaml"
# Where MODEL.WEIGHTS of the demo points.
WEIGHTS = Path("configs/demo/minvis_synthetic.pth")
# A checkpoint in git is to stay small: two bytes a number, and at most this many.
MAX_BYTES = 4_000_000
NUM_DRAWN = 4


def run_demo(args: argparse.Namespace) -> None:
    """Generate the data, evaluate, train, evaluate, draw, and say where things are.

    Raises:
        ValueError, FileNotFoundError: the configuration or a file is not usable.
    """
    start = time.monotonic()
    cfg = _setup(args, CONFIG)
    folder = Path(cfg.OUTPUT_DIR)
    before = _evaluate_start(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    after = trainer.train().get("segm", {})
    pictures = [_draw(cfg, name, folder) for name in cfg.DATASETS.TEST]
    minutes = (time.monotonic() - start) / 60
    origin = cfg.MODEL.WEIGHTS or "initial weights"
    lines = [
        f"The demo took {minutes:.1f} minutes: {cfg.SOLVER.MAX_ITER} iterations from {origin}.",
        f"AP on the held-out clips of {', '.join(cfg.DATASETS.TEST)}: {_ap(before)} before, {_ap(after)} after.",
        *_curve(folder, cfg.SOLVER.MAX_ITER),
        f"Pictures:   {', '.join(str(path) for path in pictures)} (predictions beside the ground truth)",
        f"Results:    {folder}/inference/results.json",
        f"Log:        {folder}/log.txt, curves by: tensorboard --logdir {folder}",
        "Next:       python tools/demo.py --help            draw tracks on your own video",
        "            README.md                              train on YouTube-VIS, OVIS or your own data",
    ]
    print("\n" + "\n".join(lines), flush=True)


def make_weights(args: argparse.Namespace) -> None:
    """Train the demo's checkpoint from initial weights and write it in half precision; continues if it was stopped.

    Raises:
        ValueError: the checkpoint is larger than what may ship with the project.
    """
    cfg = _setup(args, SCRATCH_CONFIG)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    export_half(trainer.module.state_dict(), WEIGHTS)
    print(f"\n{WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.2f} MB")
    print("\n".join(_curve(Path(cfg.OUTPUT_DIR), cfg.SOLVER.MAX_ITER)), flush=True)


def export_half(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights in half precision; loading casts them back.

    Raises:
        ValueError: the file is larger than :data:`MAX_BYTES`, or a number does not fit half precision.
    """
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    overflown = [name for name, value in half.items() if not torch.isfinite(value).all()]
    if overflown:
        raise ValueError(f"these weights do not fit half precision: {overflown}")
    save_atomic({"model": half}, path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {MAX_BYTES} may ship: narrow the model")


def _setup(args: argparse.Namespace, config_file: str) -> CfgNode:
    args.config_file = args.config_file or config_file
    cfg = load_cfg(args.config_file, args.opts)
    default_setup(cfg, args)
    for preset in sorted({name.rpartition("_")[0] for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}):
        if preset.startswith("synthetic_"):
            logger.info("data set %s under %s", preset, datasets_root())
            generate(preset, datasets_root())
    return cfg


def _evaluate_start(cfg: CfgNode) -> dict[str, float]:
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        load_weights(model, cfg.MODEL.WEIGHTS)
    return evaluate(cfg, model.eval()).get("segm", {})


def _draw(cfg: CfgNode, name: str, folder: Path) -> Path:
    """Draw a few videos of ``name`` from the results on disk, by the command that a user has."""
    results = folder / "inference" / "results.json"
    videos = sorted({entry["video_id"] for entry in json.loads(results.read_text(encoding="utf-8"))})
    out = folder / "pictures"
    command = [sys.executable, "tools/demo.py", "--results", str(results), "--dataset", name, "--output", str(out)]
    command += ["--side-by-side", "--confidence-threshold", "0.5", "--video", *map(str, videos[:NUM_DRAWN])]
    subprocess.run(command, check=True)
    return out


def _ap(results: dict[str, float]) -> str:
    return f"{results['AP'] / 100:.3f}" if "AP" in results else "none"


def _curve(folder: Path, max_iter: int) -> Iterable[str]:
    """AP by iteration, as far as evaluations ran."""
    points = []
    for line in (folder / "metrics.json").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "segm/AP" in entry:
            points.append(f"{min(entry['iteration'] + 1, max_iter)}: {entry['segm/AP'] / 100:.3f}")
    return [f"AP by iteration: {', '.join(dict.fromkeys(points))}"] if points else []
