#!/usr/bin/env python
"""Submit a training to SLURM: python tools/slurm_train.py [options] -- [TOOL.py] ARGUMENTS OF THE TOOL"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vis.engine.defaults import run_tool
from vis.engine.slurm import SlurmOptions, load_tool, script, submit

_EPILOG = """
TOOL is train_net.py where none is named; run_recipe.py, sweep.py and the others run as one task of one node. The job is
requeued when it is preempted (--signal-before seconds are for a checkpoint) or its --minutes are over, and continues
with --resume. submitit is needed: pip install submitit.

examples:
  python tools/slurm_train.py --partition gpu --nodes 2 --gpus-per-node 8 --dry-run -- \\
      --config-file configs/dvis/ovis_online_r50.yaml OUTPUT_DIR output/dvis
  python tools/slurm_train.py --gpus-per-node 8 --minutes 2880 -- run_recipe.py configs/recipes/dvis_ovis_r50.yaml
  python tools/slurm_train.py --setup "module load cuda" --sbatch mail-type=END -- --config-file cfg.yaml --eval-only
"""


def work(args: argparse.Namespace) -> None:
    """Submit, or show the script."""
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    named = bool(words) and words[0].endswith(".py")
    name, rest = (Path(words[0]).stem, words[1:]) if named else ("train_net", words)
    if not rest:
        raise ValueError("no command: give the arguments of tools/train_net.py, or another tool's, after --")
    load_tool(name)
    options = slurm_options(args)
    tools = [(name, rest)]
    folder = Path(args.folder)
    if args.dry_run:
        print(script(options, tools, folder))
        print(f"# each task runs: tools/{name}.py {' '.join(rest)}")
        return
    job = submit(options, tools, folder)
    print(f"job {job.job_id}; log: {job.paths.stdout}; cancel: scancel {job.job_id}")


def slurm_options(args: argparse.Namespace) -> SlurmOptions:
    """From the command line."""
    more = dict(item.split("=", 1) if "=" in item else (item, True) for item in args.sbatch)
    names = ("partition", "account", "qos", "constraint", "nodes", "gpus_per_node", "cpus", "memory", "minutes")
    chosen = {name: getattr(args, name) for name in (*names, "requeues", "signal_before", "job_name")}
    return SlurmOptions(**chosen, setup=tuple(args.setup), more=more)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("partition", "account", "qos", "constraint"):
        parser.add_argument(f"--{name}", metavar="NAME", help="as of sbatch")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="N", help="one task each (default: 1)")
    parser.add_argument("--cpus", type=int, default=8, metavar="N", help="cores for each GPU (default: 8)")
    parser.add_argument("--memory", metavar="SIZE", help="of a node, for instance 200GB")
    parser.add_argument("--minutes", type=int, default=1440, metavar="N", help="of one stay (default: 1440)")
    parser.add_argument(
        "--requeues", type=int, default=20, metavar="N", help="how often it may run out of time (default: 20)"
    )
    parser.add_argument(
        "--signal-before", type=int, default=120, metavar="S", help="seconds for the checkpoint (default: 120)"
    )
    parser.add_argument("--job-name", default="vis", metavar="NAME", help="default: vis")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell line before the job")
    parser.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    parser.add_argument(
        "--folder",
        default="output/slurm",
        metavar="FOLDER",
        help="logs of jobs, on a shared disk (default: output/slurm)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    args = parser.parse_args(argv)
    return run_tool(work, args, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
