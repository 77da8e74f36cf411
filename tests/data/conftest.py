"""Small videos on disk and their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vis.structures.rle import encode

#: Left, top, right, bottom of an object in a frame, None where it is absent.
Place = tuple[int, int, int, int] | None


def _mask(place: Place, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    if place is not None:
        left, top, right, bottom = place
        mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes a video and returns its record.

    Object i is a block of grey 100 + 20 * i, the background is as bright as the frame's number.
    ``objects[i][t]`` is where object i is in frame t; ``categories`` and ``crowds`` go with the objects.
    """

    def make(
        video_id: int,
        size: tuple[int, int],
        objects: Sequence[Sequence[Place]],
        *,
        length: int | None = None,
        categories: Sequence[int] | None = None,
        crowds: Sequence[int] = (),
    ) -> dict[str, Any]:
        height, width = size
        length = len(objects[0]) if length is None else length
        names = []
        for frame in range(length):
            pixels = np.full((height, width, 3), frame, dtype=np.uint8)
            for index, places in enumerate(objects):
                pixels[_mask(places[frame], height, width)] = 100 + 20 * index
            names.append(str(tmp_path / f"video{video_id}_{frame}.png"))
            Image.fromarray(pixels).save(names[-1])
        annotations = [
            {
                "id": 1000 + index,
                "category_id": index if categories is None else categories[index],
                "iscrowd": int(index in crowds),
                "segmentations": [place and encode(_mask(place, height, width)) for place in places],
                "bboxes": [
                    place and [place[0], place[1], place[2] - place[0], place[3] - place[1]] for place in places
                ],
                "occlusion": None,
            }
            for index, places in enumerate(objects)
        ]
        return {
            "video_id": video_id,
            "height": height,
            "width": width,
            "length": length,
            "file_names": names,
            "dataset_name": "toy",
            "json_file": "toy.json",
            "annotations": annotations,
        }

    return make
