"""Tracklets of overlapping windows joined to tracks (Hwang et al., "Direct Association of Object Queries", 2022, 3.4).

The report names its sources, not its numbers: windows are joined as per-clip methods do (IFC, Hwang et al., NeurIPS
2021), by the soft IoU of masks on the frames that two windows share, or with the scores of MaskTrack R-CNN (Yang et
al., ICCV 2019, section 4.2).

No mask is kept. A track's mask logit is the mean over the windows that cover a frame, and every window's is the product
of a mask embedding with the same features: so it is the product of the mean embedding with the features, made when the
frame is written. What grows with a video is, per window, one embedding for each track in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from vis.modeling.matchers.hungarian import linear_assignment

#: Weights of MaskTrack R-CNN's score: detection score, IoU, same class.
_MASKTRACK = (1.0, 2.0, 10.0)


@dataclass
class Tracklets:
    """n queries of one window: probabilities (n, K+1), mask embeddings (n, Cm), similarity embeddings (n, C)."""

    probabilities: Tensor
    mask_embeds: Tensor
    sim_embeds: Tensor

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, rows: Tensor) -> Tracklets:
        return Tracklets(self.probabilities[rows], self.mask_embeds[rows], self.sim_embeds[rows])


@dataclass
class Placed:
    """Tracklets of the frames ``start`` to ``end`` (exclusive): track of each, (n,) int64, and mask embeddings."""

    start: int
    end: int
    tracks: Tensor
    mask_embeds: Tensor


@dataclass
class ClipState:
    """The tracks of one video so far; sums are over the windows in which a track is."""

    windows: list[Placed] = field(default_factory=list)
    probabilities: Tensor | None = None  # (N, K+1) sums
    sim_embeds: Tensor | None = None  # (N, C) sums
    count: Tensor | None = None  # (N,)

    def __len__(self) -> int:
        return 0 if self.count is None else len(self.count)

    def place(self, start: int, end: int, found: Tracklets, tracks: Tensor) -> None:
        """Add tracklets to the tracks of these numbers; numbers from ``len(self)`` on are new tracks."""
        size = max([len(self), *(tracks + 1).tolist()])
        ones = tracks.new_ones(len(tracks), dtype=torch.float32)
        self.probabilities = _added(self.probabilities, found.probabilities, tracks, size)
        self.sim_embeds = _added(self.sim_embeds, found.sim_embeds, tracks, size)
        self.count = _added(self.count, ones, tracks, size)
        self.windows.append(Placed(start, end, tracks, found.mask_embeds))

    def class_probabilities(self) -> Tensor:
        """(N, K): mean over the windows in which a track is, without the column of no object."""
        assert self.probabilities is not None
        assert self.count is not None
        return (self.probabilities / self.count[:, None])[:, :-1]

    def mask_embeds(self, frame: int, tracks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean embeddings (len(tracks), Cm) in a frame, and (len(tracks),) whether the track is in it at all."""
        assert self.windows
        width = self.windows[0].mask_embeds.shape[-1]
        wanted = torch.tensor(list(tracks), dtype=torch.int64, device=self.windows[0].tracks.device)
        total = self.windows[0].mask_embeds.new_zeros(len(wanted), width)
        times = total.new_zeros(len(wanted))
        for window in self.windows:
            if window.start <= frame < window.end:
                same = (wanted[:, None] == window.tracks).to(total)  # at most one 1 in a row
                total, times = total + same @ window.mask_embeds, times + same.sum(dim=1)
        return total / times.clamp(min=1)[:, None], times > 0


def _added(sums: Tensor | None, values: Tensor, rows: Tensor, size: int) -> Tensor:
    total = values.new_zeros(size, *values.shape[1:])
    if sums is not None:
        total[: len(sums)] = sums
    return total.index_add(0, rows, values)


class ClipMatcher:
    """Chooses the queries of a window that are objects, and which track each of them continues."""

    @configurable
    def __init__(self, *, score: str, threshold: float, reid: float, topk: int, max_num: int, min_score: float) -> None:
        """Args:
        score: "ifc", the soft IoU alone; "masktrack", with similarity, detection score and class.
        threshold: "ifc": a soft IoU up to this joins nothing.
        reid: "ifc": a track that shows nothing in the shared frames, or ended long ago, is taken up by a tracklet whose
            similarity (a probability) is at least this; 0: never.
        topk, min_score, max_num: candidates are queries that are more likely some class than no object, and the
            ``topk`` best; of them those with at least ``min_score``, the best ``max_num``.
        """
        if score not in ("ifc", "masktrack"):
            raise ValueError(f'MODEL.VITA.TEST.MATCH is {score!r}, expected "ifc" or "masktrack"')
        if topk < 0 or max_num < 1:
            raise ValueError(f"MODEL.VITA.TEST: CAND_TOPK {topk} must be at least 0 and CAND_MAX {max_num} at least 1")
        self.score, self.threshold, self.reid = score, threshold, reid
        self.topk, self.max_num, self.min_score = topk, max_num, min_score

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.VITA.TEST
        return {
            "score": node.MATCH,
            "threshold": node.MATCH_THR,
            "reid": node.REID_THR,
            "topk": node.CAND_TOPK,
            "max_num": node.CAND_MAX,
            "min_score": node.CAND_SCORE,
        }

    @property
    def needs_overlap(self) -> bool:
        """Whether tracks go on from window to window only over frames that the two share."""
        return self.score != "ifc" or not self.reid

    def candidates(self, found: Tracklets) -> Tracklets:
        """Those of a window's queries that may be objects, best first."""
        scores = found.probabilities[:, :-1].amax(dim=1)
        order = scores.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        chosen = ((scores > found.probabilities[:, -1]) | (rank < self.topk)) & (scores >= self.min_score)
        return found[order[chosen[order]][: self.max_num]]

    def join(self, state: ClipState, found: Tracklets, start: int, end: int, features: Tensor) -> None:
        """Add a window's candidates, frames ``start`` to ``end``, to the tracks; ``features`` (T, Cm, P) are of these.

        Tracklets that continue no track begin new ones.
        """
        tracks = torch.full((len(found),), -1, dtype=torch.int64)
        if len(state) and len(found):
            benefit = self._ifc(state, found, start, features)
            if self.score == "masktrack":
                benefit = self._masktrack(state, found, benefit)
            rows, columns = linear_assignment(-benefit)
            worth = (benefit.cpu()[rows, columns] > 0) & (columns < len(state))
            tracks[rows[worth]] = columns[worth]
        new = tracks < 0
        tracks[new] = len(state) + torch.arange(int(new.sum()))
        state.place(start, end, found, tracks.to(found.mask_embeds.device))

    def _ifc(self, state: ClipState, found: Tracklets, start: int, features: Tensor) -> Tensor:
        """(n, N) soft IoU of tracklets and tracks, mean over a track's windows that share frames; 0 where it is low."""
        shape = len(found), len(state)
        total, times = features.new_zeros(shape), features.new_zeros(shape[1])
        shows = torch.zeros(shape[1], dtype=torch.bool, device=features.device)
        ours = torch.einsum("nc,tcp->ntp", found.mask_embeds, features).sigmoid()  # (n, T, P)
        for window in reversed(state.windows):
            shared = window.end - start
            if shared <= 0:
                break
            if not len(window.tracks):
                continue
            theirs = torch.einsum("nc,tcp->ntp", window.mask_embeds, features[:shared]).sigmoid().flatten(1)
            total[:, window.tracks] += soft_iou(ours[:, :shared].flatten(1), theirs)
            times[window.tracks] += 1
            shows[window.tracks] |= theirs.amax(dim=1) > 0.5
        iou = total / times.clamp(min=1)
        iou = torch.where(iou > self.threshold, iou, 0.0)
        if self.score == "masktrack":
            return torch.where(times > 0, iou, -torch.inf)
        if self.reid:
            # Below every IoU that counts: a track that can be seen is never given away for its likeness.
            like = similarity(found.sim_embeds, state).sigmoid()
            taken_up = torch.where(like >= self.reid, like * 0.5 * max(self.threshold, 1e-6), 0.0)
            iou = torch.where(shows, iou, taken_up)
        return iou

    def _masktrack(self, state: ClipState, found: Tracklets, iou: Tensor) -> Tensor:
        """(n, N + n) scores, the last n columns of a new track each; larger than 0, so that none is refused.

        MaskTrack R-CNN, section 4.2: log p + a log s + b IoU + c [same class], p a softmax over the similarities to the
        tracks and 0 for a new one, whose IoU is 0 and whose class is right.
        """
        by_score, by_iou, by_class = _MASKTRACK
        active = torch.isfinite(iou[0])  # tracks that share frames with the window
        like = similarity(found.sim_embeds, state).masked_fill(~active, -torch.inf)
        log_p = F.pad(like, (0, 1)).log_softmax(dim=1)  # (n, N + 1), the last one new
        log_s = found.probabilities[:, :-1].amax(dim=1).clamp(min=1e-30).log()[:, None]
        same = found.probabilities[:, :-1].argmax(dim=1)[:, None] == state.class_probabilities().argmax(dim=1)
        known = log_p[:, :-1] + by_score * log_s + by_iou * iou + by_class * same
        new = (log_p[:, -1:] + by_score * log_s + by_class).expand(-1, len(found))
        scores = torch.cat([known, new], dim=1)
        floor = scores[torch.isfinite(scores)].amin() - 1.0
        return torch.nan_to_num(scores, neginf=float(floor) - 1e4) - floor


def similarity(sim_embeds: Tensor, state: ClipState) -> Tensor:
    """(n, N): inner products of (n, C) with the mean embeddings of the tracks, logits of "the same object"."""
    assert state.sim_embeds is not None
    assert state.count is not None
    return sim_embeds @ (state.sim_embeds / state.count[:, None]).T


def soft_iou(first: Tensor, second: Tensor) -> Tensor:
    """(n, m) of probabilities (n, P) and (m, P): sum of products over the sum of a + b - ab."""
    shared = first @ second.T
    return shared / (first.sum(dim=1)[:, None] + second.sum(dim=1) - shared + 1e-6)
