#!/usr/bin/env python
"""Checks a data set before a run does: prints everything that is wrong with it at once, and what it holds.

    python tools/check_dataset.py ytvis_2021_train
    python tools/check_dataset.py --json my/train.json --root my/frames [--format coco] [--decode]
    python tools/check_dataset.py my_train --config-file configs/my.yaml     (a data set of DATASETS.CUSTOM)

The exit status is 0 if the data set can be used, 1 if not, 2 if the command is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vis.config import get_cfg
from vis.data.custom import register_custom
from vis.data.problems import Problem
from vis.data.registration import get_dataset
from vis.data.ytvis_check import DatasetReport, check_ytvis_json
from vis.data.ytvis_format import FORMATS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="a known data set, or one of DATASETS.CUSTOM with --config-file")
    parser.add_argument("--config-file", help="a yaml whose DATASETS.CUSTOM is registered first")
    parser.add_argument("--json", help="an annotation file, instead of a name")
    parser.add_argument("--root", help="the folder of its frames")
    parser.add_argument("--format", choices=FORMATS, default="ytvis", help="of --json (default: %(default)s)")
    parser.add_argument("--decode", action="store_true", help="decode every picture (slow)")
    parser.add_argument("--max-problems", type=int, default=0, help="print at most so many of each kind (default: all)")
    args = parser.parse_args(argv)
    if (args.name is None) == (args.json is None):
        parser.error("give either a name or --json FILE --root FOLDER")
    if (args.json is None) != (args.root is None):
        parser.error("--json and --root go together")
    try:
        report = _check(args)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(report, args.max_problems or None)
    return 0 if report.ok else 1


def _check(args: argparse.Namespace) -> DatasetReport:
    if args.json is not None:
        return check_ytvis_json(args.json, args.root, file_format=args.format, decode_images=args.decode)
    if args.config_file is not None:
        _register_custom(args.config_file)
    dataset = get_dataset(args.name)
    return check_ytvis_json(
        dataset.json_file,
        dataset.image_root,
        file_format=dataset.file_format,
        expected=dataset.expected,
        decode_images=args.decode,
    )


def _register_custom(config_file: str) -> None:
    """Registers ``DATASETS.CUSTOM`` of a yaml; not by ``load_cfg``, which opens the json that may be broken."""
    from vis.engine.config import read_yaml_tree

    cfg = get_cfg()
    datasets = read_yaml_tree(config_file).get("DATASETS")
    cfg.DATASETS.CUSTOM = (datasets.get("CUSTOM") if isinstance(datasets, dict) else None) or []
    register_custom(cfg)


def _print(report: DatasetReport, limit: int | None) -> None:
    print(report.summary())
    for kind, problems in (("error", report.errors), ("warning", report.warnings)):
        _print_all(kind, problems, limit)
    print(f"\n{len(report.errors)} errors, {len(report.warnings)} warnings: ", end="")
    print("the data set can be used" if report.ok else "the data set cannot be used")


def _print_all(kind: str, problems: list[Problem], limit: int | None) -> None:
    if problems:
        print(f"\n{kind}s:")
    for problem in problems[:limit]:
        print(f"  {kind}: {problem}")
    if limit is not None and len(problems) > limit:
        print(f"  ... and {len(problems) - limit} more {kind}s")


if __name__ == "__main__":
    sys.exit(main())
