#!/usr/bin/env python
"""Compare a model with the recording of a released one: keys, outputs, losses.

    python tools/check_parity.py --config-file configs/minvis/ytvis19_r50.yaml --manifest M.manifest.json.gz \
        --outputs M.npz --losses M.train.json
    python tools/check_parity.py --config-file configs/minvis/ovis_vitl.yaml --only backbone. \
        --manifest dvisplus_online_vitl.manifest.json.gz --outputs dvisplus_online_vitl.npz

The weights are computed from their names as the manifest says. Exit status 0: everything recorded was compared and
holds; 1: something differs or could not be compared; 2: a file or the configuration is wrong. --only PREFIX... compares
a part of the model, such as its backbone, with the recording of another model; what it leaves out is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vis.engine import load_cfg
from vis.engine.parity import check_parity, left_out, parity_options
from vis.modeling import build_model


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, compare, print a line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="C", help="configuration of the released model")
    parser.add_argument("--manifest", required=True, metavar="M.manifest.json.gz", help="the released state dict")
    parser.add_argument("--outputs", metavar="M.npz", help="recorded outputs")
    parser.add_argument(
        "--losses", metavar="M.train.json", help="recorded losses; their clip, M.train.npz, lies beside"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PREFIX", help="compare only keys and arrays that begin so"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the configuration")
    args = parser.parse_args(argv)
    try:
        recorded = parity_options(load_cfg(args.config_file, args.opts), args.losses)
        model = build_model(load_cfg(args.config_file, [*recorded, *args.opts]))
        checks = check_parity(model, args.manifest, args.outputs, args.losses, only=args.only)
        omitted = left_out(model, args.manifest, args.outputs, args.only)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for check in checks:
        print(check)
    for text in omitted:
        print(f"left out, as --only {' '.join(args.only)} asks: {text}")
    failed = sum(not check.ok for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} comparisons hold" + (f", {failed} FAILED" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
