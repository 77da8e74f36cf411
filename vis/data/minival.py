"""A local benchmark: the annotated training videos of a data set, divided into minitrain and minival.

The validation sets of YouTube-VIS and OVIS have no public annotations, so an AP that needs no server is measured on
training videos that were kept out of training. For two groups to compare, these must be the same videos: the division
here is a pure function of (version, video ids, classes of each video, size), computed in whole numbers, and its hash is
written down. Videos are never divided by frame.

Stratification: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data" (ECML PKDD 2011), section
3.2 (iterative stratification); the classes of a video are its labels. Where the paper draws at random, the sha256 of
``"<version>:<video id>"`` decides.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vis.data.problems import DatasetError, ProblemLog
from vis.data.ytvis_format import read_categories, read_json

logger = logging.getLogger(__name__)

MINIVAL_VERSION = 1
"""Raised whenever a change gives other videos for the same json."""

FRACTIONS: Mapping[str, tuple[int, int]] = {"ytvis_2019": (1, 10), "ytvis_2021": (1, 10), "ovis": (1, 5)}
"""The part of the training videos that is minival, as (numerator, denominator). OVIS has 607 training videos only: of a
tenth of them an AP would hang on single videos."""

PARTS = ("minitrain", "minival")


@dataclass(frozen=True)
class Minival:
    """The division of one json; what its manifest file holds.

    Attributes:
        dataset: name of the data set.
        minival_version: :data:`MINIVAL_VERSION` of the code that made it.
        source: file name of the json that was divided.
        source_sha256: hash of its bytes.
        num_videos: part -> number of videos.
        ids_sha256: part -> :func:`ids_hash` of its video ids. Groups whose values agree have the same videos.
        classes: class name -> [videos of minitrain, videos of minival] that show it.
        minitrain, minival: the video ids, ascending.
    """

    dataset: str
    minival_version: int
    source: str
    source_sha256: str
    num_videos: dict[str, int]
    ids_sha256: dict[str, str]
    classes: dict[str, list[int]]
    minitrain: list[int]
    minival: list[int]


def ids_hash(ids: Iterable[int]) -> str:
    """sha256 of the ascending ids in decimal, joined by commas."""
    return hashlib.sha256(",".join(map(str, sorted(ids))).encode()).hexdigest()


def minival_size(num_videos: int, fraction: tuple[int, int]) -> int:
    """Number of videos of minival: the fraction of all, rounded half up."""
    numerator, denominator = fraction
    return (2 * num_videos * numerator + denominator) // (2 * denominator)


def split_videos(labels: Mapping[int, Collection[int]], num_val: int) -> tuple[list[int], list[int]]:
    """Divides videos so that every class has about the same share of its videos in minival.

    Every class with two videos or more is in both parts wherever that is possible with ``num_val`` videos; where it is
    not, a warning names the classes.

    Args:
        labels: video id -> the category ids it shows; may be empty. The order plays no part.
        num_val: size of minival, from 1 to one less than there are videos; met exactly.

    Returns:
        Ids of minitrain and of minival, each ascending.

    Raises:
        ValueError: ``num_val`` is out of range.
    """
    if not 1 <= num_val < len(labels):
        raise ValueError(
            f"minival of {num_val} videos cannot be taken from {len(labels)}; each part needs one video at least: give "
            f"a size from 1 to {len(labels) - 1}"
        )
    ids = sorted(labels, key=_rank)
    classes = sorted({label for each in labels.values() for label in each})
    shows = np.array([[c in labels[i] for c in classes] for i in ids], dtype=np.int64).reshape(len(ids), len(classes))
    in_val = _stratify(shows, num_val)
    _settle(shows, in_val, num_val)
    missing = [classes[c] for c in np.flatnonzero(_missing(shows.sum(0), shows[in_val].sum(0)))]
    if missing:
        logger.warning("minival of %d videos: categories %s are in one part only", num_val, missing)
    chosen = {i for i, val in zip(ids, in_val, strict=True) if val}
    return sorted(set(ids) - chosen), sorted(chosen)


def _rank(video_id: int) -> bytes:
    return hashlib.sha256(f"{MINIVAL_VERSION}:{video_id}".encode()).digest()


def _wanted(totals: NDArray[np.int64], num: int, num_val: int) -> NDArray[np.int64]:
    """Videos of each class that minival should have, in 1/num of a video; one at least on either side."""
    wanted: NDArray[np.int64] = np.clip(
        totals * num_val, np.minimum(totals // 2, 1) * num, np.maximum(totals - 1, 0) * num
    )
    return wanted


def _stratify(shows: NDArray[np.int64], num_val: int) -> NDArray[np.bool_]:
    """Iterative stratification; (N,) whether a video goes to minival. ``shows`` is (N, K)."""
    num, num_classes = shows.shape
    totals = shows.sum(0)
    # Rows: minitrain, minival. How many videos each still wants, in all and of each class, in 1/num of a video.
    lacks = np.array([num - num_val, num_val], dtype=np.int64) * num
    val_lacks = _wanted(totals, num, num_val)
    class_lacks = np.stack([totals * num - val_lacks, val_lacks])
    in_val = np.zeros(num, bool)
    left = np.ones(num, bool)
    while left.any():
        remaining = shows[left].sum(0)
        present = np.flatnonzero(remaining)
        # the rarest class first, of equally rare ones the smaller id; at last the videos without any class
        rarest = present[remaining[present].argmin()] if present.size else None
        chosen = left if rarest is None else left & (shows[:, rarest] > 0)
        for video in np.flatnonzero(chosen):
            wishes = lacks if rarest is None else class_lacks[:, rarest]
            part = int(wishes[1] > wishes[0] or (wishes[1] == wishes[0] and lacks[1] > lacks[0]))
            in_val[video] = bool(part)
            lacks[part] -= num
            class_lacks[part] -= shows[video] * num
        left &= ~chosen
    return in_val


def _missing(totals: NDArray[np.int64], in_val: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Classes with two videos or more of which one part has none; ``in_val`` is (..., K)."""
    missing: NDArray[np.bool_] = (totals >= 2) & ((in_val <= 0) | (in_val >= totals))
    return missing


def _cost(totals: NDArray[np.int64], in_val: NDArray[np.int64], num: int, num_val: int) -> NDArray[np.int64]:
    """How far counts (..., K) of minival are from what is wanted: whole numbers, so that all machines agree."""
    off = (in_val * num - _wanted(totals, num, num_val)) * 16 // num  # in 1/16 of a video: squares stay small
    # 1000 keeps digits of the division; a missing class outweighs any imbalance
    distance = (off**2 * 1000 // np.maximum(totals, 1)).sum(-1)
    cost: NDArray[np.int64] = distance + _missing(totals, in_val).sum(-1) * 10**15
    return cost


def _settle(shows: NDArray[np.int64], in_val: NDArray[np.bool_], num_val: int) -> None:
    """Moves single videos until minival has its size, then swaps pairs while a class is missing from one part.

    The paper's procedure meets the size only about, and classes with few videos can all fall to one part.
    """
    num = len(shows)
    totals = shows.sum(0)
    while (excess := int(in_val.sum()) - num_val) != 0:
        movable = np.flatnonzero(in_val == (excess > 0))
        after = shows[in_val].sum(0) - np.sign(excess) * shows[movable]
        video = movable[_cost(totals, after, num, num_val).argmin()]
        in_val[video] = excess < 0
    while _missing(totals, counts := shows[in_val].sum(0)).any():
        inside, outside = np.flatnonzero(in_val), np.flatnonzero(~in_val)
        costs = np.stack([_cost(totals, counts - shows[i] + shows[outside], num, num_val) for i in inside])
        best = int(costs.argmin())
        if costs.flat[best] >= _cost(totals, counts, num, num_val):
            return
        in_val[inside[best // len(outside)]] = False
        in_val[outside[best % len(outside)]] = True


def part_path(source: str | os.PathLike[str], part: str) -> Path:
    """Where a part lies: ``a/train.json`` -> ``a/train_minival.json``."""
    path = Path(source)
    return path.with_name(f"{path.stem}_{part}.json")


def divide_json(
    source: str | os.PathLike[str], *, name: str, size: int | None = None
) -> tuple[Minival, dict[str, Any]]:
    """Reads a YouTube-VIS json and divides its videos.

    Args:
        source: the training json.
        name: the data set, a key of :data:`FRACTIONS` unless ``size`` is given.
        size: videos of minival; default: the data set's fraction.

    Returns:
        The division, and the content of the json.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: it is no YouTube-VIS json with annotations, or two of its videos share a frame.
        ValueError: the size is out of range, or not given for a data set without a fraction.
    """
    if size is None and name not in FRACTIONS:
        raise ValueError(f"no size of minival is known for {name!r} (known: {', '.join(FRACTIONS)}); give one")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    log = ProblemLog()
    tree = read_json(str(path), log)
    categories = read_categories(tree, log) if tree is not None else ()
    labels = _labels(tree, {category.id for category in categories}, log) if tree is not None else {}
    if tree is None or log.errors:
        raise DatasetError(str(path), log.errors, log.error_count)
    num_val = minival_size(len(labels), FRACTIONS[name]) if size is None else size
    train, val = split_videos(labels, num_val)
    parts = dict(zip(PARTS, (train, val), strict=True))
    classes = {c.name: [sum(c.id in labels[i] for i in ids) for ids in parts.values()] for c in categories}
    division = Minival(
        dataset=name,
        minival_version=MINIVAL_VERSION,
        source=path.name,
        source_sha256=_file_hash(path),
        num_videos={part: len(ids) for part, ids in parts.items()},
        ids_sha256={part: ids_hash(ids) for part, ids in parts.items()},
        classes=classes,
        minitrain=train,
        minival=val,
    )
    return division, tree


def _labels(tree: Mapping[str, Any], categories: Collection[int], log: ProblemLog) -> dict[int, set[int]]:
    """Video id -> ids of its categories, crowds left out."""
    videos, annotations = tree.get("videos"), tree.get("annotations")
    if not isinstance(videos, list) or not isinstance(annotations, list) or not videos or not annotations:
        log.error("", "needs lists 'videos' and 'annotations' that are not empty; give the json of the training videos")
        return {}
    labels: dict[int, set[int]] = {}
    owner: dict[str, int] = {}
    for index, video in enumerate(videos):
        if not isinstance(video, dict) or type(video.get("id")) is not int or video["id"] in labels:
            log.error(f"videos[{index}]", "expected an object with a whole 'id' that no other video has")
            continue
        labels[video["id"]] = set()
        names = video.get("file_names")
        for frame in names if isinstance(names, list) else ():
            if owner.setdefault(str(frame), video["id"]) != video["id"]:
                log.error(f"video {video['id']}", f"shares the frame {frame!r} with video {owner[str(frame)]}")
                break
    for index, annotation in enumerate(annotations):
        keys = annotation if isinstance(annotation, dict) else {}
        if keys.get("video_id") not in labels or keys.get("category_id") not in categories:
            log.error(f"annotations[{index}]", "its 'video_id' or 'category_id' is not listed in the json")
        elif not keys.get("iscrowd"):
            labels[keys["video_id"]].add(keys["category_id"])
    return labels


def write_minival(source: str | os.PathLike[str], *, name: str, size: int | None = None) -> Minival:
    """Writes both parts and the manifest (``<source>_minival_manifest.json``) beside the json, whole or not at all.

    A part is the json with the videos and annotations of its ids; everything else, file names included, is as it was,
    and ``info["minival"]`` says what it is.

    Raises:
        FileNotFoundError, DatasetError, ValueError: see :func:`divide_json`.
        OSError: the folder cannot be written to.
    """
    division, tree = divide_json(source, name=name, size=size)
    summary = {key: value for key, value in asdict(division).items() if key not in (*PARTS, "classes")}
    info = tree["info"] if isinstance(tree.get("info"), dict) else {}
    for part in PARTS:
        ids = set(getattr(division, part))
        content = {
            **tree,
            "info": {**info, "minival": {"part": part, **summary}},
            "videos": [video for video in tree["videos"] if video["id"] in ids],
            "annotations": [annotation for annotation in tree["annotations"] if annotation["video_id"] in ids],
        }
        _write(content, part_path(source, part), indent=None)
    _write(asdict(division), part_path(source, "minival_manifest"), indent=1)
    return division


def verify_minival(source: str | os.PathLike[str], *, name: str, size: int | None = None) -> Minival:
    """Divides the json anew and compares with the parts on disk.

    Raises:
        FileNotFoundError: the json or a part does not exist.
        ValueError: a part has other videos, or was made from another json; and as :func:`divide_json`.
    """
    division, _ = divide_json(source, name=name, size=size)
    for part in PARTS:
        path = part_path(source, part)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; write it with datasets/prepare_minival.py")
        log = ProblemLog()
        tree = read_json(str(path), log)
        if tree is None:
            raise DatasetError(str(path), log.errors, log.error_count)
        note = tree["info"].get("minival", {}) if isinstance(tree.get("info"), dict) else {}
        videos: Sequence[Any] = tree.get("videos") or ()
        found = ids_hash(video["id"] for video in videos)
        if found != division.ids_sha256[part] or note.get("source_sha256") != division.source_sha256:
            raise ValueError(
                f"{path}: {len(videos)} videos with ids hash {found[:12]}, made from the json with sha256 "
                f"{str(note.get('source_sha256'))[:12]} by version {note.get('minival_version')}; expected "
                f"{division.num_videos[part]} videos, {division.ids_sha256[part][:12]}, "
                f"{division.source_sha256[:12]}, version {MINIVAL_VERSION}. Write it again with "
                "datasets/prepare_minival.py"
            )
    return division


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(content: Mapping[str, Any], path: Path, *, indent: int | None) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=indent)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
