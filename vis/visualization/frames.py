"""Where frames come from: a folder, a pattern, a list of pictures, or a video file; read one at a time."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


class FrameError(ValueError):
    """A frame or a video file that cannot be read."""


def natural_key(name: str | os.PathLike[str]) -> list[tuple[int, int, str]]:
    """Sorts by the numbers in a name as numbers: ``frame2`` before ``frame10``."""
    parts = re.split(r"(\d+)", os.fspath(name).lower())
    key = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
    return [*key, (2, 0, os.fspath(name))]  # names that differ in leading zeros or case only keep a fixed order


def read_image(path: str | Path) -> np.ndarray:
    """One picture as (H, W, 3) uint8 RGB, turned as its EXIF data say.

    Raises:
        FrameError: the file is missing, or is not a whole picture.
    """
    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # what Pillow raises for broken files
        raise FrameError(f"cannot read the picture {path}: {error}") from error


class FrameStream:
    """The frames of one video, (H, W, 3) uint8 RGB, decoded while iterating; it can be iterated again.

    Args:
        files: picture files in order, or one video file.
        video: ``files`` is one video file.
        fps: frames per second of picture files.

    Attributes:
        height, width: of the first frame; every frame must have this size.
        fps: frames per second.
        length: number of frames; None, or an estimate, for a video file.

    Raises:
        FrameError: the first frame cannot be read; while iterating: a frame cannot be read or has another size.
        FileNotFoundError: there is no frame, or no such video file.
    """

    def __init__(self, files: Sequence[str | Path], *, video: bool = False, fps: float = 10.0) -> None:
        from vis.visualization.video_io import probe_video

        if not files:
            raise FileNotFoundError("a video without frames: the list of files is empty")
        self.files = [Path(file) for file in files]
        self.is_video = video
        self.length: int | None = len(self.files)
        self.fps = fps
        if video:
            info = probe_video(self.files[0])
            self.height, self.width, self.fps, self.length = info.height, info.width, info.fps, info.length
        else:
            self.height, self.width = read_image(self.files[0]).shape[:2]

    @classmethod
    def of(cls, inputs: Sequence[str], *, fps: float = 10.0) -> FrameStream:
        """From what a user names: one folder, one video file, a glob pattern, or several picture files.

        The pictures of a folder or a pattern are sorted naturally; several files keep the order in which they come.
        """
        from vis.visualization.video_io import VIDEO_SUFFIXES

        if len(inputs) != 1:
            return cls(_check_pictures(inputs), fps=fps)
        path = Path(os.path.expanduser(inputs[0]))
        if path.is_dir():
            return cls(_pictures_in(path), fps=fps)
        if path.is_file():
            is_picture = path.suffix.lower() in IMAGE_SUFFIXES
            return cls([path], video=not is_picture, fps=fps)
        matches = sorted(glob.glob(str(path), recursive=True), key=natural_key)
        if len(matches) == 1 and Path(matches[0]).suffix.lower() in VIDEO_SUFFIXES:
            return cls(matches, video=True)
        if not matches:
            raise FileNotFoundError(f"input {inputs[0]!r} is no folder, file or pattern that matches a file")
        return cls(_check_pictures(matches), fps=fps)

    def __iter__(self) -> Iterator[np.ndarray]:
        for index, (name, frame) in enumerate(self._frames()):
            if frame.shape[:2] != (self.height, self.width):
                raise FrameError(
                    f"{name}: frame {index} is {frame.shape[0]}x{frame.shape[1]}, the first one is "
                    f"{self.height}x{self.width} (height x width); all frames of a video need one size"
                )
            yield frame

    def _frames(self) -> Iterator[tuple[str, np.ndarray]]:
        from vis.visualization.video_io import read_video

        if self.is_video:
            for frame in read_video(self.files[0]):
                yield str(self.files[0]), frame
        else:
            for file in self.files:
                yield str(file), read_image(file)


def _pictures_in(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        hint = f"; it has the folders {', '.join(inner[:5])}: name one of them" if inner else ""
        raise FileNotFoundError(
            f"no frames in {folder}: {len(files)} files, none of them {', '.join(sorted(IMAGE_SUFFIXES))}{hint}"
        )
    return sorted(pictures, key=lambda file: natural_key(file.name))


def _check_pictures(names: Sequence[str]) -> list[Path]:
    files = [Path(os.path.expanduser(name)) for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"input {str(file)!r} does not exist")
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"several inputs must be picture files ({', '.join(sorted(IMAGE_SUFFIXES))}), found {str(file)!r}"
            )
    return files
