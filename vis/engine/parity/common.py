"""What the comparisons share: their result, the files, the sample that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from vis.structures import ClipSample

Array = NDArray[Any]


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, whether it holds, and the figures."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name:<44} {self.detail}"


def chosen(name: str, only: Sequence[str]) -> bool:
    """Whether a key or an array is compared: its name begins with one of ``only``, or there are none."""
    return not only or name.startswith(tuple(only))


def clip_sample(frames: Array) -> ClipSample:
    """T recorded frames (T, 3, H, W) uint8 as one whole video without annotations."""
    length, _, height, width = frames.shape
    return ClipSample(
        image=[torch.from_numpy(frame) for frame in frames],
        height=height,
        width=width,
        video_id=0,
        frame_ids=list(range(length)),
        length=length,
        file_names=[f"{frame:05d}" for frame in range(length)],
    )


def read_npz(path: str | Path, *required: str) -> dict[str, Array]:
    """All arrays of a file; ValueError if one of ``required`` is not among them."""
    file = existing(path, "recording")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{file} is not an .npz file of plain arrays: {error}") from error
    missing = [name for name in required if name not in arrays]
    if missing:
        raise ValueError(f"{file} has no array {', '.join(missing)}; it holds {', '.join(sorted(arrays))}")
    return arrays


def existing(path: str | Path, what: str) -> Path:
    """``path`` if it is a file; FileNotFoundError that says ``what`` it should have been otherwise."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist")
    return file
