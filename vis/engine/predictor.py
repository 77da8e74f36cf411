"""Inference on one video whose frames arrive one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.transforms import ResizeTransform
from torch import Tensor, nn

from vis.data.transforms import shortest_edge_size
from vis.structures import VideoPrediction

logger = logging.getLogger(__name__)

Frame = np.ndarray | Tensor


class VideoPredictor:
    """Runs a model on videos, frame by frame: ``open``, ``push`` each frame, ``close``; or ``predict`` for all of it.

    ``cut`` gives results on the way: those of the frames since the last cut, with the ids that tracks keep to the end.

    Nothing of the size of the video is held: a window of resized frames is collected, the model takes it, and keeps
    what it needs (encoded masks). One predictor runs many videos, one after the other.

    ``VideoPredictor(cfg)`` builds the model and loads ``MODEL.WEIGHTS``; ``VideoPredictor(model=model, ...)`` takes a
    ready one.

    Args:
        model: has ``open_video(height, width)``, whose session has ``push(list of (3, h, w) uint8 RGB)`` and
            ``close() -> VideoPrediction``, for :meth:`cut` also ``cut() -> VideoPrediction``. It is put into eval mode.
        min_size: the shorter side of a frame for the model, in pixels; 0 keeps frames as they are.
        max_size: the longer side is at most this.
        window_size: frames that are handed to the model at once.

    Raises:
        ValueError: ``window_size`` < 1; from cfg: ``MODEL.WEIGHTS`` is empty or does not fit.
        FileNotFoundError: from cfg: there is no such file of weights.
    """

    @configurable
    def __init__(self, *, model: nn.Module, min_size: int, max_size: int, window_size: int = 1) -> None:
        if window_size < 1:
            raise ValueError(f"window_size is {window_size}, expected at least one frame")
        self.model: Any = model.eval()
        self._min_size, self._max_size, self._window_size = min_size, max_size, window_size
        self._session: Any = None
        self._size = (0, 0)
        self._count = 0
        self._resize: ResizeTransform | None = None
        self._window: list[Tensor] = []

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments from ``INPUT.{MIN,MAX}_SIZE_TEST`` and ``MODEL``: the model is built and loaded."""
        # Here, because a predictor of a ready model needs neither.
        from vis.checkpoint import load_weights
        from vis.modeling import build_model

        if not cfg.MODEL.WEIGHTS:
            raise ValueError(
                "MODEL.WEIGHTS is empty: prediction needs trained weights, give MODEL.WEIGHTS path/to/model.pth"
            )
        model = build_model(cfg)
        load_weights(model, cfg.MODEL.WEIGHTS, training=False)
        return {
            "model": model,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "window_size": cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE,
        }

    @torch.no_grad()
    def open(self, height: int, width: int) -> None:
        """Begins a video of ``height`` x ``width`` pixels. A video that was begun and not closed is given up."""
        if self._session is not None and self._count:
            logger.warning("a video of %d frames was not closed, its tracks are given up", self._count)
        self._window, self._count, self._size = [], 0, (height, width)
        new_size = shortest_edge_size(height, width, self._min_size, self._max_size)
        self._resize = None if new_size == (height, width) else ResizeTransform(height, width, *new_size)
        self._session = self.model.open_video(height, width)

    @torch.no_grad()
    def push(self, frame: Frame) -> None:
        """Adds the next frame.

        Args:
            frame: (H, W, 3) uint8 RGB array, or (3, H, W) uint8 RGB tensor, of the size given to ``open``.

        Raises:
            ValueError: no video is open, or the frame is of another type or size.
        """
        if self._session is None:
            raise ValueError("push() without an open video: call open(height, width) first")
        self._window.append(self._prepare(frame))
        self._count += 1
        if len(self._window) == self._window_size:
            self._flush()

    @torch.no_grad()
    def close(self) -> VideoPrediction:
        """Ends the video: its tracks, at the original size.

        Raises:
            ValueError: no video is open, or it has no frame.
        """
        if self._session is None:
            raise ValueError("close() without an open video: call open(height, width) first")
        if self._count == 0:
            self._session = None
            raise ValueError("a video without frames: push at least one frame before close()")
        self._flush()
        session, self._session = self._session, None
        return self._counted(session.close())

    @torch.no_grad()
    def cut(self) -> VideoPrediction:
        """The tracks of the frames since ``open`` or the last cut, now; the video goes on, and tracks keep their ids.

        Classes and scores are those of this part of the video. After the last part call ``close`` in place of this.

        Raises:
            ValueError: no video is open, it has no frame since the last cut, or the method needs all frames at once.
        """
        if self._session is None or self._count == 0:
            raise ValueError(
                "cut() without frames: open(height, width) a video and push at least one since the last cut"
            )
        self._flush()
        prediction = self._counted(self._session.cut())
        self._count = 0
        return prediction

    def _counted(self, prediction: VideoPrediction) -> VideoPrediction:
        assert prediction.length == self._count, f"{self._count} frames pushed, a prediction of {prediction.length}"
        return prediction

    def predict(self, frames: Iterable[Frame]) -> VideoPrediction:
        """The tracks of a whole video; ``frames`` may be a generator, it is read once. All frames need one size.

        Raises:
            ValueError: there is no frame, or a frame is of another type or size than the first.
        """
        opened = False
        for frame in frames:
            if not opened:
                self.open(*_size_of(frame))
                opened = True
            self.push(frame)
        if not opened:
            raise ValueError("a video without frames: predict() needs at least one")
        return self.close()

    def _prepare(self, frame: Frame) -> Tensor:
        """(3, h, w) uint8 at the size of the test loader, by the same resampling."""
        size = _size_of(frame)
        if size != self._size:
            raise ValueError(
                f"frame {self._count} is {size[0]}x{size[1]} (height x width), "
                f"the video was opened with {self._size[0]}x{self._size[1]}"
            )
        array = frame.permute(1, 2, 0).cpu().numpy() if isinstance(frame, Tensor) else frame
        if self._resize is not None:
            array = self._resize.apply_image(np.ascontiguousarray(array))
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    def _flush(self) -> None:
        window, self._window = self._window, []
        if window:
            self._session.push(window)


def _size_of(frame: Frame) -> tuple[int, int]:
    """(height, width) of a frame, after a check of its type."""
    if isinstance(frame, Tensor):
        fits = frame.ndim == 3 and frame.shape[0] == 3 and frame.dtype == torch.uint8
        height, width = frame.shape[-2:] if fits else (0, 0)
    else:
        fits = isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8
        height, width = frame.shape[:2] if fits else (0, 0)
    if not fits:
        found = f"{tuple(frame.shape)} {frame.dtype}" if hasattr(frame, "shape") else type(frame).__name__
        raise ValueError(f"a frame must be an (H, W, 3) uint8 RGB array or a (3, H, W) uint8 RGB tensor, found {found}")
    return int(height), int(width)
