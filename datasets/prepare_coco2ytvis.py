#!/usr/bin/env python
"""Writes the COCO subsets that are trained on together with video data sets.

    python datasets/prepare_coco2ytvis.py                            (all of them, train and val)
    python datasets/prepare_coco2ytvis.py coco2ovis --splits train

Reads ``coco/annotations/instances_{train,val}2017.json`` under DETECTRON2_DATASETS (default ./datasets) and writes
``coco/annotations/<name>_{train,val}.json`` beside them: COCO's json with the annotations of those categories that the
video data set has too, crowds included; ids and categories stay COCO's, as the released code expects. The files are
smaller and faster to read than COCO's own, but not required: without them ``coco2*`` is read from COCO's json, with the
same records. The json is read item by item, so that its size does not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TextIO

from vis.data.categories import COCO_TO_OVIS, COCO_TO_YTVIS_2019, COCO_TO_YTVIS_2021
from vis.data.json_stream import stream_json
from vis.data.paths import datasets_root, first_existing
from vis.data.problems import DatasetError, Problem

MAPS = {
    "coco2ytvis2019": COCO_TO_YTVIS_2019,
    "coco2ytvis2021": COCO_TO_YTVIS_2021,
    "coco2ytvis2022": COCO_TO_YTVIS_2021,
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
    """Writes the subsets of one split, all of them in one reading; returns the paths.

    Raises:
        FileNotFoundError: COCO's json is not there.
        DatasetError: it is not a COCO json; nothing is written then.
    """
    what = f"coco_2017_{split}"
    candidates = [f"coco/annotations/instances_{split}2017.json"]
    source = first_existing(candidates, what="annotation file", name=what, folder=False)
    folder = os.path.join(datasets_root(), "coco", "annotations")
    paths = [os.path.join(folder, f"{name}_{split}.json") for name in names]
    with ExitStack() as stack:
        subsets = [
            Subset(stack.enter_context(_whole(path)), MAPS[name]) for path, name in zip(paths, names, strict=True)
        ]
        try:
            total = _divide(source, subsets)
        except ValueError as error:
            raise DatasetError(source, [Problem("", str(error))], 1) from error
    for path, subset in zip(paths, subsets, strict=True):
        print(f"{path}: {subset.kept} of {total} annotations")
    return paths


class Subset:
    """A file that is written piece by piece."""

    def __init__(self, file: TextIO, classes: Mapping[int, int]) -> None:
        self.file, self.classes = file, classes
        self.kept = 0
        self._open, self._first = "", True

    def key(self, name: str, value: str) -> None:
        """Begin a key with its value, or with "[" the items that follow."""
        self.file.write(self._open + ("{" if not self._open else ", ") + f"{json.dumps(name)}: {value}")
        self._open, self._first = ("]" if value == "[" else " "), True

    def item(self, text: str) -> None:
        """Add an item to the list that was begun."""
        self.file.write(text if self._first else ", " + text)
        self._first = False

    def end(self) -> None:
        """Close what is open."""
        self.file.write(self._open + "}")


def _divide(source: str, subsets: Sequence[Subset]) -> int:
    """Copies a COCO json into the subsets, annotations of their classes only; returns how many there were.

    Raises:
        ValueError: it is not json, or has no list of annotations.
    """
    total = None
    for key, kind, value in stream_json(source):
        annotation = key == "annotations"
        if annotation and (kind == "value" or not (kind == "list" or isinstance(value, dict))):
            raise ValueError("annotations: must be a list of objects")
        if kind == "list" and annotation:
            total = 0
        text = "[" if kind == "list" else json.dumps(value)
        for subset in subsets:
            if kind != "item":
                subset.key(key, text)
            elif not annotation:
                subset.item(text)
            elif value.get("category_id") in subset.classes:
                subset.item(text)
                subset.kept += 1
        if annotation and kind == "item" and total is not None:
            total += 1
    if total is None:
        raise ValueError("annotations: must be a list of objects, there are none")
    for subset in subsets:
        subset.end()
    return total


@contextmanager
def _whole(path: str) -> Iterator[TextIO]:
    """A text file that is there whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


if __name__ == "__main__":
    sys.exit(main())
