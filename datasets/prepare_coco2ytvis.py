#!/usr/bin/env python
"""Writes the COCO subsets that are trained on together with video data sets.

    python datasets/prepare_coco2ytvis.py                            (all of them, train and val)
    python datasets/prepare_coco2ytvis.py coco2ovis --splits train

Reads ``coco/annotations/instances_{train,val}2017.json`` under DETECTRON2_DATASETS (default ./datasets) and writes
``coco/annotations/<name>_{train,val}.json`` beside them: COCO's json with the annotations of those categories that the
video data set has too, crowds included; ids and categories stay COCO's, as the released code expects. The files are
smaller and faster to read than COCO's own, but not required: without them ``coco2*`` is read from COCO's json, with the
same records.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from vis.data.categories import COCO_TO_OVIS, COCO_TO_YTVIS_2019, COCO_TO_YTVIS_2021
from vis.data.paths import datasets_root, first_existing
from vis.data.problems import DatasetError, ProblemLog
from vis.data.ytvis_format import read_json

MAPS = {
    "coco2ytvis2019": COCO_TO_YTVIS_2019,
    "coco2ytvis2021": COCO_TO_YTVIS_2021,
    "coco2ovis": COCO_TO_OVIS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which to write: {', '.join(MAPS)} (default: all)")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"))
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in MAPS]
    if unknown:
        parser.error(f"unknown name {unknown[0]!r}; known are {', '.join(MAPS)}")
    try:
        for split in args.splits:
            prepare(split, args.names or list(MAPS))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(split: str, names: Sequence[str]) -> list[str]:
    """Writes the subsets of one split; returns the paths.

    Raises:
        FileNotFoundError: COCO's json is not there.
        DatasetError: it is not a COCO json.
    """
    what = f"coco_2017_{split}"
    candidates = [f"coco/annotations/instances_{split}2017.json"]
    source = first_existing(candidates, what="annotation file", name=what, folder=False)
    log = ProblemLog()
    tree = read_json(source, log)
    annotations = tree.get("annotations") if tree is not None else None
    if tree is not None and not (isinstance(annotations, list) and all(isinstance(each, dict) for each in annotations)):
        log.error("annotations", "must be a list of objects")
    if tree is None or log.errors:
        raise DatasetError(source, log.errors, log.error_count)
    paths = []
    for name in names:
        kept = [annotation for annotation in tree["annotations"] if annotation.get("category_id") in MAPS[name]]
        path = os.path.join(datasets_root(), "coco", "annotations", f"{name}_{split}.json")
        _write({**tree, "annotations": kept}, path)
        print(f"{path}: {len(kept)} of {len(tree['annotations'])} annotations")
        paths.append(path)
    return paths


def _write(tree: dict[str, object], path: str) -> None:
    """Writes a json whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(tree, file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


if __name__ == "__main__":
    sys.exit(main())
