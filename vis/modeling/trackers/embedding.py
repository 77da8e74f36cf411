"""MaskTrack R-CNN's association (Yang et al., ICCV 2019, section 4.2): a queue with one entry for each known object.

The score of detection i being object j, and of it being new, is

    log softmax_j([0, f_i g_1, ..., f_i g_n]) + a log s_i + b IoU(box_i, box_j) + c [class_i = class_j]
    log softmax_0([0, f_i g_1, ..., f_i g_n]) + a log s_i                       + c

with (a, b, c) = (1, 2, 10). As published every detection takes its best column. Two that want one object are settled by
the score: detections come best first, and a later one takes the object over only with a better score. The release
writes both under one id and its results keep the last of them; here the first is dropped at that moment, which gives
the same results. Later code (mmtracking) forgets objects, and lets the remembered class follow the detections.

``assignment`` "hungarian" gives the detections of a frame the objects that are best in sum instead. ``score`` "cosine"
is that of CondInst with embeddings (CrossVIS, Yang et al., ICCV 2021): cosine plus IoU among objects of the
detection's class, and new below a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor, nn

from vis.modeling.heads.track_embedding import MatchLogits
from vis.modeling.matchers.hungarian import linear_assignment
from vis.modeling.registry import TRACKER_REGISTRY

ASSIGNMENTS = ("greedy", "hungarian")
SCORES = ("masktrack", "cosine")
# In place of a score of -inf, with which neither sums nor assignments can be compared.
_NEVER = -1e6


@dataclass
class TrackedDetections:
    """n detections of one frame, best first.

    Attributes:
        boxes: (n, 4) x0, y0, x1, y1; scores: (n,) above 0; labels: (n,) int64; embeds: (n, C).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    embeds: Tensor


@dataclass
class KnownObject:
    """The entry of an object: embedding (C,), box (4,), class, and the frame that showed it last."""

    embed: Tensor
    box: Tensor
    label: int
    last_frame: int


@dataclass
class EmbeddingState:
    """Memory of one video."""

    frame: int = 0
    next_id: int = 0
    objects: dict[int, KnownObject] = field(default_factory=dict)


@TRACKER_REGISTRY.register()
class EmbeddingTracker(nn.Module):
    """Gives detections the ids of tracks. Without parameters; all that it knows of a video is in its state."""

    @configurable
    def __init__(
        self,
        *,
        logits: MatchLogits,
        score: str = "masktrack",
        coefficients: tuple[float, float, float] = (1.0, 2.0, 10.0),
        threshold: float = 0.4,
        assignment: str = "greedy",
        memory_frames: int = 0,
        update_label: bool = False,
        momentum: float = 1.0,
    ) -> None:
        """Args:
        logits: compares embeddings, as in training.
        score: one of :data:`SCORES`.
        coefficients: of the detection score, the IoU and the same class ("masktrack").
        threshold: of a new object ("cosine").
        assignment: one of :data:`ASSIGNMENTS`.
        memory_frames: an object that was missed in this many frames in a row is forgotten; 0 keeps all.
        update_label: an object's class becomes that of its newest detection; as published it stays the first.
        momentum: share of the newest embedding in what is remembered; 1 as published.
        """
        super().__init__()
        for key, value, known in (("ASSIGNMENT", assignment, ASSIGNMENTS), ("SCORE", score, SCORES)):
            if value not in known:
                raise ValueError(f"MODEL.MASKTRACK.{key} is {value!r}, expected one of {', '.join(known)}")
        if memory_frames < 0 or not 0 < momentum <= 1:
            raise ValueError(
                f"MODEL.MASKTRACK.MEMORY_FRAMES ({memory_frames}) must be at least 0 and EMBED_MOMENTUM ({momentum}) "
                "in (0, 1]"
            )
        self.logits, self.score, self.threshold, self.assignment = logits, score, threshold, assignment
        self.score_weight, self.iou_weight, self.class_weight = coefficients
        self.memory_frames, self.update_label, self.momentum = memory_frames, update_label, momentum

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        node = cfg.MODEL.MASKTRACK
        return {
            "logits": MatchLogits(kind=node.SIMILARITY, temperature=node.TEMPERATURE),
            "score": node.SCORE,
            "coefficients": tuple(node.COEFFICIENTS),
            "threshold": node.NEW_THR,
            "assignment": node.ASSIGNMENT,
            "memory_frames": node.MEMORY_FRAMES,
            "update_label": node.UPDATE_LABEL,
            "momentum": node.EMBED_MOMENTUM,
        }

    @torch.no_grad()
    def forward(self, found: TrackedDetections, state: EmbeddingState | None) -> tuple[list[int], EmbeddingState]:
        """The track id of each detection of the next frame, -1 for one that lost its object to another.

        Args:
            state: what the call of the frame before gave, None for the first frame of a video. It is changed.
        """
        state = EmbeddingState() if state is None else state
        found = TrackedDetections(*(x.detach().cpu() for x in (found.boxes, found.scores, found.labels, found.embeds)))
        ids = [-1] * len(found.scores)
        known = list(state.objects)
        if known and ids:
            scores = self.scores(found, state)
            columns = _greedy(scores) if self.assignment == "greedy" else _hungarian(scores)
        else:
            columns = [0] * len(ids)
        for row, column in enumerate(columns):
            if column == 0:
                ids[row] = state.next_id
                state.next_id += 1
            elif column > 0:
                ids[row] = known[column - 1]
            if ids[row] >= 0:
                self._remember(state, ids[row], found, row)
        if self.memory_frames:
            limit = state.frame - self.memory_frames
            state.objects = {key: item for key, item in state.objects.items() if item.last_frame > limit}
        state.frame += 1
        return ids, state

    def scores(self, found: TrackedDetections, state: EmbeddingState) -> Tensor:
        """(n, 1+m) scores of n detections for a new object (column 0) and the m known ones, in their order."""
        objects = list(state.objects.values())
        known = torch.stack([item.embed for item in objects])
        iou = pairwise_iou(Boxes(found.boxes.float()), Boxes(torch.stack([item.box for item in objects]).float()))
        same = found.labels[:, None] == torch.tensor([item.label for item in objects])[None]
        if self.score == "cosine":
            cosine = F.normalize(found.embeds.float(), dim=1) @ F.normalize(known.float(), dim=1).T
            return F.pad((cosine + iou).masked_fill(~same, _NEVER), (1, 0), value=self.threshold)
        of_objects = F.pad(self.iou_weight * iou, (1, 0)) + self.class_weight * F.pad(same.float(), (1, 0), value=1.0)
        of_detections = self.score_weight * found.scores.float().clamp(min=1e-12).log()[:, None]
        return self.logits(found.embeds, known).log_softmax(dim=1) + of_detections + of_objects

    def _remember(self, state: EmbeddingState, track_id: int, found: TrackedDetections, row: int) -> None:
        embed, box, label = found.embeds[row].float(), found.boxes[row], int(found.labels[row])
        item = state.objects.get(track_id)
        if item is None:
            state.objects[track_id] = KnownObject(embed, box, label, state.frame)
            return
        item.embed = embed if self.momentum == 1 else self.momentum * embed + (1 - self.momentum) * item.embed
        item.box, item.last_frame = box, state.frame
        if self.update_label:
            item.label = label


def _greedy(scores: Tensor) -> list[int]:
    """Every row's best column, 0 as often as wanted; of two rows that want one other column the better, -1 for the
    worse. Of equals the first."""
    columns: list[int] = []
    owner: dict[int, int] = {}
    for row, column in enumerate(scores.argmax(dim=1).tolist()):
        before = owner.get(column)
        if column and before is not None:
            if scores[row, column] <= scores[before, column]:
                columns.append(-1)
                continue
            columns[before] = -1
        owner[column] = row
        columns.append(column)
    return columns


def _hungarian(scores: Tensor) -> list[int]:
    """The columns of the largest sum, each of them once except column 0, which every row may take."""
    rows = len(scores)
    # a column of its own for each row to be new in
    new = torch.full((rows, rows), 2 * _NEVER).fill_diagonal_(0) + scores[:, :1]
    chosen = dict(zip(*(x.tolist() for x in linear_assignment(-torch.cat([scores[:, 1:], new], dim=1))), strict=True))
    known = scores.shape[1] - 1
    return [chosen[row] + 1 if chosen[row] < known else 0 for row in range(rows)]
