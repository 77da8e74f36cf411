"""Reads ground truth and results in the YouTube-VIS format for the evaluation, and checks both strictly.

A result file is one list for the whole data set (format of the YouTube-VIS challenge)::

    [{"video_id": int, "category_id": int, "score": float, "segmentations": [RLE or null, one per frame]}, ...]

The masks stay run-length codes; only their areas are measured.
"""

from __future__ import annotations

import json
import logging
import math
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.results_writer import RESULT_KEYS, iter_parts
from vis.evaluation.rle_kernels import PackedCodes, areas
from vis.structures.polygons import polygons_to_rle
from vis.structures.rle import BadRLE, compress

logger = logging.getLogger(__name__)

_SHOWN = 20  # problems printed in full; the rest is counted


class NoGroundTruth(ValueError):
    """The ground truth has no annotations, so there is nothing that an AP could be measured against."""


class GroundTruthError(ValueError):
    """The ground truth is not in the YouTube-VIS format."""


class ResultsError(ValueError):
    """The results are not in the submission format or do not belong to this ground truth."""


@dataclass
class Track:
    """One object or one predicted track of a video.

    Attributes:
        codes: a sequence of compressed COCO RLE dicts, one per frame, None where there is no mask.
        areas: (T,) int64 pixels per frame, 0 where there is no mask.
        mean_area: mean of the non-zero areas, which is what the size classes go by.
        ignore: a crowd.
        score: confidence; 0 for ground truth.
    """

    codes: PackedCodes
    areas: NDArray[np.int64]
    mean_area: float
    ignore: bool = False
    score: float = 0.0


Tracks = dict[tuple[int, int], list[Track]]
"""(video id, category id) -> tracks in the order of the file."""


@dataclass
class GroundTruth:
    """What the evaluation needs of a ground-truth file: ``videos`` maps an id to (height, width, length)."""

    videos: dict[int, tuple[int, int, int]]
    categories: dict[int, str]
    tracks: Tracks


def load_ground_truth(gt: str | Path | Mapping[str, Any]) -> GroundTruth:
    """Read and check a ground truth.

    Args:
        gt: path of a YouTube-VIS json, or its content.

    Raises:
        FileNotFoundError: no such file.
        NoGroundTruth: it has no annotations (the key is absent, null or empty).
        GroundTruthError: it is not in the format.
    """
    where = "the ground truth" if isinstance(gt, Mapping) else str(gt)
    content = gt if isinstance(gt, Mapping) else _read_json(Path(gt), GroundTruthError)
    if not isinstance(content, Mapping) or not isinstance(content.get("videos"), list):
        raise GroundTruthError(
            f"{where}: expected a YouTube-VIS json (an object with 'videos', 'categories' and 'annotations'), found "
            f"{_kind(content)} without a list 'videos'. A COCO image json is evaluated by its registered data set name."
        )
    if not content.get("annotations"):
        raise NoGroundTruth(
            f"{where} has no annotations ({len(content['videos'])} videos), so no AP can be computed from it: submit "
            "the results to the benchmark's server, or evaluate on a json with annotations."
        )
    try:
        videos = {video["id"]: _video_size(video) for video in content["videos"]}
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
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
    return GroundTruth(videos, _unique_names(categories), tracks)


def _video_size(video: Mapping[str, Any]) -> tuple[int, int, int]:
    return video["height"], video["width"], video["length"] if "length" in video else len(video["file_names"])


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
        track = make_track([_as_code(mask, height, width) for mask in masks], height, width)
    except BadRLE as error:
        raise GroundTruthError(f"{name} of video {video_id}, frame {error.index}: {error.reason}.") from error
    except ValueError as error:
        raise GroundTruthError(f"{name} of video {video_id}: {error}.") from error
    track.ignore = bool(annotation.get("iscrowd", 0))
    given = annotation.get("areas")
    if isinstance(given, list) and len(given) == length:  # the official code goes by the areas in the file
        track.mean_area = _mean_area(np.array([area or 0 for area in given]))
    tracks[video_id, category_id].append(track)


def make_track(codes: Sequence[dict[str, Any] | None], height: int, width: int) -> Track:
    """A track of checked masks.

    Raises:
        BadRLE: a mask's runs do not fit the size; its ``index`` is the frame.
    """
    present = [frame for frame, code in enumerate(codes) if code is not None]
    pixels = np.zeros(len(codes), np.int64)
    try:
        pixels[present] = areas([code["counts"] for code in codes if code is not None], height * width)
    except BadRLE as error:
        raise BadRLE(present[error.index], error.reason) from error
    return Track(PackedCodes(codes, height, width), pixels, _mean_area(pixels))


def _mean_area(pixels: NDArray[Any]) -> float:
    seen = pixels[pixels != 0]
    return float(seen.mean()) if len(seen) else 0.0


def _as_code(mask: Any, height: int, width: int) -> dict[str, Any] | None:
    """A compressed RLE with bytes, from a compressed or uncompressed RLE or from polygons; None from null or []."""
    if mask is None or mask == []:
        return None
    if isinstance(mask, list):
        mask = polygons_to_rle(mask, height, width)
    if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
        raise ValueError(f"a mask must be null or an RLE with 'size' and 'counts', found {_kind(mask)}")
    if not isinstance(mask["size"], (list, tuple)) or list(mask["size"]) != [height, width]:
        raise ValueError(f"a mask has size {mask['size']!r:.40}, the video has [height, width] = [{height}, {width}]")
    if isinstance(mask["counts"], list):
        mask = compress(mask)
    counts = mask["counts"]
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"'counts' of a mask must be a string, found {_kind(counts)}")
    return {"size": [height, width], "counts": counts.encode("utf-8") if isinstance(counts, str) else counts}


def load_results(results: str | Path | Sequence[Any]) -> list[Any]:
    """The list of predictions from a ``results.json``, a zip that holds one, a folder of part files, or as it is.

    Raises:
        FileNotFoundError: no such file.
        ResultsError: the file cannot be read or does not hold a list.
    """
    where = "the results"
    content: Any = results
    if isinstance(results, (str, Path)):
        path, where = Path(results), str(results)
        if path.is_dir():
            content = [entry for _, entries in iter_parts(path) for entry in entries]
        elif path.suffix == ".zip":
            content = _read_zip(path)
        else:
            content = _read_json(path, ResultsError)
    if not isinstance(content, list):
        raise ResultsError(
            f"{where}: expected a list of predictions [{{video_id, category_id, score, segmentations}}, ...], found "
            f"{_kind(content)}. Give the results.json that an evaluation writes."
        )
    return content


def check_results(entries: Sequence[Any], gt: GroundTruth, where: str = "the results") -> Tracks:
    """Turn predictions into tracks.

    Raises:
        ResultsError: with every problem that was found, in the order of the list.
    """
    tracks: Tracks = defaultdict(list)
    problems: list[str] = []
    for index, entry in enumerate(entries):
        try:
            track = _check_entry(entry, gt)
            tracks[entry["video_id"], entry["category_id"]].append(track)
        except ValueError as error:
            problems.append(f"  entry {index}: {error}")
    if problems:
        shown = problems[:_SHOWN] + [f"  ... and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise ResultsError(
            f"{where}: {len(problems)} of {len(entries)} predictions cannot be evaluated:\n" + "\n".join(shown)
        )
    return tracks


def _check_entry(entry: Any, gt: GroundTruth) -> Track:
    if not isinstance(entry, Mapping):
        raise ResultsError(f"expected an object with {', '.join(RESULT_KEYS)}, found {_kind(entry)}.")
    missing = [key for key in RESULT_KEYS if key not in entry]
    if missing:
        raise ResultsError(f"{', '.join(missing)} missing; expected the keys {', '.join(RESULT_KEYS)}.")
    video_id, category_id, score, masks = (entry[key] for key in RESULT_KEYS)
    if type(video_id) is not int or video_id not in gt.videos:
        raise ResultsError(
            f"video_id {video_id!r} is not in the ground truth ({len(gt.videos)} videos, {_span(gt.videos)}). Were the "
            "results made on another data set or split?"
        )
    if type(category_id) is not int or category_id not in gt.categories:
        raise ResultsError(
            f"video {video_id}: category_id {category_id!r} is not in the ground truth ({len(gt.categories)} "
            f"categories, {_span(gt.categories)}). Expected the data set's own ids, not the model's labels from 0."
        )
    name = f"video {video_id}, category {category_id}"
    if type(score) not in (int, float) or not math.isfinite(score):
        raise ResultsError(f"{name}: score {score!r} must be a finite number; check the model's outputs.")
    height, width, length = gt.videos[video_id]
    if not isinstance(masks, list) or len(masks) != length:
        found = f"{len(masks)} entries" if isinstance(masks, list) else _kind(masks)
        raise ResultsError(
            f"{name}: segmentations must have one entry per frame of the video ({length}), found {found}. Write null "
            "for frames without a mask."
        )
    codes: list[dict[str, Any] | None] = []
    for frame, mask in enumerate(masks):
        try:
            if isinstance(mask, list):
                raise ValueError("a mask must be null or an RLE with 'size' and 'counts', found a list")
            codes.append(_as_code(mask, height, width))
        except ValueError as error:
            raise ResultsError(
                f"{name}, frame {frame}: {error}. Masks are COCO RLE at the video's own size."
            ) from error
    try:
        track = make_track(codes, height, width)
    except BadRLE as error:
        raise ResultsError(
            f"{name}, frame {error.index}: not a run-length code of a {height}x{width} mask: {error.reason}. "
            "Encode masks with pycocotools.mask.encode of a Fortran-ordered uint8 array."
        ) from error
    track.score = float(score)
    return track


def _span(ids: Mapping[int, Any]) -> str:
    return f"ids {min(ids)} to {max(ids)}" if ids else "no ids"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")


def _read_json(path: Path, error_type: type[ValueError]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    return _parse_json(path.read_bytes(), str(path), error_type)


def _parse_json(data: bytes, where: str, error_type: type[ValueError]) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # covers broken json and broken utf-8
        raise error_type(f"{where}: not a json file ({error}). Was it cut off while it was written?") from error


def _read_zip(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with zipfile.ZipFile(path) as archive:
            if "results.json" not in archive.namelist():
                raise ResultsError(
                    f"{path}: expected results.json at the root of the zip, found {archive.namelist()[:5]}. "
                    "The servers accept no sub-folder either."
                )
            return _parse_json(archive.read("results.json"), f"{path}/results.json", ResultsError)
    except zipfile.BadZipFile as error:
        raise ResultsError(f"{path}: not a zip file ({error}).") from error
