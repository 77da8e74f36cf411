#!/usr/bin/env python
"""Train or evaluate a model: python tools/train_net.py --config-file FILE [flags] [KEY VALUE ...]"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from vis.config import CfgNode
from vis.engine import load_cfg
from vis.engine.defaults import argument_parser, default_setup, parse_arguments, run_tool
from vis.engine.launch import launch
from vis.engine.manifest import run_manifest
from vis.engine.trainer import Trainer, evaluate_only


@functools.cache
def config(file: str, opts: tuple[str, ...]) -> CfgNode:
    """Read once per process: reading it registers data sets and imports parts."""
    return load_cfg(file, opts)


def work(args: argparse.Namespace, cfg: CfgNode) -> None:
    """What every process does."""
    default_setup(cfg, args)
    kind = "evaluation" if args.eval_only else "training"
    with run_manifest(cfg, kind=kind, config_file=args.config_file, resume=args.resume) as manifest:
        if args.eval_only:
            manifest.results = evaluate_only(cfg, resume=args.resume)
            return
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        manifest.results = trainer.train()


def worker(args: argparse.Namespace) -> None:
    """One process of the job; a process of its own reads the config for itself."""
    cfg = config(args.config_file, tuple(args.opts))
    if status := run_tool(work, args, cfg, debug=args.debug):
        sys.exit(status)


def start(args: argparse.Namespace) -> None:
    """Start the processes."""
    cfg = config(args.config_file, tuple(args.opts))
    launch(
        worker,
        device=cfg.MODEL.DEVICE,
        timeout=cfg.SOLVER.DDP.TIMEOUT,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argument_parser("Train a model, or evaluate one with --eval-only.")
    args = parse_arguments(parser, argv)
    return run_tool(start, args, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
