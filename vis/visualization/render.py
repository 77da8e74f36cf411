"""Writes the pictures of one video: PNG frames, an overlay video and a contact sheet, in one pass over the frames."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from vis.visualization.draw import auto_scale, draw_frame
from vis.visualization.frames import FrameStream
from vis.visualization.sheet import contact_sheet, side_by_side, spread
from vis.visualization.tracks import VideoTrack, tracks_at
from vis.visualization.video_io import VideoWriter

logger = logging.getLogger(__name__)

_CELL_WIDTH = 480  # pixels of one picture of a contact sheet


class Progress:
    """Says now and then how far a loop is and how long it will take.

    Args:
        what: "drawing".
        total: number of steps; None if it is not known.
        period: seconds between two lines.
    """

    def __init__(self, what: str, total: int | None, *, period: float = 2.0) -> None:
        self._what, self._total, self._period = what, total, period
        self._start = self._last = time.monotonic()
        self.count = 0

    def step(self) -> None:
        """Counts one step; logs if it is time to."""
        self.count += 1
        now = time.monotonic()
        if now - self._last < self._period:
            return
        self._last = now
        speed = self.count / max(now - self._start, 1e-9)
        # The number of frames of a video file is an estimate: never promise a negative rest.
        rest = " frames"
        if self._total is not None and self._total >= self.count:
            rest = f"/{self._total} frames, eta {_clock((self._total - self.count) / speed)}"
        logger.info("%s %d%s, %.1f frames/s", self._what, self.count, rest, speed)

    def finish(self) -> None:
        """Logs how long all of it took."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        logger.info("%s: %d frames in %s, %.1f frames/s", self._what, self.count, _clock(seconds), self.count / seconds)


def render_video(
    source: FrameStream | Iterable[np.ndarray],
    tracks: Sequence[VideoTrack],
    output: str | Path,
    *,
    length: int | None = None,
    fps: float = 10.0,
    scale: float | None = None,
    boxes: bool = False,
    ground_truth: Sequence[VideoTrack] | None = None,
    write_frames: bool = True,
    write_video: bool = True,
    sheet_frames: int = 12,
    columns: int = 4,
) -> list[Path]:
    """Draws a video frame by frame; one frame at a time is in memory, beside the small pictures of the contact sheet.

    Args:
        source: (H, W, 3) uint8 RGB frames in order.
        tracks: what to draw, see ``vis.visualization.tracks``.
        output: folder; gets ``frames/00000.png`` ..., ``overlay.mp4`` and ``contact_sheet.png``.
        length: draw this many frames, and spread the contact sheet over them; None: all of the source.
        fps: frames per second of ``overlay.mp4``.
        scale, boxes: as in ``draw_frame``.
        ground_truth: drawn in a picture of its own, to the left of the prediction.
        write_frames, write_video: leave PNG frames or the video away.
        sheet_frames, columns: pictures on the contact sheet and how many of them in a row; 0 pictures: no sheet.

    Returns:
        The files and folders written.

    Raises:
        FrameError: a frame cannot be read. What was drawn before it is on disk, the sheet and the video included.
        ValueError: there is no frame, or a mask does not fit.
    """
    output = Path(output)
    (output / "frames" if write_frames else output).mkdir(parents=True, exist_ok=True)
    total = length if length is not None else getattr(source, "length", None)
    wanted = set(spread(total, sheet_frames)) if total else set(range(sheet_frames))
    cells: list[np.ndarray] = []
    captions: list[str] = []
    progress = Progress("drawing", total)
    written: list[Path] = [output / "frames"] if write_frames else []
    with ExitStack() as stack:
        writer = stack.enter_context(VideoWriter(output / "overlay.mp4", fps)) if write_video else None
        stack.callback(_save_sheet, output / "contact_sheet.png", cells, captions, columns)
        for index, frame in enumerate(islice(source, length)):
            layers = [ground_truth, tracks] if ground_truth is not None else [tracks]
            here = [tracks_at(layer, index, *frame.shape[:2]) for layer in layers]
            size = auto_scale(frame.shape[1]) if scale is None else scale
            picture = _join([draw_frame(frame, layer, scale=size, boxes=boxes) for layer in here])
            if write_frames:
                save_png(output / "frames" / f"{index:05d}.png", picture)
            if writer is not None:
                writer.write(picture)
            if index in wanted:
                # Drawn again at the size of the sheet: labels of a shrunk picture could not be read.
                size = min(size, _CELL_WIDTH / frame.shape[1])
                cells.append(_join([draw_frame(frame, layer, scale=size, boxes=boxes) for layer in here]))
                captions.append(f"frame {index}")
            progress.step()
    if progress.count == 0:
        raise ValueError("there is no frame to draw")
    progress.finish()
    written += [output / "overlay.mp4"] if write_video else []
    return written + ([output / "contact_sheet.png"] if cells else [])


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes (H, W, 3) uint8 as PNG; quick rather than small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=2)


def _join(pictures: Sequence[np.ndarray]) -> np.ndarray:
    return pictures[0] if len(pictures) == 1 else side_by_side(pictures[0], pictures[1])


def _save_sheet(path: Path, cells: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> None:
    if cells:
        save_png(path, contact_sheet(cells, columns, captions=captions))


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
