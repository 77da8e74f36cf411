"""COCO-format image data as videos of one frame, for pre-training and joint training on images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vis.data.problems import ProblemLog


def as_videos(tree: Mapping[str, Any], log: ProblemLog) -> dict[str, Any]:
    """Rewrites a COCO json (``images``, ``annotations`` with one ``segmentation`` each) as a YouTube-VIS one.

    Every image becomes a video of one frame with the image's id, every annotation a track of one frame with its own id.
    Nothing is checked here but what the rewriting needs: the reader of the YouTube-VIS format checks the result.
    """
    result: dict[str, Any] = {"categories": tree.get("categories")}
    images = tree.get("images")
    if isinstance(images, list):
        result["videos"] = [_video(image) for image in images]
    annotations = tree.get("annotations")
    if isinstance(annotations, list):
        result["annotations"] = [_track(annotation) for annotation in annotations]
    elif annotations is not None:
        log.error("annotations", f"must be a list or null, found {type(annotations).__name__}")
    return result


def _video(image: Any) -> Any:
    if not isinstance(image, dict):
        return image
    video = {key: image[key] for key in ("id", "height", "width") if key in image}
    return {**video, "length": 1, "file_names": [image.get("file_name")]}


def _track(annotation: Any) -> Any:
    if not isinstance(annotation, dict):
        return annotation
    track = {key: annotation[key] for key in ("id", "category_id", "iscrowd") if key in annotation}
    track["video_id"] = annotation.get("image_id")
    track["segmentations"] = [annotation.get("segmentation")]
    if "bbox" in annotation:
        track["bboxes"] = [annotation["bbox"]]
    return track
