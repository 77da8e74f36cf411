"""Everything that is wrong with a data set at once, masks included, and a summary of what it holds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vis.data.categories import class_names
from vis.data.problems import Problem, ProblemLog, video_place
from vis.data.ytvis_format import Document, Expected, Record, check_files, read_document
from vis.structures.rle import area


@dataclass
class DatasetReport:
    """What :func:`check_ytvis_json` found.

    Attributes:
        errors: the data set is refused because of these.
        warnings: tolerated.
        annotated: whether the json has annotations.
        lengths: frames of each video.
        sizes: (height, width) -> videos.
        instances: class name -> tracks without crowds, every class of the json in it.
        crowds: tracks marked as crowd.
        masks: masks over all tracks and frames.
        occlusion: level -> masks; empty where the json gives none.
    """

    json_file: str
    image_root: str
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    annotated: bool = False
    lengths: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    instances: dict[str, int] = field(default_factory=dict)
    crowds: int = 0
    masks: int = 0
    occlusion: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether the data set can be used."""
        return not self.errors

    def summary(self) -> str:
        """The summary as text, several lines."""
        lines = [f"json    {self.json_file}", f"frames  {self.image_root}"]
        if not self.lengths:
            return "\n".join([*lines, "no video could be read"])
        low, middle, high = min(self.lengths), median(self.lengths), max(self.lengths)
        sizes = ", ".join(f"{w}x{h} ({count})" for (h, w), count in self.sizes.most_common(4))
        more = f", and {len(self.sizes) - 4} more" if len(self.sizes) > 4 else ""
        lines += [
            f"videos     {len(self.lengths)}",
            f"frames     {sum(self.lengths)}; per video: min {low}, median {middle:g}, max {high}",
            f"sizes      {sizes}{more} (width x height)",
        ]
        if not self.annotated:
            return "\n".join([*lines, f"classes    {len(self.instances)}", "annotations: none (no AP can be computed)"])
        count = sum(self.instances.values())
        lines.append(f"instances  {count} with {self.masks} masks, {self.crowds} crowds")
        if self.occlusion:
            levels = sorted(self.occlusion.items())
            lines.append("occlusion  " + ", ".join(f"{level}: {masks}" for level, masks in levels) + " (masks)")
        empty = [name for name, number in self.instances.items() if number == 0]
        lines.append(f"classes    {len(self.instances)}" + (f", {len(empty)} without an instance" if empty else ""))
        return "\n".join(lines + _table(self.instances))


def check_ytvis_json(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    file_format: str = "ytvis",
    expected: Expected | None = None,
    decode_images: bool = False,
) -> DatasetReport:
    """Checks a data set: all that loading checks, every run-length code, boxes against frames, sizes of pictures.

    Args:
        decode_images: decode every picture instead of reading the size of each video's first one.

    Returns:
        The report; a file that does not exist is an error in it, nothing is raised for what is wrong with the data set.
    """
    json_file, image_root = os.path.abspath(json_file), os.path.abspath(image_root)
    report = DatasetReport(json_file, image_root)
    log = ProblemLog()
    report.errors, report.warnings = log.errors, log.warnings
    if not os.path.isfile(json_file):
        log.error("", f"annotation file {json_file} does not exist")
        return report
    document = read_document(json_file, log, file_format=file_format, expected=expected or Expected())
    if document is None:
        return report
    _check_masks(document.records, log)
    if os.path.isdir(image_root):
        missing = log.error_count
        check_files(document.records, image_root, log)
        readable = document.records if log.error_count == missing or decode_images else []
        _check_pictures(readable, image_root, log, every=decode_images)
    else:
        log.error("", f"image folder {image_root} does not exist")
    _summarise(document, report)
    return report


def _check_masks(records: Iterable[Record], log: ProblemLog) -> None:
    for record in records:
        for track in record.get("annotations", ()):
            place = f"{video_place(record)}, annotation {track['id']}"
            visible = 0
            for frame, (mask, box) in enumerate(zip(track["segmentations"], track["bboxes"], strict=True)):
                if mask is None:
                    continue
                visible += 1
                try:
                    if isinstance(mask, dict) and area(mask) == 0:
                        log.warn(place, f"frame {frame}: the mask is empty; write null where an object is absent")
                except ValueError as error:
                    log.error(place, f"frame {frame}: {error}")
                _check_box(box, record, log, place, frame)
            if not visible:
                log.warn(place, "is in no frame; it is never trained on")


def _check_box(box: Sequence[float] | None, record: Record, log: ProblemLog, place: str, frame: int) -> None:
    if box is None:
        return
    x, y, w, h = box
    if x < -1 or y < -1 or x + w > record["width"] + 1 or y + h > record["height"] + 1:
        question = "is it [x1, y1, x2, y2]? The format is [x, y, width, height]"
        log.warn(place, f"frame {frame}: the box {box} leaves the picture; {question}")
    elif w == 0 or h == 0:
        log.warn(place, f"frame {frame}: the box {box} is of zero size")


def _check_pictures(records: Iterable[Record], image_root: str, log: ProblemLog, *, every: bool) -> None:
    """Opens the first picture of every video and compares its size, or decodes all of them."""
    from PIL import Image, UnidentifiedImageError

    for record in records:
        for name in record["file_names"] if every else record["file_names"][:1]:
            path = os.path.join(image_root, name)
            if not os.path.isfile(path):
                continue  # reported as missing before
            try:
                with Image.open(path) as picture:
                    size = picture.size
                    if every:
                        picture.load()
            except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                log.error(video_place(record), f"picture {path} cannot be decoded ({error}); copy it again")
                continue
            if size != (record["width"], record["height"]):
                log.error(
                    video_place(record),
                    f"picture {path} is {size[0]}x{size[1]}, the json says {record['width']}x{record['height']} "
                    "(width x height); correct the json or the pictures",
                )


def _summarise(document: Document, report: DatasetReport) -> None:
    records = document.records
    names = class_names(document.categories)
    report.instances = dict.fromkeys(names, 0)
    report.lengths = [record["length"] for record in records]
    report.sizes = Counter((record["height"], record["width"]) for record in records)
    report.annotated = any("annotations" in record for record in records)
    for track in (track for record in records for track in record.get("annotations", ())):
        report.masks += sum(mask is not None for mask in track["segmentations"])
        if track["iscrowd"]:
            report.crowds += 1
        else:
            report.instances[names[track["category_id"]]] += 1
        report.occlusion.update(_levels(track["occlusion"], track["segmentations"]))


def _levels(levels: list[Any] | None, masks: list[Any]) -> Iterable[str]:
    return (
        str(level) for level, mask in zip(levels or (), masks, strict=False) if mask is not None and level is not None
    )


def _table(counts: dict[str, int], columns: int = 3) -> list[str]:
    """Class names with counts, the most frequent first, in columns."""
    items = sorted(counts.items(), key=lambda item: -item[1])
    width = max((len(name) for name, _ in items), default=0)
    cells = [f"{name:<{width}} {count:>7}" for name, count in items]
    rows = -(-len(cells) // columns)
    return ["  " + "   ".join(cells[row::rows]) for row in range(rows)]
