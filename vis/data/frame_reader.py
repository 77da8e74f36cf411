"""Reading frames: one at a time, checked against what the annotation file says, never a whole video at once."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from detectron2.data.transforms import ResizeTransform
from PIL import Image, ImageOps
from torch import Tensor

from vis.data.read_ahead import ReadAhead

__all__ = ["AheadFrames", "FrameSource", "LazyFrames", "frame_source", "read_frame"]

# What Pillow raises for a file that is no picture, is cut off or is damaged; which one depends on the format.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class FrameSource:
    """Where frames come from and which size they must have; it names file, video and data set in error messages."""

    file_names: Sequence[str]
    height: int
    width: int
    video_id: int | None = None
    dataset_name: str = ""
    json_file: str = ""

    def describe(self, index: int) -> str:
        """``frame 3 of video 17 of data set 'ovis_train' (path)``."""
        dataset = f" of data set {self.dataset_name!r}" if self.dataset_name else ""
        video = f" of video {self.video_id}" if self.video_id is not None else ""
        return f"frame {index}{video}{dataset} ({self.file_names[index]})"

    def read(self, index: int) -> np.ndarray:
        """Frame ``index`` as (H, W, 3) uint8 RGB; raises what :func:`read_frame` raises."""
        return read_frame(self, index)


def frame_source(record: dict[str, Any]) -> FrameSource:
    """The frames of one record of a data set."""
    return FrameSource(
        file_names=record["file_names"],
        height=record["height"],
        width=record["width"],
        video_id=record.get("video_id"),
        dataset_name=record.get("dataset_name", ""),
        json_file=record.get("json_file", ""),
    )


def read_frame(source: FrameSource, index: int) -> np.ndarray:
    """Decode one frame.

    The EXIF orientation is applied, as detectron2 does it, before the size is compared with the annotation file's.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or its size is not the one in the annotation file.
    """
    path = Path(source.file_names[index])
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file for {source.describe(index)}. Check the image root of the data set (its folders must be "
            f"those that the json's file_names name) and that the archive was unpacked completely."
        )
    try:
        with Image.open(path) as picture:
            orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
            _check_header(picture, orientation, source, index)  # before anything is decoded
            upright = picture if orientation == 1 else ImageOps.exif_transpose(picture)
            return np.asarray(upright.convert("RGB"))
    except _WrongFrame as error:
        raise ValueError(str(error)) from None
    except _DECODE_ERRORS as error:
        raise ValueError(
            f"Cannot decode {source.describe(index)}: {error}. The file is damaged, cut off or no picture; "
            f"fetch or write it again."
        ) from error


class _WrongFrame(Exception):
    """A picture that could be decoded but must not be used."""


def _check_header(picture: Image.Image, orientation: int, source: FrameSource, index: int) -> None:
    # Orientations from 5 on turn the picture by a quarter.
    width, height = picture.size if orientation < 5 else picture.size[::-1]
    if (height, width) != (source.height, source.width):
        turned = f" after its EXIF orientation {orientation} was applied" if orientation != 1 else ""
        raise _WrongFrame(
            f"{source.describe(index)} is {height} x {width} (height x width){turned}, but "
            f"{source.json_file or 'the annotation file'} says {source.height} x {source.width}. The masks would not "
            f"fit: correct the size in the json, or replace the frames (without EXIF orientation) by those that were "
            f"annotated."
        )
    if picture.mode[0] in "IF":
        raise _WrongFrame(
            f"{source.describe(index)} has pixels of mode {picture.mode!r}, more than 8 bits each; write it as an "
            f"8-bit picture: its range of values is not known here."
        )


class LazyFrames(Sequence[Tensor]):
    """The frames of a video, decoded and resized when they are asked for.

    Iterating reads ahead in a background thread, at most ``read_ahead`` frames, so that decoding overlaps the model;
    an error of the thread is raised where the frame would have come, and names it. ``frames[i]`` decodes on the spot, a
    slice is lazy again.

    Args:
        source: the frames.
        size: (height, width) that frames are resized to (Pillow's bilinear filter), None keeps the original size.
        read_ahead: frames that may wait decoded; 0 decodes in the caller's thread.
        indices: frames of ``source`` to give, by default all.
    """

    def __init__(
        self,
        *,
        source: FrameSource,
        size: tuple[int, int] | None = None,
        read_ahead: int = 2,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.size = size
        self.read_ahead = read_ahead
        self.indices = range(len(source.file_names)) if indices is None else indices
        self._resize = None
        if size is not None and size != (source.height, source.width):
            self._resize = ResizeTransform(source.height, source.width, *size)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> LazyFrames: ...
    def __getitem__(self, index: int | slice) -> Tensor | LazyFrames:
        """Frame ``index`` as a (3, H, W) uint8 RGB tensor, or the frames of a slice, still lazy."""
        if isinstance(index, slice):
            return LazyFrames(
                source=self.source, size=self.size, read_ahead=self.read_ahead, indices=self.indices[index]
            )
        return self.read(index)

    def read(self, position: int) -> Tensor:
        """Frame ``position``, decoded and resized here and now."""
        frame = self.source.read(self.indices[position])
        if self._resize is not None:
            frame = self._resize.apply_image(frame)
        return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))

    def __iter__(self) -> Iterator[Tensor]:
        if self.read_ahead < 1:
            return (self[position] for position in range(len(self)))
        return self._iterate_ahead()

    def calls(self) -> Iterator[Callable[[], Tensor]]:
        """Functions that decode one frame each, in order."""
        return (partial(self.read, position) for position in range(len(self)))

    def _iterate_ahead(self) -> Iterator[Tensor]:
        with ReadAhead(self.calls(), depth=self.read_ahead) as reader:
            for _ in range(len(self)):
                yield reader.take()


class AheadFrames(LazyFrames):
    """The frames of one of several videos that are read ahead together, over the ends of videos.

    The first iteration takes the frames from ``reader``; anything else decodes for itself.
    """

    reader: ReadAhead[Tensor]
    _begun, _left = True, 0  # its turn has not come

    def begin(self, reader: ReadAhead[Tensor]) -> None:
        """The next ``len(self)`` results of ``reader`` are the frames of this video."""
        self.reader, self._begun, self._left = reader, False, len(self)

    def __iter__(self) -> Iterator[Tensor]:
        if self._begun:
            return super().__iter__()
        self._begun = True
        return self._take()

    def _take(self) -> Iterator[Tensor]:
        while self._left:
            self._left -= 1
            yield self.reader.take()

    def end(self) -> None:
        """The next video's turn: frames that were not asked for are passed over."""
        self._begun = True
        while self._left:
            self._left -= 1
            self.reader.skip()
