"""Association with a memory of embeddings (Wu et al., IDOL, ECCV 2022, section 3.3), in two readings.

``released``: the embedding of a track is the mean of its last three, weighted by their scores and, a little, by how new
they are; where several tracks answer to a detection, those with more frames are preferred. ``paper``: weights
1 + T/t of the T embeddings, t = 1 the newest; a track's number of frames is added inside of the softmax over tracks.

A detection and a track answer to one another by the mean of two softmaxes of their products, over tracks and over
detections. With one track in memory the first of them is 1, so the best detection is always linked to it, even after a
cut: ``min_cosine`` above -1 mends that, and is off as released.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.modeling.registry import TRACKER_REGISTRY

ASSOCIATIONS = ("released", "paper")
# Share of the newest embedding in the running one, which replaces the template where `weighted` is off.
_MOMENTUM = 0.8


class FrameDetections(NamedTuple):
    """Of one frame, best first: scores (n,) and embeddings (n, C)."""

    scores: Tensor
    embeds: Tensor


@dataclass
class Tracklet:
    """What is remembered of a track: its last embeddings and scores, oldest first."""

    embeds: list[Tensor]
    scores: list[float]
    running: Tensor
    last_frame: int
    num_frames: int = 1


@dataclass
class MemoryBankState:
    """Memory of one video."""

    frame: int = 0
    next_id: int = 0
    tracklets: dict[int, Tracklet] = field(default_factory=dict)


@TRACKER_REGISTRY.register()
class MemoryBankTracker(nn.Module):
    """Gives detections the ids of tracks. Without parameters; all that it knows of a video is in its state."""

    @configurable
    def __init__(
        self,
        *,
        match_score: float = 0.5,
        first_score: float = 0.2,
        new_score: float = 0.2,
        memory_frames: int = 10,
        memory_length: int = 3,
        weighted: bool = True,
        frame_weight: bool = True,
        association: str = "released",
        min_cosine: float = -1.0,
    ) -> None:
        """Args:
        match_score: a detection is linked above it.
        first_score, new_score: a detection starts a track above it, where the memory is empty, and where it is not.
        memory_frames: a track that was last seen this many frames ago is forgotten.
        memory_length: embeddings of a track that are kept.
        weighted: templates are weighted means of them; else running ones.
        frame_weight: tracks with more frames are preferred where several answer ("released" only).
        association: one of :data:`ASSOCIATIONS`.
        min_cosine: a detection is linked only to a track whose template is at least this similar to it.
        """
        super().__init__()
        if association not in ASSOCIATIONS:
            raise ValueError(f"MODEL.IDOL.ASSOCIATION is {association!r}, expected one of {', '.join(ASSOCIATIONS)}")
        if memory_length < 1 or memory_frames < 1:
            raise ValueError(
                f"MODEL.IDOL.MEMORY_LEN ({memory_length}) and MEMORY_FRAMES ({memory_frames}) must be at least 1"
            )
        self.match_score, self.first_score, self.new_score = match_score, first_score, new_score
        self.memory_frames, self.memory_length = memory_frames, memory_length
        self.weighted, self.frame_weight = weighted, frame_weight
        self.association, self.min_cosine = association, min_cosine

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        node = cfg.MODEL.IDOL
        return {
            "match_score": node.MATCH_SCORE,
            "first_score": node.INIT_SCORE,
            "new_score": node.ADD_NEW_SCORE,
            "memory_frames": node.MEMORY_FRAMES,
            "memory_length": node.MEMORY_LEN,
            "weighted": node.INFERENCE_TW,
            "frame_weight": node.INFERENCE_TW or node.INFERENCE_FW,
            "association": node.ASSOCIATION,
            "min_cosine": node.MIN_COSINE,
        }

    @torch.no_grad()
    def forward(self, detections: FrameDetections, state: MemoryBankState | None) -> tuple[list[int], MemoryBankState]:
        """The track id of each detection of the next frame, -1 for one that is left out.

        Args:
            state: what the call of the frame before gave, None for the first frame of a video. It is changed.
        """
        state = MemoryBankState() if state is None else state
        scores = detections.scores.tolist()
        embeds = detections.embeds.detach().float().cpu()
        ids = self._link(embeds, state) if state.tracklets and scores else [-1] * len(scores)
        threshold = self.new_score if state.tracklets else self.first_score
        for row, above in enumerate((detections.scores > threshold).tolist()):
            if ids[row] < 0 and above:
                ids[row] = state.next_id
                state.next_id += 1
        for track_id, embed, score in zip(ids, embeds, scores, strict=True):
            if track_id >= 0:
                self._remember(state, track_id, embed, score)
        gone = [i for i, x in state.tracklets.items() if state.frame - x.last_frame >= self.memory_frames]
        for track_id in gone:
            del state.tracklets[track_id]
        state.frame += 1
        return ids, state

    def _link(self, embeds: Tensor, state: MemoryBankState) -> list[int]:
        """Ids of the tracks that detections (n, C) are linked to, one detection to a track; -1 for none."""
        tracklets = list(state.tracklets.values())
        templates = torch.stack([self._template(tracklet) for tracklet in tracklets])  # (m, C)
        ages = torch.tensor([float(tracklet.num_frames) for tracklet in tracklets])
        answers = self._answers(embeds @ templates.T, ages)
        if self.min_cosine > -1:
            cosine = F.normalize(embeds, dim=1) @ F.normalize(templates, dim=1).T
            answers = answers.masked_fill(cosine < self.min_cosine, 0.0)
        known, ids = list(state.tracklets), []
        for row in range(len(answers)):
            values = answers[row]
            rivals = values > self.match_score
            if self.frame_weight and self.association == "released" and int(rivals.sum()) > 1:
                values = values * torch.where(rivals, ages, ages[rivals].mean())
            best = int(values.argmax())
            linked = float(values[best]) > self.match_score
            ids.append(known[best] if linked else -1)
            if linked:
                answers[row + 1 :, best] = 0.0
        return ids

    def _template(self, tracklet: Tracklet) -> Tensor:
        """(C,)."""
        if not self.weighted:
            return tracklet.running
        number = len(tracklet.embeds)
        age = torch.arange(1, number + 1, dtype=torch.float32)  # 1 is the oldest
        if self.association == "paper":
            weights = 1 + number / age.flip(0)
        else:
            weights = torch.tensor(tracklet.scores) + age / number
        return (torch.stack(tracklet.embeds) * weights[:, None]).sum(dim=0) / weights.sum()

    def _answers(self, products: Tensor, ages: Tensor) -> Tensor:
        """(n, m) products of detections and tracks -> mean of the softmaxes over tracks and over detections."""
        over_tracks = products.softmax(dim=1)
        if self.association == "paper":
            largest = products.amax(dim=1, keepdim=True).clamp(min=0)
            mass = (products - largest).exp() + ages * (-largest).exp()
            over_tracks = mass / mass.sum(dim=1, keepdim=True)
        return (over_tracks + products.softmax(dim=0)) / 2

    def _remember(self, state: MemoryBankState, track_id: int, embed: Tensor, score: float) -> None:
        tracklet = state.tracklets.get(track_id)
        if tracklet is None:
            state.tracklets[track_id] = Tracklet([embed], [score], embed, state.frame)
            return
        tracklet.embeds = [*tracklet.embeds, embed][-self.memory_length :]
        tracklet.scores = [*tracklet.scores, score][-self.memory_length :]
        tracklet.running = (1 - _MOMENTUM) * tracklet.running + _MOMENTUM * embed
        tracklet.last_frame = state.frame
        tracklet.num_frames += 1
