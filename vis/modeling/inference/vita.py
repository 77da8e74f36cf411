"""Sessions of VITA: a track's score is its class's times its masks' quality at the size that the network saw."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.modeling.inference.session import Tracks, VideoSession
from vis.structures import VideoPrediction


class QualitySession(VideoSession):
    """Released VITA measures the mean probability inside a mask before it is resized to the original size.

    ``mask_score`` of :class:`VideoSession`, which measures after, stays off.
    """

    def close(self) -> VideoPrediction:
        """As in :class:`VideoSession`; scores are multiplied by the quality of the masks."""
        if self._input_size is None or self._closed:
            return super().close()  # which says what is wrong
        measured = _MeasuredTracks(self._tracks, self._normalizer.padded_size([self._input_size]), self._input_size)
        self._tracks = measured
        prediction = super().close()
        return replace(prediction, scores=prediction.scores * measured.quality(prediction.track_ids))


class _MeasuredTracks:
    """Tracks whose masks are measured when they are asked for."""

    def __init__(self, tracks: Tracks, padded_size: tuple[int, int], input_size: tuple[int, int]) -> None:
        self._of, self._padded_size, self._input_size = tracks, padded_size, input_size
        self._sums: dict[int, tuple[float, int]] = {}  # track: sum of probabilities inside the masks, pixels

    def __len__(self) -> int:
        return len(self._of)

    def take(self, images: Tensor) -> None:
        self._of.take(images)

    def probabilities(self) -> Tensor:
        return self._of.probabilities()

    def masks(self, frame: int, queries: list[int]) -> Tensor:
        logits = self._of.masks(frame, queries)
        # A bilinear value lies between its neighbours: without a positive one there is no mask.
        filled = (logits.flatten(1).amax(dim=1) > 0).nonzero()[:, 0].tolist() if len(queries) else []
        if filled:
            height, width = self._input_size
            full = F.interpolate(logits[None, filled], size=self._padded_size, mode="bilinear", align_corners=False)
            full = full[0, :, :height, :width]
            inside = (full.sigmoid() * (full > 0)).sum(dim=(1, 2)).tolist()
            for row, mass, area in zip(filled, inside, (full > 0).sum(dim=(1, 2)).tolist(), strict=True):
                before = self._sums.get(queries[row], (0.0, 0))
                self._sums[queries[row]] = before[0] + mass, before[1] + area
        return logits

    def quality(self, tracks: Tensor) -> Tensor:
        """(N,) float32: mean foreground probability inside each track's masks, 0 for a track without a pixel."""
        sums = [self._sums.get(track, (0.0, 0)) for track in tracks.tolist()]
        return torch.tensor([mass / (area + 1e-6) for mass, area in sums], dtype=torch.float32)

    def close(self) -> None:
        self._of.close()
