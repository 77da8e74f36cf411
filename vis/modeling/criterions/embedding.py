"""The matching loss of MaskTrack R-CNN (Yang et al., ICCV 2019, section 4.1).

Each positive prediction of the key frame chooses among the instances of the reference frame and "a new object": a cross
entropy whose target is the same instance there, or "new" where it is absent.

The same loss trains the embeddings of a CondInst. CrossVIS (Yang et al., ICCV 2021) trains those by naming every
identity of the training set instead; that needs a layer with a row for each of them (3,774 in YouTube-VIS 2019), fits
one data set only, and sees an instance against all others rather than against those of its own video, which is what a
tracker has to tell apart. Hence it is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.modeling.heads.track_embedding import MatchLogits

NORMALIZERS = ("positives", "matched")


@dataclass
class MatchPair:
    """One pair of frames.

    Attributes:
        embeds: (m, C) of the positive predictions of the key frame.
        ids: (m,) int64, which instance of the video each of them is.
        known: (n, C) of the instances of the reference frame.
        known_ids: (n,) int64, which instance each of those is; no two are the same.
    """

    embeds: Tensor
    ids: Tensor
    known: Tensor
    known_ids: Tensor


class MatchCriterion(nn.Module):
    """Mean of the pairs' losses; a pair without a positive prediction counts as 0."""

    def __init__(self, *, logits: MatchLogits, normalizer: str = "positives") -> None:
        """Args:
        normalizer: a pair's loss is the sum over its positives divided by their number ("positives", the original), or
            by the number of those that are in the reference frame, at least 1 ("matched", mmtracking).
        """
        super().__init__()
        if normalizer not in NORMALIZERS:
            raise ValueError(
                f"MODEL.MASKTRACK.MATCH_NORMALIZER is {normalizer!r}, expected one of {', '.join(NORMALIZERS)}"
            )
        self.logits, self.normalizer = logits, normalizer

    def forward(self, pairs: Sequence[MatchPair]) -> Tensor:
        """Scalar, attached to every embedding given whatever the instances."""
        return torch.stack([self._pair(pair) for pair in pairs]).mean()

    def _pair(self, pair: MatchPair) -> Tensor:
        attached = (pair.embeds.float().sum() + pair.known.float().sum()) * 0.0
        if not len(pair.ids):
            return attached
        targets = match_targets(pair.ids, pair.known_ids)
        loss = F.cross_entropy(self.logits(pair.embeds, pair.known), targets, reduction="sum")
        count = len(targets) if self.normalizer == "positives" else (targets > 0).sum().clamp(min=1)
        return loss / count + attached


def match_targets(ids: Tensor, known_ids: Tensor) -> Tensor:
    """(m,) columns of the right answers: 1 + place among ``known_ids`` (n,), or 0 for an id that is not there."""
    same = ids[:, None] == known_ids[None]
    if not len(known_ids):
        return torch.zeros_like(ids)
    return torch.where(same.any(dim=1), same.int().argmax(dim=1) + 1, 0)
