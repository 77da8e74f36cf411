"""Video files, read and written one frame at a time. OpenCV is imported when a video file is touched, not before."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from vis.visualization.frames import FrameError

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif", ".ogv", ".flv"}
)
DEFAULT_FPS = 10.0


@dataclass(frozen=True)
class VideoInfo:
    """Frames per second, size in pixels, and the number of frames that the container claims, if any."""

    fps: float
    height: int
    width: int
    length: int | None


def probe_video(path: str | Path) -> VideoInfo:
    """What a video file is like; the size is that of its first decoded frame.

    Raises:
        FileNotFoundError: no such file.
        FrameError: not a video that can be read, or one without a frame.
    """
    cv2 = _opencv(f"read {path}")
    capture = _open(cv2, path)
    try:
        found, frame = capture.read()
        if not found:
            raise FrameError(
                f"{path} opens as a video but has no frame that can be decoded; the file is empty or broken"
            )
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        logger.info("%s does not say its frame rate, %g frames per second are assumed", path, DEFAULT_FPS)
        fps = DEFAULT_FPS
    length = int(count) if math.isfinite(count) and count >= 1 else None
    return VideoInfo(float(fps), frame.shape[0], frame.shape[1], length)


def read_video(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, (H, W, 3) uint8 RGB, decoded one after the other.

    Raises:
        FileNotFoundError: no such file.
        FrameError: not a video that can be read, or one without a frame.
    """
    cv2 = _opencv(f"read {path}")
    capture = _open(cv2, path)
    count, claimed = 0, capture.get(cv2.CAP_PROP_FRAME_COUNT)
    try:
        while True:
            found, frame = capture.read()
            if not found:
                break
            count += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
    if count == 0:
        raise FrameError(f"{path} opens as a video but has no frame that can be decoded; the file is empty or broken")
    if count < claimed:
        # The number in a container is an estimate for some formats, so this cannot be told from a cut-off file.
        logger.warning("%s: %d frames were decoded, the file claims %d; it may be cut off", path, count, int(claimed))


class VideoWriter:
    """Writes an mp4 file (MPEG-4 part 2), frame by frame; a context manager. What was written stays after an error.

    Args:
        path: file to write.
        fps: frames per second.

    Raises:
        OSError: OpenCV cannot open the file for writing.
        ValueError: a frame of another size than the first, or not (H, W, 3) uint8.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = Path(path)
        self.count = 0
        self._fps = fps
        self._cv2 = _opencv(f"write {path}")
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frame: np.ndarray) -> None:
        """Appends (H, W, 3) uint8 RGB. An odd side is made even by repeating its last line: mp4v has no odd ones."""
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame must be (H, W, 3) uint8, this one is {frame.shape} {frame.dtype}")
        height, width = frame.shape[:2]
        if self._size is None:
            self._writer = self._open(height + height % 2, width + width % 2)
            self._size = (height, width)
        if (height, width) != self._size:
            raise ValueError(f"{self.path}: a frame of {height}x{width} in a video of {self._size[0]}x{self._size[1]}")
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._writer.write(self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> None:
        """Finishes the file. Closing twice is fine."""
        if self._size is not None:
            self._writer.release()

    def _open(self, height: int, width: int) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        code = self._cv2.VideoWriter_fourcc(*"mp4v")
        writer = self._cv2.VideoWriter(str(self.path), code, self._fps, (width, height))
        if not writer.isOpened():
            raise OSError(
                f"OpenCV cannot write {self.path} ({width}x{height}, mp4v): is the folder writable, is the disk full? "
                "PNG frames need no OpenCV (--no-video)"
            )
        return writer


def _open(cv2: ModuleType, path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"video file {str(path)!r} does not exist")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        size = Path(path).stat().st_size
        raise FrameError(
            f"{path} ({size} bytes) is not a video that OpenCV can read: empty, broken or of an unknown kind"
        )
    return capture


def _opencv(purpose: str) -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"OpenCV is needed to {purpose}: pip install opencv-python-headless") from error
    return cv2
