"""Divides the annotated training videos of YouTube-VIS and OVIS into minitrain and minival: a benchmark without server.

    python datasets/prepare_minival.py                        # every data set whose training json is on disk
    python datasets/prepare_minival.py ovis ytvis_2021
    python datasets/prepare_minival.py --verify               # compare the files on disk with the json they came from
    python datasets/prepare_minival.py my_set --json my/train.json --size 30

Beside the training json `train.json` it writes `train_minitrain.json`, `train_minival.json` and
`train_minival_manifest.json`. The frames stay where they are. Two groups have the same division if the version and the
hashes of the ids that are printed here agree. Train on `<name>_minitrain`, evaluate on `<name>_minival`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vis.data.builtin import builtin_datasets
from vis.data.minival import FRACTIONS, Minival, part_path, verify_minival, write_minival
from vis.data.paths import expand


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 1 if a json is missing or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which to divide: {', '.join(FRACTIONS)} (default: those on disk)")
    parser.add_argument("--json", help="the training json of one data set of your own, or in another place")
    parser.add_argument("--size", type=int, help="videos of minival (no longer comparable with the default)")
    parser.add_argument("--verify", action="store_true", help="write nothing; compare what is on disk")
    args = parser.parse_args(argv)
    if args.json and len(args.names) != 1:
        parser.error("--json needs exactly one name")
    unknown = [name for name in args.names if name not in FRACTIONS]
    if unknown and not args.json:
        parser.error(f"unknown name {unknown[0]!r}; known are {', '.join(FRACTIONS)}; others need --json and --size")
    datasets = builtin_datasets()
    done = 0
    try:
        for name in args.names or FRACTIONS:
            try:
                source = expand(args.json) if args.json else datasets[f"{name}_train"].json_file
            except FileNotFoundError as error:
                if args.names:
                    raise
                print(f"{name}: left out, {str(error).splitlines()[0]}")
                continue
            action = verify_minival if args.verify else write_minival
            print(_report(action(source, name=name, size=args.size), source))
            done += 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not done:
        print("error: no training json is on disk; datasets/README.md says where they belong", file=sys.stderr)
    return 0 if done else 1


def _report(division: Minival, source: str) -> str:
    lines = [f"{division.dataset}: minival version {division.minival_version}, source sha256 {division.source_sha256}"]
    for part, count in division.num_videos.items():
        lines.append(f"  {part_path(source, part)}: {count} videos, ids sha256 {division.ids_sha256[part]}")
    table = ", ".join(f"{name} {train}/{val}" for name, (train, val) in division.classes.items())
    return "\n".join([*lines, f"  videos per class, minitrain/minival: {table}"])


if __name__ == "__main__":
    sys.exit(main())
