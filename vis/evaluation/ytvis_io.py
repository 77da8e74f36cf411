"""Reads ground truth and results in the YouTube-VIS format for the evaluation, and checks both strictly.

A result file is one list for the whole data set (format of the YouTube-VIS challenge)::

    [{"video_id": int, "category_id": int, "score": float, "segmentations": [RLE or null, one per frame]}, ...]

The masks stay run-length codes; only their areas are measured.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.result_files import ResultsError, Skipped, kind_of, load_results
from vis.evaluation.results_writer import RESULT_KEYS
from vis.evaluation.rle_kernels import PackedCodes
from vis.structures.polygons import polygons_to_rle
from vis.structures.rle import BadRLE, compress

__all__ = [
    "GroundTruth",
    "GroundTruthError",
    "NoGroundTruth",
    "ResultsError",
    "Skipped",
    "Track",
    "Tracks",
    "check_results",
    "load_ground_truth",
    "load_results",
    "make_track",
]

logger = logging.getLogger(__name__)

OCCLUSION_LEVELS = ("no_occlusion", "slight_occlusion", "severe_occlusion")
"""What OVIS says of an object in a frame."""

_HIGHEST = sys.float_info.max


class NoGroundTruth(ValueError):
    """The ground truth has no annotations, so there is nothing that an AP could be measured against."""


class GroundTruthError(ValueError):
    """The ground truth is not in the YouTube-VIS format."""


@dataclass
class Track:
    """One object or one predicted track of a video.

    Attributes:
        codes: a sequence of compressed COCO RLE dicts, one per frame, None where there is no mask.
        areas: (T,) int64 pixels per frame, 0 where there is no mask.
        mean_area: mean of the non-zero areas, which is what the size classes go by.
        ignore: a crowd.
        score: confidence; 0 for ground truth.
        occlusion: (T,) of an object: place in ``OCCLUSION_LEVELS``, -1 where its json says nothing (the object is not
            in the frame); None without any.
    """

    codes: PackedCodes
    areas: NDArray[np.int64]
    mean_area: float
    ignore: bool = False
    score: float = 0.0
    occlusion: NDArray[np.int64] | None = None


Tracks = dict[tuple[int, int], list[Track]]
"""(video id, category id) -> tracks in the order of the file."""


@dataclass
class GroundTruth:
    """What the evaluation needs of a ground-truth file.

    Attributes:
        videos: id -> (height, width, length).
        categories: id -> name, by ascending id.
        tracks: the objects.
        long_videos: ids of the long videos of YouTube-VIS 2022, None where nothing tells them apart.
        names: video id -> folder of its frames, "" where the json gives no file names.
    """

    videos: dict[int, tuple[int, int, int]]
    categories: dict[int, str]
    tracks: Tracks
    long_videos: frozenset[int] | None = None
    names: dict[int, str] = field(default_factory=dict)


def load_ground_truth(gt: str | Path | Mapping[str, Any]) -> GroundTruth:
    """Read and check a ground truth.

    Args:
        gt: path of a YouTube-VIS json, or its content. A video with ``"long": true`` is a long one of YouTube-VIS 2022.

    Raises:
        FileNotFoundError: no such file.
        NoGroundTruth: it has no annotations (the key is absent, null or empty).
        GroundTruthError: it is not in the format.
    """
    where = "the ground truth" if isinstance(gt, Mapping) else str(gt)
    content = gt if isinstance(gt, Mapping) else _read_json(Path(gt))
    if not isinstance(content, Mapping) or not isinstance(content.get("videos"), list):
        raise GroundTruthError(
            f"{where}: expected a YouTube-VIS json (an object with 'videos', 'categories' and 'annotations'), found "
            f"{kind_of(content)} without a list 'videos'. A COCO image json is evaluated by its registered data set "
            "name."
        )
    if not content.get("annotations"):
        raise NoGroundTruth(
            f"{where} has no annotations ({len(content['videos'])} videos), so no AP can be computed from it: submit "
            "the results to the benchmark's server, or evaluate on a json with annotations."
        )
    try:
        videos = {video["id"]: _video_size(video) for video in content["videos"]}
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        for kind, kept in (("videos", videos), ("categories", categories)):
            if len(kept) < len(content[kind]):
                raise GroundTruthError(f"an id occurs twice among its {kind}.")
        marked = {video["id"] for video in content["videos"] if video.get("long")}
        tracks: Tracks = defaultdict(list)
        for annotation in content["annotations"]:
            _add_annotation(annotation, videos, categories, tracks)
    except (KeyError, TypeError) as error:
        raise GroundTruthError(
            f"{where}: {type(error).__name__} {error}: a video, category or annotation lacks a key or has one of the "
            "wrong type. `python tools/check_dataset.py` lists every problem of a data set."
        ) from error
    except GroundTruthError as error:
        raise GroundTruthError(f"{where}: {error} `python tools/check_dataset.py` lists every problem.") from error
    return GroundTruth(
        videos,
        _unique_names(categories),
        tracks,
        frozenset(i for i in videos if i in marked) if marked else None,
        {video["id"]: _folder(video) for video in content["videos"]},
    )


def _folder(video: Mapping[str, Any]) -> str:
    names = video.get("file_names")
    return str(names[0]).rpartition("/")[0] if names else ""


def _video_size(video: Mapping[str, Any]) -> tuple[int, int, int]:
    size = (video["height"], video["width"], video["length"] if "length" in video else len(video["file_names"]))
    if not all(type(value) is int and value > 0 for value in size):
        raise GroundTruthError(f"video {video['id']} has (height, width, length) = {size}; expected positive numbers.")
    return size


def _unique_names(categories: dict[int, str]) -> dict[int, str]:
    """Categories by ascending id; a name that occurs twice gets its id behind it."""
    names = list(categories.values())
    return {i: n if names.count(n) == 1 else f"{n} ({i})" for i, n in sorted(categories.items())}


def _add_annotation(
    annotation: Mapping[str, Any],
    videos: Mapping[int, tuple[int, int, int]],
    categories: Mapping[int, str],
    tracks: Tracks,
) -> None:
    name = f"annotation {annotation['id']}"
    video_id, category_id = annotation["video_id"], annotation["category_id"]
    if video_id not in videos:
        raise GroundTruthError(f"{name} belongs to video {video_id}, which 'videos' does not list.")
    if category_id not in categories:
        raise GroundTruthError(f"{name} has category {category_id}, which 'categories' does not list.")
    height, width, length = videos[video_id]
    masks = annotation["segmentations"]
    if len(masks) != length:
        raise GroundTruthError(f"{name} has {len(masks)} segmentations, video {video_id} has {length} frames.")
    try:
        track = _track(PackedCodes([_counts(mask, height, width) for mask in masks], height, width))
    except BadRLE as error:
        raise GroundTruthError(f"{name} of video {video_id}, frame {error.index}: {error.reason}.") from error
    except ValueError as error:
        raise GroundTruthError(f"{name} of video {video_id}: {error}.") from error
    track.ignore = bool(annotation.get("iscrowd", 0))
    given = annotation.get("areas")
    if isinstance(given, list):  # the official code goes by the areas in the file
        track.mean_area = _mean_area(np.array([area or 0 for area in given]))
        if not 0 <= track.mean_area < np.inf:
            raise GroundTruthError(f"{name} has areas that are no areas: {given!r:.60}.")
    track.occlusion = _occlusion(annotation.get("occlusion"), name, length)
    tracks[video_id, category_id].append(track)


def _occlusion(levels: Any, name: str, length: int) -> NDArray[np.int64] | None:
    """Places in ``OCCLUSION_LEVELS``; None, with a line in the log, where the list is not of the form of OVIS."""
    if levels is None:
        return None
    known = (None, *OCCLUSION_LEVELS)
    if not isinstance(levels, list) or len(levels) != length or not all(level in known for level in levels):
        logger.warning("%s: occlusion is no list of %d of %s; it is left out.", name, length, OCCLUSION_LEVELS)
        return None
    return np.array([-1 if level is None else OCCLUSION_LEVELS.index(level) for level in levels], np.int64)


def make_track(codes: Sequence[dict[str, Any] | None], height: int, width: int) -> Track:
    """A track of checked masks.

    Raises:
        BadRLE: a mask's runs do not fit the size; its ``index`` is the frame.
    """
    return _track(PackedCodes.of(codes, height, width))


def _track(codes: PackedCodes) -> Track:
    pixels = codes.areas()
    return Track(codes, pixels, _mean_area(pixels))


def _mean_area(pixels: NDArray[Any]) -> float:
    seen = pixels[pixels != 0]
    return float(seen.mean()) if len(seen) else 0.0


def _counts(mask: Any, height: int, width: int) -> bytes:
    """Compressed counts of an RLE of any form or of polygons; empty from null or [].

    Raises:
        ValueError: it is neither, or of another size.
    """
    if mask is None or mask == []:
        return b""
    if isinstance(mask, list):
        mask = polygons_to_rle(mask, height, width)
    if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
        raise ValueError(f"a mask must be null or an RLE with 'size' and 'counts', found {kind_of(mask)}")
    if not isinstance(mask["size"], (list, tuple)) or list(mask["size"]) != [height, width]:
        raise ValueError(f"a mask has size {mask['size']!r:.40}, the video has [height, width] = [{height}, {width}]")
    if isinstance(mask["counts"], list):
        mask = compress(mask)
    counts = mask["counts"]
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"'counts' of a mask must be a string, found {kind_of(counts)}")
    if not counts:
        raise ValueError("'counts' of a mask are empty; write null for frames without a mask")
    return counts.encode("utf-8") if isinstance(counts, str) else counts


def check_results(
    entries: Iterable[Any], gt: GroundTruth, where: str = "the results", *, skipped: Skipped | None = None
) -> Tracks:
    """Turn predictions into tracks.

    Args:
        entries: the predictions; each is let go when it is checked.
        gt: what they must belong to.
        where: what messages call them.
        skipped: takes those that cannot be evaluated, and the others are returned. None: one such is an error.

    Raises:
        ResultsError: with every problem that was found, in the order of the list; or none of them can be evaluated.
    """
    tracks: Tracks = defaultdict(list)
    bad = Skipped()
    count = 0
    for count, entry in enumerate(entries, start=1):
        try:
            track = _check_entry(entry, gt)
            tracks[entry["video_id"], entry["category_id"]].append(track)
        except ResultsError as error:
            (bad if skipped is None else skipped).add(f"entry {count - 1}", error)
    if bad.total:
        raise ResultsError(_refusal(bad, count, where))
    if skipped is not None and skipped.total and not tracks:
        raise ResultsError(_refusal(skipped, count, where))
    return tracks


def _refusal(bad: Skipped, count: int, where: str) -> str:
    hint = ""
    if bad.kinds["of an unknown video"] == bad.total == count:
        hint = " Not one belongs to a video of the ground truth: these are results of another data set or split."
    return f"{where}: {bad.total} of {count} predictions cannot be evaluated.{hint}\n  {bad}"


def _check_entry(entry: Any, gt: GroundTruth) -> Track:
    if not isinstance(entry, Mapping):
        raise ResultsError(f"expected an object with {', '.join(RESULT_KEYS)}, found {kind_of(entry)}.", "no object")
    missing = [key for key in RESULT_KEYS if key not in entry]
    if missing:
        message = f"{', '.join(missing)} missing; expected the keys {', '.join(RESULT_KEYS)}."
        raise ResultsError(message, "without a key")
    video_id, category_id, score, masks = (entry[key] for key in RESULT_KEYS)
    if type(video_id) is not int or video_id not in gt.videos:
        raise ResultsError(
            f"video_id {video_id!r} is not in the ground truth ({len(gt.videos)} videos, {span_of(gt.videos)}). Were "
            "the results made on another data set or split?",
            "of an unknown video",
        )
    if type(category_id) is not int or category_id not in gt.categories:
        raise ResultsError(
            f"video {video_id}: category_id {category_id!r} is not in the ground truth ({len(gt.categories)} "
            f"categories, {span_of(gt.categories)}). Expected the data set's own ids, not the model's labels from 0.",
            "of an unknown category",
        )
    name = f"video {video_id}, category {category_id}"
    if type(score) not in (int, float) or not -_HIGHEST <= score <= _HIGHEST:
        message = f"{name}: score {score!r} must be a finite number; check the model's outputs."
        raise ResultsError(message, "without a finite score")
    track = _check_masks(masks, gt.videos[video_id], name)
    track.score = float(score)
    return track


def _check_masks(masks: Any, video: tuple[int, int, int], name: str) -> Track:
    height, width, length = video
    if not isinstance(masks, list) or len(masks) != length:
        found = f"{len(masks)} entries" if isinstance(masks, list) else kind_of(masks)
        raise ResultsError(
            f"{name}: segmentations must have one entry per frame of the video ({length}), found {found}. Write null "
            "for frames without a mask.",
            "with a wrong number of masks",
        )
    counts: list[bytes] = []
    for frame, mask in enumerate(masks):
        try:
            if isinstance(mask, list):
                raise ValueError("a mask must be null or an RLE with 'size' and 'counts', found a list")
            counts.append(_counts(mask, height, width))
        except ValueError as error:
            raise ResultsError(
                f"{name}, frame {frame}: {error}. Masks are COCO RLE at the video's own size.",
                "with a mask of a wrong size or form",
            ) from error
    try:
        return _track(PackedCodes(counts, height, width))
    except BadRLE as error:
        raise ResultsError(
            f"{name}, frame {error.index}: not a run-length code of a {height}x{width} mask: {error.reason}. "
            "Encode masks with pycocotools.mask.encode of a Fortran-ordered uint8 array.",
            "with a damaged mask",
        ) from error


def span_of(ids: Mapping[int, Any]) -> str:
    """The range of ids, in words."""
    return f"ids {min(ids)} to {max(ids)}" if ids else "no ids"


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # covers broken json and broken utf-8
        raise GroundTruthError(f"{path}: not a json file ({error}). Was it cut off while it was written?") from error
