#!/usr/bin/env python
"""Train the stages of a method one after the other: python tools/run_recipe.py configs/recipes/NAME.yaml"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vis.engine.defaults import run_tool
from vis.engine.recipe import check_handovers, checked_start, read_recipe, status
from vis.engine.sweep import run_sweep
from vis.engine.sweep_jobs import make_jobs
from vis.engine.sweep_tool import add_run_options, run_stoppable, where_to_run

_EPILOG = """
Stages are in OUTPUT/<recipe>/<stage>. What each hands over is compared with what the next one accepts before the first
one starts, and again when the file is there. The command may be stopped or killed at any time: the same command
continues, in the stage and at the checkpoint where it was. The head of vis/engine/recipe.py has what the yaml may say.

exit status: 0 all is finished; 1 a stage failed, or does not fit to the one before; 2 wrong usage; 130 stopped.

examples:
  python tools/run_recipe.py configs/recipes/dvis_tiny.yaml
  python tools/run_recipe.py configs/recipes/dvis_ovis_r50.yaml --num-gpus 8
  python tools/run_recipe.py configs/recipes/dvis_ovis_r50.yaml --from online --weights weights/minvis_ovis_R50.pth
  python tools/run_recipe.py configs/recipes/dvis_ovis_r50.yaml --status
  python tools/run_recipe.py configs/recipes/dvis_ovis_r50.yaml --slurm partition=gpu nodes=1 minutes=2880
"""


def work(args: argparse.Namespace) -> None:
    """Run, or only say how far it is."""
    recipe = read_recipe(
        args.recipe, output=args.output, first=args.first, weights=args.weights, num_gpus=args.num_gpus
    )
    jobs = make_jobs(recipe)
    if args.status:
        print(status(jobs))
        return
    if args.check:
        check_handovers(jobs)
        print(f"{args.recipe}: every stage accepts what the one before will write")
        return
    outcome = run_sweep(
        recipe,
        threads=args.threads,
        set_aside=args.rerun_changed,
        start=checked_start(where_to_run(args)),
        check=check_handovers,
        report_every=args.report_every,
    )
    print(f"\n{status(jobs)}")
    if outcome.failed:
        name, why = next(iter(outcome.failed.items()))
        raise ValueError(f"stage {name} failed: {why}\nThe same command continues with it")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="what to run")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="leave out the stages before this one")
    parser.add_argument("--weights", metavar="FILE", help="what that stage (else the first) starts from")
    parser.add_argument(
        "--num-gpus", type=int, metavar="N", help="GPUs of this machine for each stage (default: the yaml's)"
    )
    parser.add_argument("--status", action="store_true", help="run nothing, say how far each stage is")
    parser.add_argument("--check", action="store_true", help="run nothing, only compare what stages hand over")
    add_run_options(parser)
    args = parser.parse_args(argv)
    return run_stoppable(lambda: run_tool(work, args, debug=args.debug))


if __name__ == "__main__":
    sys.exit(main())
