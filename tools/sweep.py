#!/usr/bin/env python
"""Run a grid or a list of settings over seeds and make one table: python tools/sweep.py configs/sweeps/NAME.yaml"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vis.engine.defaults import run_tool
from vis.engine.sweep import run_sweep, table
from vis.engine.sweep_file import read_sweep
from vis.engine.sweep_tool import add_run_options, run_stoppable, where_to_run

_EPILOG = """
Runs are in OUTPUT/<sweep>/<setting>/seed<k>, with console.txt, log.txt and manifest.json; the table is in
OUTPUT/<sweep>/table.{csv,md,tex} and is written again after every run. The command may be stopped or killed at any
time: the same command continues. What the yaml may say is at the head of vis/engine/sweep_file.py.

exit status: 0 all is finished; 1 a run failed, or the file is wrong; 2 wrong usage; 130 stopped.

examples:
  python tools/sweep.py configs/sweeps/dvis_noise_tiny.yaml --jobs 2
  python tools/sweep.py configs/sweeps/dvis_noise_tiny.yaml --table-only
  python tools/sweep.py configs/sweeps/dvis_noise.yaml --jobs 4 --slurm partition=gpu minutes=2880
"""


def work(args: argparse.Namespace) -> None:
    """Run, or only make the table."""
    sweep = read_sweep(args.sweep, args.output)
    if args.table_only:
        print(table(sweep))
        return
    outcome = run_sweep(
        sweep,
        jobs=args.jobs,
        threads=args.threads,
        set_aside=args.rerun_changed,
        start=where_to_run(args),
        report_every=args.report_every,
    )
    print(f"\n{table(sweep)}\n{sweep.folder}/table.csv, table.md, table.tex")
    if outcome.failed:
        raise ValueError(
            f"{len(outcome.failed)} runs failed: {', '.join(outcome.failed)}. The same command tries them again, from "
            "their last checkpoints"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="what to run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--table-only", action="store_true", help="run nothing, make the table of what is finished")
    add_run_options(parser)
    args = parser.parse_args(argv)
    return run_stoppable(lambda: run_tool(work, args, debug=args.debug))


if __name__ == "__main__":
    sys.exit(main())
