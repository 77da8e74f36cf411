#!/usr/bin/env python
"""The demo: embedded data, a short training, AP on held-out clips, pictures. `make demo` runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vis.engine.defaults import run_tool
from vis.engine.demo import make_weights, run_demo

EXAMPLES = """\
examples
  python tools/run_demo.py                            continue from the checkpoint that ships with the project
  python tools/run_demo.py MODEL.WEIGHTS ""           the same training from initial weights: AP starts at 0 and rises
  python tools/run_demo.py --make-weights             make that checkpoint anew (continues where it was stopped)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--make-weights", action="store_true", help="train the small checkpoint instead (35 to 60 minutes)"
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: the one in configs/demo for what is run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="values that override the config")
    args = parser.parse_args(argv)
    return run_tool(make_weights if args.make_weights else run_demo, args, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
