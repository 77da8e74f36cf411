#!/usr/bin/env python
"""Measure speed and memory, with the settings that the figures depend on.

    python tools/benchmark.py memory                 # peak memory of inference at 30 and at 300 frames
    python tools/benchmark.py memory --end-to-end    # a whole evaluation from files, at 50 and at 1000 frames of 720p
    python tools/benchmark.py inference --json out.json
    python tools/benchmark.py inference --against-plain   # and beside it the released architecture in plain PyTorch
    python tools/benchmark.py inference --beside configs/dvis/ovis_online_r50.yaml   # several models in turn
    python tools/benchmark.py train                  # a training step
    python tools/benchmark.py train --variants plain bf16 accumulate checkpoint   # whole iterations, with the loader
    python tools/benchmark.py train --against-plain  # and beside it the straightforward one, with dense masks
    python tools/benchmark.py op                     # deformable attention alone, its backends side by side on a CPU
    python tools/benchmark.py op-device              # the same on a GPU: device times, against what it must move
    python tools/benchmark.py linear                 # linear layers on a CPU, beside torch's own
    python tools/benchmark.py data                   # mapper, decoding, loaders, on the synthetic data set
    python tools/benchmark.py evaluation             # AP of a large result file, beside going pair by pair

KEY VALUE pairs after --opts change the configuration. Without --weights or --manifest the model has its initial
weights: fine for time and memory of the network, but its masks have more ragged outlines than those of a trained one,
so that encoding them takes longer. (An IDOL's scores and embeddings are scaled then, or it would find nothing to
track.) The exit status of `memory` is 1 where memory grows with the length of the video.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vis.engine.benchmarks import (
    Settings,
    against_plain,
    beside,
    data,
    evaluation,
    inference,
    linear,
    memory,
    op,
    op_device,
    plain_train,
    train,
    train_variants,
)
from vis.engine.benchmarks.common import device_name, environment

Benchmark = tuple[Callable[[Settings], dict[str, Any]], Callable[[dict[str, Any]], list[str]], dict[str, Any]]

#: name -> what measures it, what words it, and defaults that differ from those of Settings.
BENCHMARKS: dict[str, Benchmark] = {
    "op": (op.measure_op, op.lines, {"repeats": 5}),
    "op-device": (op_device.measure_device, op_device.lines, {"device": "cuda", "warmup": 10, "repeats": 50}),
    "inference": (inference.measure_inference, inference.lines, {}),
    "memory": (memory.measure_memory, memory.lines, {"frames": (30, 300), "warmup": 0, "repeats": 1}),
    "train": (train.measure_train, train.lines, {"input_size": (240, 416), "frames": (1,)}),
    "linear": (linear.measure_linear, linear.lines, {"repeats": 10}),
    "data": (data.measure_data, data.lines, {}),
    "evaluation": (evaluation.measure_evaluation, evaluation.lines, {"frames": (36,), "threads": 2}),
}

#: The same for --against-plain.
AGAINST_PLAIN: dict[str, Benchmark] = {
    "inference": (against_plain.measure_against_plain, against_plain.lines, {}),
    "train": (plain_train.measure_train_against_plain, plain_train.lines, plain_train.DEFAULTS),
}


def size(text: str) -> tuple[int, int]:
    """``192x320`` -> (192, 320)."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, like 192x320") from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes must be positive")
    return height, width


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument(
        "--config-file",
        metavar="C",
        help="model (default configs/minvis/ytvis19_r50.yaml; train --against-plain: configs/vita/ytvis19_r50.yaml)",
    )
    parser.add_argument("--against-plain", action="store_true", help="inference, train: beside plain PyTorch, in turn")
    parser.add_argument("--beside", nargs="+", metavar="C", help="inference: more configurations, timed in turn")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint for the model")
    parser.add_argument("--manifest", metavar="M.json.gz", help="fill the weights by a parity manifest's formula")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default cpu (op-device: cuda)")
    parser.add_argument("--threads", type=int, help="PyTorch threads (default 1)")
    parser.add_argument("--frames", type=int, nargs="+", metavar="N", help="length of the video; memory takes several")
    parser.add_argument("--input-size", type=size, metavar="HxW", help="network input")
    parser.add_argument("--output-size", type=size, metavar="HxW", help="size of the results")
    parser.add_argument("--warmup", type=int, metavar="N", help="runs before those that count")
    parser.add_argument("--repeats", type=int, metavar="N", help="runs that count")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="V",
        choices=sorted(train_variants.VARIANTS),
        help=f"train: whole iterations in these ways ({', '.join(train_variants.VARIANTS)})",
    )
    parser.add_argument(
        "--end-to-end", action="store_true", help="memory: evaluate a video in files (default model: the demo's)"
    )
    parser.add_argument("--json", metavar="OUT", help="write figures and settings to this file")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    parser, args = parse(argv)
    measure, lines, defaults = BENCHMARKS[args.benchmark]
    if args.end_to_end:
        if args.benchmark != "memory":
            parser.error("--end-to-end is an option of memory")
        defaults = {**defaults, "config_file": memory.END_TO_END_CONFIG, "frames": (50, 1000)}
    if args.against_plain:
        if args.benchmark not in AGAINST_PLAIN:
            parser.error(f"--against-plain belongs to {' and '.join(AGAINST_PLAIN)}, not to {args.benchmark}")
        measure, lines, more = AGAINST_PLAIN[args.benchmark]
        defaults = {**defaults, **more}
    if args.beside:
        if args.benchmark != "inference" or args.against_plain:
            parser.error("--beside belongs to inference, without --against-plain")
        measure, lines = beside.measure_beside, beside.lines
    if args.variants:
        if args.benchmark != "train" or args.against_plain:
            parser.error("--variants belongs to train, without --against-plain")
        measure, lines = train_variants.measure_variants, train_variants.lines
    given = {
        key: value for key, value in vars(args).items() if value is not None and key in Settings.__dataclass_fields__
    }
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        settings = Settings(**{**defaults, **given})
        torch.set_num_threads(settings.threads)
        report = {"benchmark": args.benchmark, "settings": asdict(settings), "environment": environment()}
        report["environment"]["device"] = device_name(settings.device)
        result = measure(settings)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    report["result"] = result
    described = ", ".join(f"{key} {value}" for key, value in asdict(settings).items() if value not in ("", ()))
    print(f"{args.benchmark}: {described}")
    print("on: " + ", ".join(f"{key} {value}" for key, value in report["environment"].items() if value is not None))
    print("\n".join(lines(result)))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if result.get("ratio", 0) > result.get("bar", float("inf")) else 0


if __name__ == "__main__":
    raise SystemExit(main())
