"""Small videos in the YouTube-VIS format: boxes in frames of 11 x 13 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import pytest

H, W = 11, 13

Box = tuple[int, int, int, int]


def encode(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


@pytest.fixture(scope="session")
def make_masks() -> Callable[..., list[dict[str, Any] | None]]:
    """(y0, x0, y1, x1) or None per frame -> RLE or None per frame."""

    def make(boxes: Sequence[Box | None], height: int = H, width: int = W) -> list[dict[str, Any] | None]:
        masks: list[dict[str, Any] | None] = []
        for box in boxes:
            if box is None:
                masks.append(None)
                continue
            mask = np.zeros((height, width), np.uint8)
            mask[box[0] : box[2], box[1] : box[3]] = 1
            masks.append(encode(mask))
        return masks

    return make


@pytest.fixture(scope="session")
def make_gt(make_masks: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Objects ``(video_id, category_id, boxes, iscrowd)`` -> ground truth with categories 1, 2, 5; ids from 0."""

    def make(objects: Sequence[tuple[int, int, Sequence[Box | None], int]], length: int = 4) -> dict[str, Any]:
        ids = sorted({video for video, *_ in objects} | {7})
        return {
            "videos": [{"id": i, "height": H, "width": W, "length": length} for i in ids],
            "categories": [{"id": i, "name": f"class{i}"} for i in (1, 2, 5)],
            "annotations": [
                {"id": n, "video_id": v, "category_id": c, "segmentations": make_masks(boxes), "iscrowd": crowd}
                for n, (v, c, boxes, crowd) in enumerate(objects)
            ],
        }

    return make


@pytest.fixture(scope="session")
def make_results(make_masks: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """Predictions ``(video_id, category_id, score, boxes)`` -> submission format."""

    def make(predictions: Sequence[tuple[int, int, float, Sequence[Box | None]]]) -> list[dict[str, Any]]:
        return [
            {"video_id": v, "category_id": c, "score": s, "segmentations": make_masks(boxes)}
            for v, c, s, boxes in predictions
        ]

    return make
