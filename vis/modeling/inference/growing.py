"""Methods whose tracks begin and end: sessions that encode the masks of a frame when the frame is tracked.

A detection that became part of a track is final, so its mask is written at the original size at once. What grows with
the video are the results alone: of each track class scores and one RLE a frame.

A method derives from :class:`GrowingModel` and says in :meth:`GrowingModel.track` what a window of frames gives; what
becomes of the tracks of all frames is in its :class:`ResultRules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.modeling.inference.session import Session, run_video
from vis.modeling.segmenter import FrameNormalizer
from vis.structures import RLE, ClipSample, VideoPrediction
from vis.structures.rle import encode_masks

# Masks that are resized together: of 1080 x 1920 pixels in float32 each takes 8 MB.
_CHUNK = 8
# Noise is looked for from the tenth frame on: a track of fewer than _MIN_FRAMES frames that missed the last two.
_FIRST_CHECK, _MIN_FRAMES = 9, 3
# After a cut the number of frames of a track is known for as long as it was seen in the last so many frames.
_REMEMBERED = 1000

SCORE_TYPES = ("mean", "max", "video")
CLASS_CHOICES = ("all", "best", "vote")


class FrameSizes(NamedTuple):
    """(height, width) of the frames that the network sees, padded and not, and of the results."""

    padded: tuple[int, int]
    input: tuple[int, int]
    output: tuple[int, int]


class TrackedFrame(NamedTuple):
    """The n tracks of one frame: ids, each once; class probabilities (n, K); masks at the original size."""

    ids: Sequence[int]
    probabilities: Tensor
    masks: Sequence[RLE | None]


class WindowStep(Protocol):
    """Tracks the next frames of a video. ``state`` is None for the first window, then what the last call gave."""

    def __call__(self, images: Tensor, sizes: FrameSizes, state: Any) -> tuple[Sequence[TrackedFrame], Any]: ...


def encode_logits(logits: Tensor, sizes: FrameSizes) -> list[RLE | None]:
    """RLEs of (N, h, w) mask logits at the original size, None for an empty one.

    As released by IDOL: bilinear to the padded input, cut to the input, cut at 0, nearest to the original size.
    """
    coded: list[RLE | None] = []
    for chunk in logits.split(_CHUNK) if len(logits) else ():
        # Transposed throughout: the encoder wants columns.
        full = chunk.transpose(1, 2)[None].float()
        full = F.interpolate(full, size=sizes.padded[::-1], mode="bilinear", align_corners=False)
        inside = (full[..., : sizes.input[1], : sizes.input[0]] > 0).to(torch.uint8)
        coded += encode_masks(F.interpolate(inside, size=sizes.output[::-1], mode="nearest")[0].bool().cpu())
    return coded


@dataclass(frozen=True, kw_only=True)
class ResultRules:
    """How the tracks of a video become results.

    Attributes:
        score_type: the score of a class over time. ``mean`` or ``max`` over the track's frames; ``video``: the mean
            over all frames, 0 where the track is absent.
        classes: ``all``: every class of a track is a result of its own; ``best``: a track is one result, of its best
            class; ``vote``: of the class that is best in most of its frames (of equals the one with the higher sum),
            with the mean over its frames of the best class's score.
        threshold: with ``all``, scores of results are above it.
        max_num: at most so many results, the best; 0: all.
        drop_noise: from the tenth frame on, tracks of one or two frames that missed the last two are dropped.

    Raises:
        ValueError: a value is none of these.
    """

    score_type: str = "mean"
    classes: str = "all"
    threshold: float = 0.0
    max_num: int = 0
    drop_noise: bool = True

    def __post_init__(self) -> None:
        if self.score_type not in SCORE_TYPES:
            raise ValueError(f"TEMPORAL_SCORE_TYPE is {self.score_type!r}, expected one of {SCORE_TYPES}")
        if self.classes not in CLASS_CHOICES:
            raise ValueError(f"the classes of a track are {self.classes!r}, expected one of {CLASS_CHOICES}")
        if self.max_num < 0:
            raise ValueError(f"the number of results is {self.max_num}, expected 0 (all of them) or more")


@dataclass
class _Track:
    scores: Tensor  # (K,) sum, or maximum, of the class probabilities of its frames in this part
    best: Tensor  # (K,) for "vote": number of frames in which the class is best
    best_score: float = 0.0  # sum over its frames of the best class's score
    count: int = 0
    masks: dict[int, RLE | None] = field(default_factory=dict)


class GrowingTracks:
    """What is to be reported of a video, or of a part of it, so far."""

    def __init__(self, rules: ResultRules) -> None:
        self.rules = rules
        self._tracks: dict[int, _Track] = {}
        self._length = 0
        self._before = 0  # frames of the parts before
        # Of every track that may be noise yet, or may come back: number of frames, last frame of the whole video.
        self._seen: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return self._length

    def add(self, ids: Sequence[int], probabilities: Tensor, masks: Sequence[RLE | None]) -> None:
        """The next frame, see :class:`TrackedFrame`."""
        frame, now = self._length, self._before + self._length
        for track_id, row, mask in zip(ids, probabilities.float().cpu(), masks, strict=True):
            track = self._tracks.get(track_id)
            if track is None:
                self._tracks[track_id] = track = _Track(torch.zeros_like(row), torch.zeros_like(row))
            track.scores = torch.maximum(track.scores, row) if self.rules.score_type == "max" else track.scores + row
            track.best[row.argmax()] += 1
            track.best_score += float(row.max())
            track.count += 1
            track.masks[frame] = mask
            self._seen[track_id] = (self._seen.get(track_id, (0, 0))[0] + 1, now)
        self._length += 1
        if self.rules.drop_noise and now >= _FIRST_CHECK:
            noise = [key for key, (count, last) in self._seen.items() if last <= now - 2 and count < _MIN_FRAMES]
            for key in noise:
                del self._seen[key]
                self._tracks.pop(key, None)

    def continued(self) -> GrowingTracks:
        """Of the next part: results start anew, what is noise is told by all frames."""
        tracks = GrowingTracks(self.rules)
        tracks._before = self._before + self._length
        tracks._seen = {key: seen for key, seen in self._seen.items() if seen[1] >= tracks._before - _REMEMBERED}
        return tracks

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N,), labels (N,), track ids (N,), best first."""
        rules, empty = self.rules, torch.zeros(0, dtype=torch.int64)
        if not self._tracks:
            return torch.zeros(0), empty, empty
        counts = torch.tensor([track.count for track in self._tracks.values()])
        divisor = {"mean": counts, "max": torch.ones_like(counts), "video": torch.full_like(counts, self._length)}
        scores = torch.stack([track.scores for track in self._tracks.values()]) / divisor[rules.score_type][:, None]
        if rules.classes == "all":
            rows, labels = (scores > rules.threshold).nonzero(as_tuple=True)
            scores = scores[rows, labels]
        elif rules.classes == "best":
            rows = torch.arange(len(scores))
            scores, labels = scores.max(dim=1)
        else:
            rows = torch.arange(len(scores))
            votes = torch.stack([track.best for track in self._tracks.values()])
            most = votes == votes.amax(dim=1, keepdim=True)
            labels = scores.masked_fill(~most, -1.0).argmax(dim=1)
            scores = torch.tensor([track.best_score for track in self._tracks.values()]) / counts
        order = scores.argsort(descending=True, stable=True)
        if rules.max_num:
            order = order[: rules.max_num]
        ids = torch.tensor(list(self._tracks))
        return scores[order], labels[order], ids[rows[order]]

    def masks(self, track_id: int) -> list[RLE | None]:
        """One per frame."""
        masks = self._tracks[track_id].masks
        return [masks.get(frame) for frame in range(self._length)]

    def close(self) -> None:
        """Nothing is stored elsewhere."""


class GrowingSession(Session):
    """One video under way; nothing is left to do after the last frame but to put the results together."""

    _tracks: GrowingTracks

    def __init__(self, step: WindowStep, rules: ResultRules, **options: Any) -> None:
        """Args: ``options`` of :class:`~.session.Session`."""
        super().__init__(GrowingTracks(rules), **options)
        self._step = step
        self._state: Any = None  # goes on over cuts

    def _take(self, images: Tensor) -> None:
        assert self._input_size is not None
        sizes = FrameSizes((int(images.shape[-2]), int(images.shape[-1])), self._input_size, self._output_size)
        frames, self._state = self._step(images, sizes, self._state)
        for frame in frames:
            self._tracks.add(*frame)

    def _result(self, input_size: tuple[int, int]) -> VideoPrediction:
        scores, labels, ids = self._tracks.results()
        coded = {key: self._tracks.masks(key) for key in ids.unique().tolist()}  # classes of one track share its masks
        masks = [coded[key] for key in ids.tolist()]
        return VideoPrediction(scores, labels, ids, masks, *self._output_size, len(self._tracks), self._video_id)


class GrowingModel(nn.Module):
    """Input, output, windows and sessions of these methods. A method adds its parts, :meth:`losses`, :meth:`track`."""

    def __init__(self, *, normalizer: FrameNormalizer, window_size: int, rules: ResultRules) -> None:
        """Args: ``window_size``: frames per pass at test time."""
        super().__init__()
        if window_size < 1:
            raise ValueError(f"MODEL.MASK_FORMER.TEST.WINDOW_SIZE is {window_size}, expected at least 1 frame")
        self.normalizer, self.window_size, self.rules = normalizer, window_size, rules

    @property
    def device(self) -> torch.device:
        return self.normalizer.device

    def forward(self, samples: Sequence[ClipSample]) -> dict[str, Tensor] | list[VideoPrediction]:
        """Clips -> ``{loss_*}`` in training; videos -> one :class:`VideoPrediction` each in eval mode."""
        return self.losses(samples) if self.training else [self.predict(sample) for sample in samples]

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses of a batch of clips."""
        raise NotImplementedError

    def track(self, images: Tensor, sizes: FrameSizes, state: Any) -> tuple[Sequence[TrackedFrame], Any]:
        """The next frames (T, 3, H, W), normalised and padded, of a video: see :class:`WindowStep`."""
        raise NotImplementedError

    def predict(self, sample: ClipSample) -> VideoPrediction:
        """One video, read a window at a time.

        Raises:
            ValueError: the sample asks for the tracks of the one before to go on, which a session does.
        """
        return run_video(self.open_video, sample, self.window_size)

    def open_video(self, height: int, width: int, *, video_id: int | None = None) -> GrowingSession:
        """Start a video whose results are wanted at ``height`` x ``width``.

        A long video may be taken in parts, whose tracks have the same ids: :meth:`~.session.Session.cut`.
        """
        return GrowingSession(
            self.track,
            self.rules,
            normalizer=self.normalizer,
            window_size=self.window_size,
            output_size=(height, width),
            video_id=video_id,
        )
