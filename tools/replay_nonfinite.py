#!/usr/bin/env python
"""Runs a training step again that had numbers that are not finite, and says where they first appear.

    python tools/replay_nonfinite.py output/run/nonfinite/iter_0001234
    python tools/replay_nonfinite.py output/run/nonfinite/iter_0001234 --rank 3 --device cpu

The folder is what a training leaves in OUTPUT_DIR/nonfinite. It holds the batch, the weights, the random states and the
configuration: no data set is needed. The exit status is 0 where the same place comes first as in the training, 1 where
it does not, 2 where the folder cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vis.engine.nonfinite import replay


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", help="OUTPUT_DIR/nonfinite/iter_<iteration>")
    parser.add_argument("--rank", type=int, help="the process (default: the first in which something was found)")
    parser.add_argument("--device", default="", help="cpu or cuda (default: where the training ran, if it is here)")
    args = parser.parse_args(argv)
    try:
        result = replay(args.dump, rank=args.rank, device=args.device)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(result.lines()))
    return 0 if result.reproduced else 1


if __name__ == "__main__":
    sys.exit(main())
