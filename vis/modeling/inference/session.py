"""One video under way: frames are pushed in windows, the result comes at the end.

The session does what all methods have in common: it checks and cuts the frames. At the end :class:`VideoSession`
selects the tracks and writes their masks at the original size, one frame at a time, with a method's :class:`Tracks`;
for tracks that begin and end there is :class:`~.growing.GrowingSession`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from vis.modeling.inference.mask_store import MaskStore
from vis.modeling.inference.results import MaskWriter, select_tracks
from vis.modeling.segmenter import FrameNormalizer
from vis.modeling.transformer_decoders.masked import predict_masks
from vis.structures import ClipSample, VideoPrediction


class Frames(Protocol):
    """What a method knows of the frames of one video, or of a part of it."""

    def __len__(self) -> int:
        """Frames taken so far."""

    def close(self) -> None:
        """Free what was stored."""


class Tracks(Frames, Protocol):
    """Of a method that reports at the end: it takes windows, then tells classes, then masks of the chosen tracks."""

    def take(self, images: Tensor) -> None:
        """The next frames, normalised and padded: (T, 3, H, W)."""

    def probabilities(self) -> Tensor:
        """After the last frame: (Q, K), of every track and class."""

    def masks(self, frame: int, queries: list[int]) -> Tensor:
        """Then: mask logits (len(queries), h, w) of some tracks in one frame."""


@runtime_checkable
class ContinuedTracks(Protocol):
    """Tracks whose identities can go on in a next part of the video: see :meth:`Session.cut`."""

    def continued(self) -> Frames:
        """Tracks without a frame yet, whose identities go on from the last frame of these."""


class TrackedFrames(NamedTuple):
    """Tracks of T frames: logits (T, Q, K+1), mask embeddings (T, Q, C) and what they multiply, (T, C, h, w)."""

    pred_logits: Tensor
    mask_embeds: Tensor
    mask_features: Tensor


class OnlineTracks:
    """Of a method whose masks are final as frames come: logits are averaged, mask logits are stored."""

    def __init__(self, step: Callable[[Tensor, Any], tuple[TrackedFrames, Any]]) -> None:
        """Args: ``step(images, state)`` tracks a window; the state of the first call is None."""
        self._step = step
        self._state: Any = None
        self._logits: Tensor | None = None  # (Q, K+1), sum over the frames
        self._store = MaskStore()

    def __len__(self) -> int:
        return len(self._store)

    def take(self, images: Tensor) -> None:
        """Track the next frames (T, 3, H, W)."""
        tracked, self._state = self._step(images, self._state)
        logits = tracked.pred_logits.float().sum(dim=0)
        self._logits = logits if self._logits is None else self._logits + logits
        for embeds, features in zip(tracked.mask_embeds, tracked.mask_features, strict=True):
            self._store.append(predict_masks(embeds[None], features[None])[0])

    def probabilities(self) -> Tensor:
        """(Q, K): the softmax of the logits' mean over time."""
        assert self._logits is not None
        return class_probabilities(self._logits / len(self))

    def masks(self, frame: int, queries: list[int]) -> Tensor:
        """Mask logits (len(queries), h, w)."""
        return self._store.read(frame, queries)

    def continued(self) -> OnlineTracks:
        """See :class:`ContinuedTracks`."""
        tracks = OnlineTracks(self._step)
        tracks._state = self._state
        return tracks

    def close(self) -> None:
        """Delete the stored masks."""
        self._store.close()


def class_probabilities(logits: Tensor) -> Tensor:
    """(..., K+1) logits, the last of no object -> (..., K) probabilities of the classes."""
    return logits.float().softmax(dim=-1)[..., :-1]


def windows(frames: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Consecutive lists of up to ``size`` frames; reads ``frames`` once, in order."""
    window: list[Tensor] = []
    for frame in frames:
        window.append(frame)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def run_video(open_video: Callable[..., Session], sample: ClipSample, window_size: int) -> VideoPrediction:
    """One video of a data set, read a window at a time.

    Args:
        open_video: ``open_video(height, width, video_id=...)`` of the model.

    Raises:
        ValueError: the sample asks for the tracks of the one before to go on, which a session does.
    """
    if sample.get("keep"):
        raise ValueError(
            "a sample with 'keep': True wants the tracks of the sample before to go on, but a model keeps nothing "
            "between samples: open the video with model.open_video(height, width), push the frames of each part, "
            "and take its result with cut(), of the last part with close()"
        )
    session = open_video(sample["height"], sample["width"], video_id=sample.get("video_id"))
    for window in windows(sample["image"], window_size):
        session.push(window)
    return session.close()


class Session:
    """One video under way: push frames in order, then close. Sessions of several videos may be open at once.

    A video that is too long to wait for, or that does not end, is cut: :meth:`cut` gives the results of the part since
    the last cut, and the tracks of the next part go on under the same ids.

    What is done with the windows (:meth:`_take`) and after the last one (:meth:`_result`) differs.
    """

    def __init__(
        self,
        tracks: Frames,
        *,
        normalizer: FrameNormalizer,
        window_size: int,
        output_size: tuple[int, int],
        video_id: int | None,
    ) -> None:
        """Args:
        window_size: frames per pass.
        output_size: (height, width) of the results.
        """
        self._tracks: Any = tracks
        self._normalizer, self._window_size = normalizer, window_size
        self._output_size, self._video_id = output_size, video_id
        self._input_size: tuple[int, int] | None = None
        self._closed = False

    @torch.no_grad()
    def push(self, frames: Sequence[Tensor]) -> None:
        """Take the next frames, each (3, H, W), RGB 0..255; all frames of a video have one size.

        Raises:
            ValueError: a frame has another size than the first (none is taken then), or the session is closed.
        """
        self._check_open()
        for frame in frames:
            size = (int(frame.shape[-2]), int(frame.shape[-1]))
            self._input_size = self._input_size or size
            if size != self._input_size:
                raise ValueError(f"a frame is {size}, the first of the video was {self._input_size} (height, width)")
        for window in windows(frames, self._window_size):
            self._take(self._normalizer(window))

    @torch.no_grad()
    def close(self) -> VideoPrediction:
        """The result; the session is over.

        Raises:
            ValueError: no frame was pushed, or the session is closed.
        """
        self._check_open()
        if not len(self._tracks) or self._input_size is None:
            raise ValueError("the video has no frame: push at least one before close")
        self._closed = True
        try:
            return self._result(self._input_size)
        finally:
            self._tracks.close()

    def cut(self) -> VideoPrediction:
        """The result of the frames since the last cut, or since the opening; the video goes on.

        Tracks keep their ids: what has a ``track_id`` in one part has it in all of them. Classes, scores and the choice
        of the results are those of the part alone; a method that looks at all frames at once (DVIS offline) looks at
        those of the part. After the last part call :meth:`close` in place of this.

        Raises:
            ValueError: no frame was pushed since the last cut, the session is closed, or the method cannot go on.
        """
        self._check_open()
        if not isinstance(self._tracks, ContinuedTracks):
            raise ValueError(
                "a video of this method cannot be cut, since its tracks are made of all frames at once, as VITA's are; "
                "those of every other method here go on after a cut. Push all frames, then close"
            )
        following = self._tracks.continued()
        prediction = self.close()
        self._tracks, self._closed = following, False
        return prediction

    def _take(self, images: Tensor) -> None:
        """The next frames, normalised and padded: (T, 3, H, W)."""
        raise NotImplementedError

    def _result(self, input_size: tuple[int, int]) -> VideoPrediction:
        """After the last frame of a part; there is at least one. ``input_size`` (height, width) of the frames."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the video is closed: open another with open_video")


class VideoSession(Session):
    """Of a method that stores masks in low resolution: at the end tracks are chosen, then their masks are written."""

    _tracks: Tracks

    def __init__(self, tracks: Tracks, *, max_num: int, mask_score: bool, **options: Any) -> None:
        """Args: as :class:`~.video_model.VideoModel` has them; ``options`` of :class:`Session`."""
        super().__init__(tracks, **options)
        self._max_num, self._mask_score = max_num, mask_score

    def _take(self, images: Tensor) -> None:
        self._tracks.take(images)

    def _result(self, input_size: tuple[int, int]) -> VideoPrediction:
        length = len(self._tracks)
        scores, labels, queries = (x.cpu() for x in select_tracks(self._tracks.probabilities(), self._max_num))
        kept, row = torch.unique(queries, return_inverse=True)
        writer = MaskWriter(
            num_queries=len(kept),
            padded_size=self._normalizer.padded_size([input_size]),
            input_size=input_size,
            output_size=self._output_size,
            device=self._normalizer.device,
            with_mask_score=self._mask_score,
        )
        for frame in range(length):
            writer.add(self._tracks.masks(frame, kept.tolist()))
        if self._mask_score:
            scores = scores * writer.mask_scores()[row]
        masks = [writer.tracks[i] for i in row.tolist()]
        return VideoPrediction(scores, labels, queries, masks, *self._output_size, length, self._video_id)
