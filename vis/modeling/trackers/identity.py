"""From the detections of a frame to identities: what IAI does after its heads (Zhu et al., ECCV 2022, section 3.4).

Detections take the pixels that better ones left, are assigned to identities by their id scores, and what is new takes
the next free identity. The id head names one of N channels: N - 1 objects and, as the last, "new". State is a value of
its own for each video; nothing here has parameters.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

logger = logging.getLogger(__name__)

#: In a map of identities: a pixel that is of no channel.
NO_CHANNEL = 255
# Stands for "cannot be" in the scores of an assignment, and still adds up.
_NEVER = -1e6


@dataclass(frozen=True)
class IdentityState:
    """Identities of one video so far.

    Attributes:
        next_id: the next free identity. length: frames seen. left_out: new objects for which none was free.
        boxes: identity -> its last box (4,); labels: identity -> its last class. Kept for :func:`overlap_scores` only.
    """

    next_id: int = 0
    length: int = 0
    left_out: int = 0
    boxes: dict[int, Tensor] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Identified:
    """Of the n detections of a frame: the ids, -1 for what was dropped; whether an object was new; the columns that
    the assignment gave (None in a video's first frame, which has none)."""

    ids: list[int]
    new: bool
    columns: list[int] | None


def visible_parts(masks: Tensor, min_visible: float) -> tuple[Tensor, Tensor]:
    """What of each mask no better one covers.

    Every mask takes its pixels, also one that is then dropped.

    Args:
        masks: (n, H, W) bool, the best first.
        min_visible: a mask of which a smaller share is left is dropped, as is an empty one.

    Returns:
        Kept rows (k,) int64, visible parts (n, H, W) bool of all.
    """
    visible = exclusive(masks)
    area, left = (x.flatten(1).sum(dim=1) for x in (masks, visible))
    kept = (area > 0) & (left.double() / area.clamp(min=1).double() >= min_visible)
    return kept.nonzero()[:, 0], visible


def exclusive(masks: Tensor) -> Tensor:
    """(n, H, W) bool masks without the pixels of those before them."""
    if not len(masks):
        return masks
    # The first row that has a pixel is its owner: `max` of a bool names the first of equals.
    owner = masks.to(torch.uint8).max(dim=0).indices
    rows = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks & (owner == rows)


class IdentityTracker:
    """Steps of the assignment; the two released habits are off unless asked for."""

    def __init__(self, *, num_ids: int, released_overflow: bool = False, released_unassigned: bool = False) -> None:
        """Args:
        num_ids: N, at most 254.
        released_overflow: when identities run out, new objects overwrite one slot (N - 2), which is in no result.
            Otherwise they are dropped, and N - 1 objects have identities.
        released_unassigned: an id that nobody has yet counts as "new" where the head names it. Otherwise it is not
            offered.

        Raises:
            ValueError: a number of channels that cannot be.
        """
        if not 2 <= num_ids < NO_CHANNEL:
            raise ValueError(f"MODEL.IAI.NUM_IDS is {num_ids}, expected 2..{NO_CHANNEL - 1}: objects and 'new'")
        self.num_ids = num_ids
        self.released_overflow, self.released_unassigned = released_overflow, released_unassigned

    @property
    def exported(self) -> int:
        """Identities below this one are in results."""
        return self.num_ids - (2 if self.released_overflow else 1)

    def step(self, scores: Tensor, state: IdentityState) -> tuple[Identified, IdentityState]:
        """The identities of a frame's detections.

        Args:
            scores: (n, N) id scores of the detections, the best detection first; columns 0..N-2 objects, N-1 "new".
        """
        first = state.length == 0
        columns = None if first or not len(scores) else self._columns(scores, state.next_id)
        ids, next_id, new, dropped = [], state.next_id, False, 0
        for row in range(len(scores)):
            column = None if columns is None else columns[row]
            if column is not None and column < state.next_id and column not in ids:
                ids.append(column)
            elif self.released_overflow:
                ids.append(next_id)
                new = new or next_id < self.num_ids - 2
                next_id = min(next_id + 1, self.num_ids - 2)
            elif next_id < self.num_ids - 1:
                ids.append(next_id)
                new, next_id = True, next_id + 1
            else:
                ids.append(-1)
                dropped += 1
        if dropped and not state.left_out:
            logger.info(
                "from frame %d on new objects are left out: the video has more than %d (MODEL.IAI.NUM_IDS)",
                *(state.length, self.num_ids - 1),
            )
        after = replace(state, next_id=next_id, length=state.length + 1, left_out=state.left_out + dropped)
        return Identified(ids, new, columns), after

    def _columns(self, scores: Tensor, next_id: int) -> list[int]:
        """The best assignment of detections to columns: 0..N-1 as scored, N scores zero, then more of "new"."""
        scores = scores.detach().float().cpu()
        count, num_ids = scores.shape
        extra = scores[:, -1:].expand(-1, count - 1)
        if not self.released_unassigned:
            scores = scores.clone()
            scores[:, next_id : num_ids - 1] = _NEVER
        zeros = scores.new_zeros(count, 1) if self.released_unassigned else scores.new_full((count, 1), _NEVER)
        rows, columns = linear_sum_assignment(-torch.cat([scores, zeros, extra], dim=1).numpy())
        assert list(rows) == list(range(count))
        return [int(column) for column in columns]


def identity_map(visible: Tensor, ids: list[int], num_ids: int) -> Tensor:
    """(n, H, W) bool masks that do not overlap -> (H, W) uint8, background ``num_ids``.

    Of two masks with one id the later is written; pixels of the other are of no channel (:data:`NO_CHANNEL`).
    """
    labels = torch.full(visible.shape[1:], num_ids, dtype=torch.uint8, device=visible.device)
    for row, identity in enumerate(ids):
        if identity < 0:
            continue
        if identity in ids[:row]:
            labels[labels == identity] = NO_CHANNEL
        labels[visible[row]] = identity
    return labels


def overlap_scores(boxes: Tensor, classes: Tensor, state: IdentityState, *, num_ids: int, threshold: float) -> Tensor:
    """Id scores without an id head: IoU with the last box of each object of the same class; "new" scores a constant.

    What the paper's rows without the head were tracked with is not known (its Table 4).

    Args:
        boxes: (n, 4) corners; classes: (n,) best class of each detection.
        threshold: the score of "new": an IoU below it does not make a detection an old object.

    Returns:
        (n, N) float32 on the CPU.
    """
    scores = torch.zeros(len(boxes), num_ids)
    scores[:, -1] = threshold
    boxes = boxes.detach().float().cpu()
    for identity, box in state.boxes.items():
        same = classes.cpu() == state.labels[identity]
        scores[:, identity] = torch.where(same, _iou(boxes, box), torch.zeros(()))
    return scores


def remember_boxes(boxes: Tensor, classes: Tensor, ids: list[int], state: IdentityState) -> IdentityState:
    """The state with the boxes and classes of a frame, for :func:`overlap_scores` of the next."""
    places, labels = dict(state.boxes), dict(state.labels)
    for box, label, identity in zip(boxes.detach().float().cpu(), classes.tolist(), ids, strict=True):
        if identity >= 0:
            places[identity], labels[identity] = box, label
    return replace(state, boxes=places, labels=labels)


def _iou(boxes: Tensor, box: Tensor) -> Tensor:
    """(n, 4), (4,) -> (n,)."""
    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    inside = (high - low).clamp(min=0).prod(dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (box[2:] - box[:2]).prod()
    return inside / (areas - inside).clamp(min=1e-6)
