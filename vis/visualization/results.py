"""Results of videos on disk: the list of the YouTube-VIS submission format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vis.structures import VideoPrediction

_KEYS = ("video_id", "category_id", "score", "segmentations")


def write_results(
    path: str | Path,
    prediction: VideoPrediction,
    category_ids: Sequence[int],
    class_names: Sequence[str],
    *,
    video_id: int = 1,
) -> None:
    """Writes one video's prediction as ``[{video_id, category_id, score, segmentations: [RLE | null, ...]}]``.

    ``track_id`` and ``category_name`` are added to each entry: readers of the submission format leave them alone, and
    ``read_results`` can then draw the same picture again. The file appears whole or not at all.
    """
    entries = [
        {
            "video_id": video_id,
            "category_id": category_ids[label] if label < len(category_ids) else label + 1,
            "category_name": class_names[label] if label < len(class_names) else f"class {label}",
            "track_id": int(prediction.track_ids[index]),
            "score": float(prediction.scores[index]),
            "segmentations": prediction.masks[index],
        }
        for index, label in enumerate(prediction.labels.tolist())
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(entries), encoding="utf-8")
    os.replace(draft, path)


def read_results(path: str | Path) -> dict[int, list[dict[str, Any]]]:
    """The entries of a results file by video id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, not a list, or an entry lacks a key.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"results file {str(path)!r} does not exist")
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # json's and the codec's errors are both ValueErrors
        raise ValueError(f"{path} is not json: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected a list of {{{', '.join(_KEYS)}}}")
    videos: dict[int, list[dict[str, Any]]] = {}
    for place, entry in enumerate(entries):
        missing = [key for key in _KEYS if not isinstance(entry, Mapping) or key not in entry]
        if missing:
            raise ValueError(f"{path}: entry {place} lacks {', '.join(missing)}; expected the keys {', '.join(_KEYS)}")
        if not isinstance(entry["segmentations"], list):
            raise ValueError(f"{path}: entry {place}: segmentations must be a list with one RLE or null per frame")
        videos.setdefault(int(entry["video_id"]), []).append(entry)
    return videos
