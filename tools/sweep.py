#!/usr/bin/env python
"""Run a grid or a list of settings over seeds and make one table: python tools/sweep.py configs/sweeps/NAME.yaml"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from vis.engine.defaults import run_tool
from vis.engine.sweep import run_sweep, table
from vis.engine.sweep_file import read_sweep

_EPILOG = """
Runs are in OUTPUT/<sweep>/<setting>/seed<k>, with console.txt, log.txt and manifest.json; the table is in
OUTPUT/<sweep>/table.{csv,md,tex} and is written again after every run. The command may be stopped or killed at any
time: the same command continues. What the yaml may say is at the head of vis/engine/sweep_file.py.

exit status: 0 all is finished; 1 a run failed, or the file is wrong; 2 wrong usage; 130 stopped.

examples:
  python tools/sweep.py configs/sweeps/dvis_noise_tiny.yaml --jobs 2
  python tools/sweep.py configs/sweeps/dvis_noise_tiny.yaml --table-only
"""


def work(args: argparse.Namespace) -> None:
    """Run, or only make the table."""
    sweep = read_sweep(args.sweep, args.output)
    if args.table_only:
        print(table(sweep))
        return
    outcome = run_sweep(
        sweep, jobs=args.jobs, threads=args.threads, set_aside=args.rerun_changed, report_every=args.report_every
    )
    print(f"\n{table(sweep)}\n{sweep.folder}/table.csv, table.md, table.tex")
    if outcome.failed:
        raise ValueError(
            f"{len(outcome.failed)} runs failed: {', '.join(outcome.failed)}. The same command tries them again, from "
            "their last checkpoints"
        )


def stop(number: int, frame: FrameType | None) -> None:
    """A signal to end is an end like Ctrl-C: the runs are told, and may write a checkpoint."""
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="what to run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each run (default: cores / jobs)")
    parser.add_argument("--output", metavar="FOLDER", help="instead of `output` in the yaml")
    parser.add_argument("--table-only", action="store_true", help="run nothing, make the table of what is finished")
    parser.add_argument(
        "--rerun-changed",
        action="store_true",
        help="runs of other settings than the yaml's now are renamed and done anew",
    )
    parser.add_argument(
        "--report-every", type=float, default=60, metavar="SECONDS", help="between lines of progress (default: 60)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    args = parser.parse_args(argv)
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%m/%d %H:%M:%S", level=logging.WARNING)
    logging.getLogger("vis.engine.sweep").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, stop)
    try:
        return run_tool(work, args, debug=args.debug)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
