#!/usr/bin/env python
"""Test at several sizes and fuse: python tools/multi_scale_test.py --sizes 720 1080 --config-file FILE [KEY VALUE]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vis.config import CfgNode
from vis.engine import load_cfg
from vis.engine.defaults import argument_parser, default_setup, parse_arguments, run_tool
from vis.engine.launch import launch
from vis.engine.manifest import run_manifest
from vis.engine.multi_scale import multi_scale_test

_EPILOG = """
examples:
  python tools/multi_scale_test.py --sizes 720 1080 --config-file configs/minvis/ovis_swinl_all.yaml \\
      MODEL.WEIGHTS output/minvis_ovis_swinl_all/model_final.pth OUTPUT_DIR output/multi_scale
  result files of different models: tools/ensemble.py
"""


def work(args: argparse.Namespace, cfg: CfgNode) -> None:
    """What every process does."""
    default_setup(cfg, args)
    with run_manifest(cfg, kind="multi-scale test", config_file=args.config_file, folder="fused") as manifest:
        found = multi_scale_test(cfg, args.sizes, weights=args.weights, iou_threshold=args.iou, max_num=args.max_num)
        results = {name: {"segm": result.percent()} for name, result in found.items() if result is not None}
        manifest.results = next(iter(results.values())) if len(found) == len(results) == 1 else results


def worker(args: argparse.Namespace) -> None:
    """One process of the job."""
    if status := run_tool(work, args, load_cfg(args.config_file, args.opts), debug=args.debug):
        sys.exit(status)


def start(args: argparse.Namespace) -> None:
    """Start the processes."""
    device = load_cfg(args.config_file, args.opts).MODEL.DEVICE
    places = {name: getattr(args, name) for name in ("num_gpus", "num_machines", "machine_rank", "dist_url")}
    launch(worker, device=device, args=(args,), **places)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argument_parser(
        "Evaluate MODEL.WEIGHTS at several test sizes, each in OUTPUT_DIR/size_<size>, and fuse the results to "
        "OUTPUT_DIR/fused/<data set>/results.json. INPUT.MAX_SIZE_TEST grows with the size. Twice as large takes about "
        "four times as long."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "--sizes", type=int, nargs="+", metavar="N", help="short sides in pixels (default: TEST.MULTI_SCALE.SIZES)"
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one per size (default: TEST.MULTI_SCALE.WEIGHTS, else equal)",
    )
    parser.add_argument("--iou", type=float, help="tracks are paired from this IoU on (default: TEST.MULTI_SCALE.IOU)")
    parser.add_argument(
        "--max-num", type=int, metavar="N", help="keep the N best tracks of a video (default: TEST.MULTI_SCALE.MAX_NUM)"
    )
    args = parse_arguments(parser, argv)
    if args.resume:
        parser.error("--resume is for trainings: name the weights by MODEL.WEIGHTS; sizes that are finished are kept")
    return run_tool(start, args, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
