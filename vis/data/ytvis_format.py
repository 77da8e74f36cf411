"""The YouTube-VIS format, read strictly: json -> records, one per video.

A json holds ``videos``, ``categories`` and, unless it is for a hidden test, ``annotations``: one entry per track, with
one segmentation (RLE, polygons or null) and one box ([x, y, w, h] or null) per frame. Everything wrong with a file is
reported at once, see :class:`vis.data.problems.DatasetError`. Masks are decoded by ``vis.data.ytvis_check`` only.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from vis.data.categories import COCO, Categories, Category, class_names, contiguous_ids, difference
from vis.data.coco_format import as_videos
from vis.data.paths import ImageFolder, unsafe_reason
from vis.data.problems import SHOWN, DatasetError, ProblemLog, video_place
from vis.data.ytvis_tracks import TrackReader

logger = logging.getLogger(__name__)

FORMATS = ("ytvis", "coco")
Record = dict[str, Any]
# Larger sides are a mistake in the json, and would ask for any amount of memory.
MAX_SIDE = 32767


@dataclass(frozen=True)
class Expected:
    """What is known about a data set before its json is opened.

    Args:
        categories: the categories it must have; None takes those of the json.
        coco_map: a json with COCO's categories is accepted too, its annotations are renamed by this map (COCO id ->
            id in ``categories``) and those of other categories are left out.
        annotated: annotations must be there (a training split).
    """

    categories: Categories | None = None
    coco_map: Mapping[int, int] | None = None
    annotated: bool = False


@dataclass
class Document:
    """A json, taken apart: what the reader and the checker both need."""

    categories: Categories
    records: list[Record]


def load_ytvis_json(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    dataset_name: str | None = None,
    file_format: str = "ytvis",
    expected: Expected | None = None,
    check_images: bool = True,
) -> list[Record]:
    """Reads a data set.

    Args:
        json_file: in the YouTube-VIS format, or in COCO's with ``file_format="coco"`` (an image is a one-frame video).
        image_root: the folder that ``file_names`` are relative to.
        dataset_name: kept in every record.
        expected: what the json must agree with.
        check_images: look whether every frame exists (one listing per folder; no picture is opened).

    Returns:
        One dict per video, sorted by video id: ``video_id, height, width, length, file_names`` (absolute),
        ``dataset_name, json_file`` and, where the json has annotations, ``annotations``: a list of ``id, category_id``
        (contiguous), ``iscrowd``, ``segmentations`` and ``bboxes`` (``length`` entries each; both None where the object
        is not in the frame), ``occlusion`` (a list or None). RLEs have text counts; boxes are [x, y, w, h] in pixels.

    Raises:
        FileNotFoundError: the json or the image root does not exist.
        DatasetError: the json is not valid; the message names the first problems, with video and annotation.
    """
    json_file, image_root = os.path.abspath(json_file), os.path.abspath(image_root)
    log = ProblemLog(limit=SHOWN)
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"annotation file {json_file} does not exist")
    if check_images and not os.path.isdir(image_root):
        raise FileNotFoundError(f"image folder {image_root} (of {json_file}) does not exist")
    document = read_document(json_file, log, file_format=file_format, expected=expected or Expected())
    if document is not None and not log.errors and check_images:
        check_files(document.records, image_root, log)
    if document is None or log.errors:
        raise DatasetError(json_file, log.errors, log.error_count, hint=_hint(json_file, image_root, file_format))
    for record in document.records:
        record["dataset_name"], record["json_file"] = dataset_name, json_file
        record["file_names"] = [os.path.join(image_root, name) for name in record["file_names"]]
    if log.warning_count:
        logger.warning("%s: %d warnings, the first: %s", json_file, log.warning_count, log.warnings[0])
    logger.info("%s: %d videos from %s", dataset_name or "data set", len(document.records), json_file)
    return document.records


@contextmanager
def _no_collection() -> Iterator[None]:
    """Cyclic garbage collection off: looking for garbage would take most of the time of reading a large json."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def read_document(json_file: str, log: ProblemLog, *, file_format: str, expected: Expected) -> Document | None:
    """Reads and checks everything but the pictures; None where the file is so broken that nothing can be said about it.

    The records' ``file_names`` are still relative to the image root; problems are in ``log``.
    """
    if file_format not in FORMATS:
        raise ValueError(f"unknown data set format {file_format!r}; known are {', '.join(FORMATS)}")
    tree = read_json(json_file, log)
    if tree is None or not _right_format(tree, file_format, log):
        return None
    if file_format == "coco":
        tree = as_videos(tree, log)
    categories = read_categories(tree, log)
    mapping, kept = _mapping(categories, expected, log)
    records = _videos(tree.get("videos"), log)
    annotations = tree.get("annotations")
    if annotations is not None:
        tracks = TrackReader(records, mapping, log, tolerant=file_format == "coco")
        tracks.read(annotations, {category.id for category in categories})
    elif expected.annotated:
        log.error("annotations", "is null or absent, but this is a training set; give the json with annotations")
    ordered = [records[number] for number in sorted(records)]
    return Document(categories=kept, records=ordered)


def read_json(json_file: str, log: ProblemLog) -> dict[str, Any] | None:
    """The top level of a json, or None with the problem in ``log``."""
    try:
        with open(json_file, encoding="utf-8") as file:
            tree = json.load(file, parse_constant=_no_constant)
    except UnicodeDecodeError:
        log.error("", "is not text; expected a json in the YouTube-VIS format")
        return None
    except json.JSONDecodeError as error:
        log.error(f"line {error.lineno}", f"is not valid json ({error.msg}); was the download or the copy cut off?")
        return None
    except RecursionError:
        log.error("", "is nested too deeply for a data set")
        return None
    except ValueError as error:
        log.error("", str(error))
        return None
    if not isinstance(tree, dict):
        log.error("", f"holds a {type(tree).__name__} at its top, expected an object with videos and categories")
        return None
    return tree


def read_categories(tree: Mapping[str, Any], log: ProblemLog) -> Categories:
    """The categories of a json, sorted by id."""
    entries = tree.get("categories")
    if not isinstance(entries, list) or not entries:
        log.error("categories", "must be a list of {id, name} that is not empty")
        return ()
    found: dict[int, Category] = {}
    names: dict[str, int] = {}
    for index, entry in enumerate(entries):
        place = f"categories[{index}]"
        if not isinstance(entry, dict) or not _whole(entry.get("id")) or not isinstance(entry.get("name"), str):
            log.error(place, f"expected {{id: whole number, name: text}}, found {_short(entry)}")
            continue
        category = Category(entry["id"], entry["name"])
        if category.id in found:
            log.error(place, f"id {category.id} is used twice; give every category its own id")
        elif category.name in names:
            log.error(place, f"name {category.name!r} is used twice (ids {names[category.name]} and {category.id})")
        else:
            found[category.id] = category
            names[category.name] = category.id
    return tuple(sorted(found.values()))


def check_files(records: Sequence[Record], image_root: str, log: ProblemLog) -> None:
    """Whether every frame exists below the image root; one problem per video."""
    folder = ImageFolder(image_root)
    for record in records:
        wrong: dict[str, list[str]] = {"missing": [], "outside": []}
        for name in record["file_names"]:
            problem = folder.problem(name)
            if problem:
                wrong[problem].append(name)
        place = video_place(record)
        if wrong["missing"]:
            names = wrong["missing"]
            log.error(
                place,
                f"{len(names)} of {record['length']} frames are missing, the first is "
                f"{os.path.join(image_root, names[0])}; unpack the pictures there or correct the image root",
            )
        if wrong["outside"]:
            log.error(
                place,
                f"{wrong['outside'][0]!r} is a link out of the image root {image_root}; copy the frames, or make the "
                "image root itself the link",
            )


def _right_format(tree: Mapping[str, Any], file_format: str, log: ProblemLog) -> bool:
    key, other, other_format = ("images", "videos", "ytvis") if file_format == "coco" else ("videos", "images", "coco")
    if key in tree:
        return True
    hint = f"; it has {other!r}: is its format {other_format!r}?" if other in tree else ""
    log.error("", f"has no {key!r} (found: {', '.join(sorted(map(str, tree))[:8]) or 'nothing'}){hint}")
    return False


def _mapping(categories: Categories, expected: Expected, log: ProblemLog) -> tuple[dict[int, int], Categories]:
    """Category id in the json -> contiguous class, and the categories those classes belong to."""
    if expected.categories is None or not categories:
        return contiguous_ids(categories), categories
    contiguous = contiguous_ids(expected.categories)
    wrong = difference(categories, expected.categories)
    if wrong is None:
        return contiguous, expected.categories
    if expected.coco_map is not None and _is_coco(categories):
        return {number: contiguous[target] for number, target in expected.coco_map.items()}, expected.categories
    log.error(
        "categories",
        f"differ from those of this data set ({class_names(expected.categories)[0]}, ... {len(expected.categories)} in "
        f"all): the json {wrong}. Is it the json of another data set or version? Use the right name or file, or "
        "register it under a name of its own with DATASETS.CUSTOM",
    )
    return {**contiguous_ids(categories)}, categories


def _is_coco(categories: Categories) -> bool:
    return difference(categories, COCO) is None


def _videos(entries: Any, log: ProblemLog) -> dict[int, Record]:
    """The videos of a json by id, those that are wrong left out."""
    if not isinstance(entries, list) or not entries:
        log.error("videos", "must be a list of videos that is not empty")
        return {}
    records: dict[int, Record] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _whole(entry.get("id")):
            log.error(f"videos[{index}]", f"expected {{id, width, height, length, file_names}}, found {_short(entry)}")
        elif entry["id"] in records:
            log.error(f"videos[{index}]", f"id {entry['id']} is used twice; give every video its own id")
        else:
            # also where something is wrong: its annotations can then still be checked
            records[entry["id"]] = _video(entry, log)
    return records


def _video(entry: Mapping[str, Any], log: ProblemLog) -> Record:
    names = entry.get("file_names")
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    record: Record = {"video_id": entry["id"], "file_names": names if good else []}
    place = video_place(record)
    if not good or not names:
        log.error(place, f"file_names must be a list of file names that is not empty, found {_short(names)}")
    for name in record["file_names"]:
        reason = unsafe_reason(name)
        if reason:
            log.error(place, f"file name {name!r} {reason}")
            break
    for key in ("height", "width"):
        value: Any = entry.get(key)
        if not _whole(value) or not 0 < value <= MAX_SIDE:
            log.error(place, f"{key} must be a whole number of pixels from 1 to {MAX_SIDE}, found {_short(value)}")
        record[key] = value if _whole(value) else 0
    count = len(record["file_names"])
    length = entry.get("length", count)
    if length != count:
        log.error(place, f"length is {_short(length)}, but file_names lists {count} frames; make them agree")
    record["length"] = count
    return record


def _whole(value: Any) -> bool:
    return type(value) is int


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"holds {text}, which is not a number; write null for what is absent")


def _hint(json_file: str, image_root: str, file_format: str) -> str:
    extra = "" if file_format == "ytvis" else f" --format {file_format}"
    return f"See all of them: python tools/check_dataset.py --json {json_file} --root {image_root}{extra}"
