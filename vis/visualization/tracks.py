"""What is drawn: tracks of a video from a prediction, from a results file or from annotations."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vis.structures import VideoPrediction
from vis.structures.polygons import segmentation_to_mask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoTrack:
    """One object over a video.

    Attributes:
        track_id: the number shown, which also gives the colour.
        name: name of the class.
        score: confidence, None for ground truth.
        segmentations: per frame an RLE, a list of polygons, or None where the object is absent.
    """

    track_id: int
    name: str
    score: float | None
    segmentations: Sequence[Any]


@dataclass(frozen=True)
class FrameTrack:
    """One object in one frame; ``mask`` is (H, W) bool."""

    track_id: int
    mask: np.ndarray
    name: str
    score: float | None = None

    @property
    def label(self) -> str:
        """The text beside the object: ``dog #3  0.87`` (two spaces: one is so narrow that it reads as ``#30.87``)."""
        return f"{self.name} #{self.track_id}" + ("" if self.score is None else f"  {self.score:.2f}")


def tracks_of_prediction(prediction: VideoPrediction, class_names: Sequence[str]) -> list[VideoTrack]:
    """All tracks of a prediction; ``class_names`` are those of the contiguous classes."""
    return [
        VideoTrack(int(track_id), _name(class_names, int(label)), float(score), masks)
        for track_id, label, score, masks in zip(
            prediction.track_ids, prediction.labels, prediction.scores, prediction.masks, strict=True
        )
    ]


def tracks_of_results(entries: Iterable[Mapping[str, Any]], names: Mapping[int, str]) -> list[VideoTrack]:
    """The tracks of one video of a results file.

    Args:
        entries: the entries of the video. ``track_id`` and ``category_name``, which this project writes beside the keys
            of the submission format, are used where they are present; otherwise a track's id is its place in the video.
        names: class names by the data set's category id.
    """
    return [
        VideoTrack(
            int(entry.get("track_id", place)),
            str(names.get(entry["category_id"]) or entry.get("category_name") or f"class {entry['category_id']}"),
            float(entry["score"]),
            entry["segmentations"],
        )
        for place, entry in enumerate(entries)
    ]


def tracks_of_record(record: Mapping[str, Any], class_names: Sequence[str]) -> list[VideoTrack]:
    """The ground truth of one data set record, numbered 1, 2, ... in the order of the file; crowds are left out."""
    kept = [annotation for annotation in record.get("annotations") or () if not annotation.get("iscrowd")]
    return [
        VideoTrack(place, _name(class_names, annotation["category_id"]), None, annotation["segmentations"])
        for place, annotation in enumerate(kept, start=1)
    ]


def visible_tracks(tracks: Iterable[VideoTrack], threshold: float) -> list[VideoTrack]:
    """The tracks worth drawing: of each id the best scored class, if it reaches ``threshold``; ground truth always.

    A query may be reported with several classes; drawn all, they would cover one another.
    """
    tracks = list(tracks)
    best: dict[int, VideoTrack] = {}
    for track in tracks:
        known = best.get(track.track_id)
        if known is None or (track.score or 0.0) > (known.score or 0.0):
            best[track.track_id] = track
    shown = [track for track in best.values() if track.score is None or track.score >= threshold]
    if len(shown) < len(tracks):
        top = max((track.score or 0.0 for track in tracks), default=0.0)
        logger.info(
            "%d of %d predictions are drawn (best class of a track, score >= %g; the best score is %.2f)",
            len(shown), len(tracks), threshold, top,
        )  # fmt: skip
    return shown


def tracks_at(tracks: Iterable[VideoTrack], index: int, height: int, width: int) -> list[FrameTrack]:
    """The tracks that have at least one pixel in frame ``index``, with their masks decoded to (height, width).

    Raises:
        ValueError: a mask is of another size, or a track is shorter than the video.
    """
    found = []
    for track in tracks:
        if index >= len(track.segmentations):
            raise ValueError(
                f"track {track.track_id} has {len(track.segmentations)} masks, but the video has a frame {index + 1}; "
                "are these the results of this video?"
            )
        if not track.segmentations[index]:
            continue
        try:
            mask = segmentation_to_mask(track.segmentations[index], height, width)
        except ValueError as error:
            raise ValueError(
                f"track {track.track_id}, frame {index}: {error}; are these the results of this video?"
            ) from error
        if mask.any():
            found.append(FrameTrack(track.track_id, mask, track.name, track.score))
    return found


def _name(class_names: Sequence[str], label: int) -> str:
    return class_names[label] if 0 <= label < len(class_names) else f"class {label}"
