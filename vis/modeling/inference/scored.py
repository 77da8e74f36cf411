"""Tracks of a method that matches queries frame by frame, with heads that have a say in the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from vis.modeling.heads.build import Heads
from vis.modeling.inference.session import OnlineTracks, TrackedFrames
from vis.modeling.transformer_decoders.masked import DecoderOutput


class ScoredState(NamedTuple):
    """State of the tracker, and the sum over frames of what class scores are multiplied by, (Q,) or None."""

    tracker: Any
    factors: Tensor | None


class ScoredTracks(OnlineTracks):
    """Tracks whose class scores are multiplied by the mean over time of what the heads say."""

    def __init__(self, segment: Callable[[Tensor], DecoderOutput], tracker: nn.Module, heads: Heads) -> None:
        """Args: ``segment``: frames (T, 3, H, W) -> predictions of each; ``tracker`` brings them into track order."""
        super().__init__(self._track)
        self._segment, self._tracker, self._heads = segment, tracker, heads

    def _track(self, images: Tensor, state: ScoredState | None) -> tuple[TrackedFrames, ScoredState]:
        before = state or ScoredState(None, None)
        tracked, tracker = self._tracker(self._segment(images), before.tracker)
        factors = self._heads.score_factors(tracked)
        if factors is not None:
            factors = factors.float().sum(dim=0) + (0 if before.factors is None else before.factors)
        frames = TrackedFrames(tracked["pred_logits"], tracked["mask_embeds"], tracked["mask_features"])
        return frames, ScoredState(tracker, factors)

    def continued(self) -> ScoredTracks:
        """See :class:`~.session.ContinuedTracks`."""
        tracks = ScoredTracks(self._segment, self._tracker, self._heads)
        if self._state is not None:
            tracks._state = ScoredState(self._state.tracker, None)
        return tracks

    def probabilities(self) -> Tensor:
        """(Q, K)."""
        found, factors = super().probabilities(), self._state.factors
        return found if factors is None else found * (factors / len(self))[:, None]
