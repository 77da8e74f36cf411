"""What the commands that run sweeps and recipes have in common: options, lines of the log, an end by signals."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

from vis.engine.slurm import options_of, slurm_start
from vis.engine.sweep import Start, local_start


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of both."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each run (default: cores / jobs)")
    parser.add_argument("--output", metavar="FOLDER", help="instead of `output` in the yaml")
    parser.add_argument(
        "--rerun-changed", action="store_true", help="runs of other settings than the yaml's are renamed and done anew"
    )
    parser.add_argument(
        "--report-every", type=float, default=60, metavar="SECONDS", help="between lines of progress (default: 60)"
    )
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="submit each run as a job and wait for them: partition, account, qos, constraint, nodes, cpus, memory, "
        "minutes, requeues, signal_before, job_name, setup, sbatch.<any option>",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")


def where_to_run(args: argparse.Namespace) -> Start:
    """Here, or on the cluster with ``--slurm``."""
    return local_start() if args.slurm is None else slurm_start(options_of(args.slurm))


def run_stoppable(function: Callable[[], int]) -> int:
    """Call ``function`` for the exit status; SIGTERM ends it as Ctrl-C does, after its runs were told."""
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%m/%d %H:%M:%S", level=logging.WARNING)
    for name in ("vis.engine.sweep", "vis.engine.recipe", "vis.engine.slurm"):
        logging.getLogger(name).setLevel(logging.INFO)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return function()
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
