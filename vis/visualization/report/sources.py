"""Where the pictures of a report come from: files that a json names, below an image root."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vis.data.frame_reader import FrameSource, read_frame
from vis.data.paths import ImageFolder, unsafe_reason
from vis.visualization.report.pictures import ReadFrame


def picture_readers(
    videos: Sequence[tuple[Mapping[str, Any], tuple[int, int, int]]], image_root: str | Path | None
) -> dict[int, ReadFrame]:
    """What reads the pictures of each video, by its id; nothing without an image root.

    Args:
        videos: entries of the json, each with (height, width, length).
        image_root: the folder that ``file_names`` are relative to.

    Raises:
        ValueError: a video does not name a file for each of its frames.
        FileNotFoundError: not one of the videos has a picture there.
    """
    if image_root is None:
        return {}
    folder = ImageFolder(str(image_root))
    found, missing = 0, ""
    readers = {}
    for video, size in videos:
        names = video.get("file_names")
        if not isinstance(names, list) or len(names) != size[2]:
            raise ValueError(
                f"video {video['id']} of the ground truth has no file_names for each of its frames, so its pictures "
                "cannot be found; leave the image root out to see the masks on grey."
            )
        there = [_problem(folder, name) is None for name in names]
        found += sum(there)
        missing = missing or next((str(name) for name, good in zip(names, there, strict=True) if not good), "")
        readers[video["id"]] = _reader(video, folder)
    if not found and videos:
        raise FileNotFoundError(
            f"not one picture of {len(videos)} videos is under the image root {image_root}; the first would be "
            f"{os.path.join(str(image_root), missing)!r}. Is it the folder that file_names are relative to?"
        )
    return readers


def _problem(folder: ImageFolder, name: Any) -> str | None:
    if not isinstance(name, str):
        return "is not a text"
    return unsafe_reason(name) or folder.problem(name)


def _reader(video: Mapping[str, Any], folder: ImageFolder) -> ReadFrame:
    names = video["file_names"]
    source = FrameSource(
        file_names=[os.path.join(folder.root, str(name)) for name in names],
        height=video["height"],
        width=video["width"],
        video_id=video["id"],
    )

    def read(frame: int) -> np.ndarray:
        problem = _problem(folder, names[frame])
        if problem == "missing":
            raise FileNotFoundError(f"frame {frame + 1}: there is no file {names[frame]!r} under the image root")
        if problem is not None:
            raise ValueError(f"frame {frame + 1}: the file name {names[frame]!r:.200} {problem}")
        return read_frame(source, frame)

    return read


def video_name(video: Mapping[str, Any]) -> str:
    """The folder of its frames, or its id."""
    names = video.get("file_names")
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return PurePosixPath(first).parent.name[:80] or f"video {video['id']}"
