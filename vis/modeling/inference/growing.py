"""Sessions of methods whose tracks are born and end: the masks of a frame are encoded when the frame is tracked.

A detection that became part of a track is final, so its mask is written at the original size at once. What grows with
the video are the results alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.modeling.inference.session import VideoSession
from vis.modeling.segmenter import FrameNormalizer
from vis.structures import RLE, VideoPrediction
from vis.structures.rle import encode_masks

# Masks that are resized together: of 1080 x 1920 pixels in float32 each takes 8 MB.
_CHUNK = 8
# Noise is looked for from the tenth frame on: a track of fewer than _MIN_FRAMES frames that missed the last two.
_FIRST_CHECK, _MIN_FRAMES = 9, 3

SCORE_TYPES = ("mean", "max")


def encode_logits(
    logits: Tensor, *, padded_size: tuple[int, int], input_size: tuple[int, int], output_size: tuple[int, int]
) -> list[RLE | None]:
    """RLEs of (N, h, w) mask logits at the original size, None for an empty one; sizes are (height, width).

    As released by IDOL: bilinear to the padded input, cut to the input, cut at 0, nearest to the original size.
    """
    coded: list[RLE | None] = []
    for chunk in logits.split(_CHUNK) if len(logits) else ():
        # Transposed throughout: the encoder wants columns.
        full = chunk.transpose(1, 2)[None].float()
        full = F.interpolate(full, size=padded_size[::-1], mode="bilinear", align_corners=False)
        inside = (full[..., : input_size[1], : input_size[0]] > 0).to(torch.uint8)
        coded += encode_masks(F.interpolate(inside, size=output_size[::-1], mode="nearest")[0].bool().cpu())
    return coded


@dataclass
class _Track:
    total: Tensor  # (K,) sum, or maximum, of the class probabilities of its frames
    count: int
    last: int
    masks: dict[int, RLE | None] = field(default_factory=dict)


class GrowingTracks:
    """Results of one video so far."""

    def __init__(self, *, score_type: str = "mean") -> None:
        """Args: ``score_type``: a class's score is the "mean" over a track's frames, or the "max"."""
        if score_type not in SCORE_TYPES:
            raise ValueError(f"MODEL.IDOL.TEMPORAL_SCORE_TYPE is {score_type!r}, expected one of {SCORE_TYPES}")
        self._score_type = score_type
        self._tracks: dict[int, _Track] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, ids: Sequence[int], probabilities: Tensor, masks: Sequence[RLE | None]) -> None:
        """The next frame: n tracks in it, probabilities (n, K), masks at the original size."""
        frame = self._length
        for track_id, row, mask in zip(ids, probabilities.cpu(), masks, strict=True):
            track = self._tracks.get(track_id)
            if track is None:
                self._tracks[track_id] = track = _Track(row, 1, frame)
            else:
                track.total = track.total + row if self._score_type == "mean" else torch.maximum(track.total, row)
                track.count, track.last = track.count + 1, frame
            track.masks[frame] = mask
        self._length += 1
        if frame >= _FIRST_CHECK:
            noise = [
                key for key, track in self._tracks.items() if track.last <= frame - 2 and track.count < _MIN_FRAMES
            ]
            for key in noise:
                del self._tracks[key]

    def results(self, threshold: float, *, multi_class: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N,), labels (N,), track ids (N,), best first.

        Args:
            multi_class: every class of a track whose score is above ``threshold`` is a result of its own; else a track
                is one result, of its best class, whatever the score.
        """
        empty = torch.zeros(0, dtype=torch.int64)
        if not self._tracks:
            return torch.zeros(0), empty, empty
        mean = self._score_type == "mean"
        scores = torch.stack([track.total / (track.count if mean else 1) for track in self._tracks.values()])
        ids = torch.tensor(list(self._tracks))
        if multi_class:
            rows, labels = (scores > threshold).nonzero(as_tuple=True)
        else:
            rows, labels = torch.arange(len(scores)), scores.argmax(dim=1)
        scores = scores[rows, labels].float()
        order = scores.argsort(descending=True, stable=True)
        return scores[order], labels[order], ids[rows[order]]

    def masks(self, track_id: int) -> list[RLE | None]:
        """One per frame."""
        masks = self._tracks[track_id].masks
        return [masks.get(frame) for frame in range(self._length)]


class WindowTracker:
    """The :class:`~.session.Tracks` of a growing session: ``step`` makes results of a window and its input size."""

    def __init__(self, step: Callable[[Tensor, tuple[int, int]], None], tracks: GrowingTracks) -> None:
        self._step = step
        self.growing = tracks
        self.input_size: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.growing)

    def take(self, images: Tensor) -> None:
        """The next frames, normalised and padded: (T, 3, H, W)."""
        self._step(images, self.input_size)

    def probabilities(self) -> Tensor:
        """Not asked for: a growing session reads the results."""
        raise NotImplementedError

    def masks(self, frame: int, queries: list[int]) -> Tensor:
        """Not asked for: masks are encoded as frames come."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is stored."""


class GrowingSession(VideoSession):
    """One video under way; as :class:`VideoSession`, but nothing is left to do after the last frame."""

    def __init__(
        self,
        tracks: WindowTracker,
        *,
        normalizer: FrameNormalizer,
        window_size: int,
        output_size: tuple[int, int],
        video_id: int | None,
        threshold: float,
        multi_class: bool,
    ) -> None:
        """Args: the last two are those of :meth:`GrowingTracks.results`; the others as in :class:`VideoSession`."""
        super().__init__(
            tracks,
            normalizer=normalizer,
            window_size=window_size,
            max_num=0,
            mask_score=False,
            output_size=output_size,
            video_id=video_id,
        )
        self._window_tracker = tracks
        self._threshold, self._multi_class = threshold, multi_class

    def push(self, frames: Sequence[Tensor]) -> None:
        """As in :class:`VideoSession`."""
        if len(frames) and not len(self._window_tracker):
            self._window_tracker.input_size = (int(frames[0].shape[-2]), int(frames[0].shape[-1]))
        super().push(frames)

    def close(self) -> VideoPrediction:
        """The result; the session is over.

        Raises:
            ValueError: no frame was pushed, or the session is closed.
        """
        growing = self._window_tracker.growing
        if self._closed or not len(growing):
            return super().close()  # which says what is wrong
        self._closed = True
        scores, labels, ids = growing.results(self._threshold, multi_class=self._multi_class)
        coded = {key: growing.masks(key) for key in ids.unique().tolist()}  # classes of one track share its masks
        masks = [coded[key] for key in ids.tolist()]
        return VideoPrediction(scores, labels, ids, masks, *self._output_size, len(growing), self._video_id)
