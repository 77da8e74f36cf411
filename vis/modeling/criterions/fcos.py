"""Targets and losses of FCOS with masks by CondInst and identities by IAI.

FCOS (Tian et al., ICCV 2019, section 3); positives lie around an instance's centre of mass and masks have a dice loss
(Tian et al., CondInst, ECCV 2020); the id loss is Zhu et al., IAI, ECCV 2022, section 3.3 and table 7.

Frames are normalised in groups: IAI treats the time steps of a clip one after the other, each with its own number of
positives, and takes the mean over time. Here all frames run at once, and sums are kept apart by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vis.layers.effective_batch import effective_mean
from vis.modeling.heads.condinst import dynamic_logits
from vis.modeling.heads.fcos import FCOSOutputs, Locations, grid_locations, locations_of, rows
from vis.modeling.losses.boxes import overlaps
from vis.modeling.losses.focal import sigmoid_focal_loss

ID_LOSSES = ("focal", "ce")
#: Largest distance to a side, by level; both ends belong to a level.
RANGES = (64.0, 128.0, 256.0, 512.0, 1e8)
#: Half the size of the region of positives, in strides.
CENTER_RADIUS = 1.5
#: Ground-truth masks are read at the centres of the cells of the predicted ones.
MASK_STRIDE = 4


@dataclass
class Assignment:
    """The m positives of N frames, in the order of frames and locations.

    Attributes:
        frames, locations: (m,) int64 each; instances: (m,) int64 of the frame's targets; boxes: (m, 4) distances.
        labels: (N, L) int64 classes, K is background; ids: (N, L) int64, I is background, or None without ids.
    """

    frames: Tensor
    locations: Tensor
    instances: Tensor
    boxes: Tensor
    labels: Tensor
    ids: Tensor | None


def mass_centres(masks: Tensor) -> Tensor:
    """(n, H, W) bool -> (n, 2) means of the pixels' x and y, counted from 0; 0 for an empty mask."""
    columns, lines = (masks.sum(dim=axis, dtype=torch.float32) for axis in (1, 2))  # (n, W), (n, H)
    mass = columns.sum(dim=1).clamp(min=1e-6)
    x = columns @ torch.arange(masks.shape[2], device=masks.device, dtype=torch.float32)
    y = lines @ torch.arange(masks.shape[1], device=masks.device, dtype=torch.float32)
    return torch.stack([x / mass, y / mass], dim=1)


def assign_locations(
    locations: Locations, boxes: Tensor, centres: Tensor, ranges: Sequence[float] = RANGES
) -> tuple[Tensor, Tensor]:
    """The instance that each of L locations answers for, in N frames at once.

    A location does if it lies inside the instance's box and within 1.5 strides of its centre, and if the farthest side
    of the box is in the range of its level; of several instances for the one with the smallest box.

    Args:
        boxes: (N, n, 4) x0, y0, x1, y1; one without an extent has no locations. centres: (N, n, 2). n is at least 1.
        ranges: upper ends, by level.

    Returns:
        (N, L) int64, -1 where there is none, and (N, L, 4) distances to the left, top, right and bottom of its box.
    """
    points = locations.points[:, None]  # (L, 1, 2)
    distances = torch.cat([points - boxes[:, None, :, :2], boxes[:, None, :, 2:] - points], dim=-1)  # (N, L, n, 4)
    offset = (points - centres[:, None]).abs().amax(dim=-1)
    inside = (offset < CENTER_RADIUS * locations.strides[:, None]) & (distances.amin(dim=-1) > 0)
    ends = distances.new_tensor([-1.0, *ranges])
    farthest = distances.amax(dim=-1)
    fits = (farthest >= ends[locations.levels, None]) & (farthest <= ends[locations.levels + 1, None])
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    best, chosen = torch.where(inside & fits, areas[:, None], float("inf")).min(dim=2)
    distances = distances.gather(2, chosen[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    return torch.where(best.isinf(), -1, chosen), distances


def centerness(boxes: Tensor) -> Tensor:
    """(m, 4) distances to left, top, right, bottom -> (m,), 1 in the middle of a box and 0 at its sides."""
    horizontal, vertical = boxes[:, 0::2], boxes[:, 1::2]
    ratio = [side.amin(dim=1) / side.amax(dim=1) for side in (horizontal, vertical)]
    return (ratio[0] * ratio[1]).clamp(min=0).sqrt()


class FCOSCriterion(nn.Module):
    """Unweighted losses; holds no parameters."""

    def __init__(
        self,
        *,
        num_classes: int,
        num_ids: int = 0,
        id_loss: str = "focal",
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        ranges: Sequence[float] = RANGES,
        max_positives: int = 0,
    ) -> None:
        """Args:
        num_ids: channels of the id branch, 0: none.
        id_loss: "focal", over sigmoids of each id, or "ce", over the softmax of the ids and a background of logit 0.
        max_positives: masks of at most so many positives of a frame are trained, those of the best scores of each
            instance; 0: all.

        Raises:
            ValueError: ``id_loss`` is another word.
        """
        super().__init__()
        if id_loss not in ID_LOSSES:
            raise ValueError(f"the id loss is {id_loss!r}, expected one of {ID_LOSSES}")
        if max_positives < 0:
            raise ValueError(f"MODEL.CONDINST.MAX_POSITIVES is {max_positives}, expected 0 (all) or more")
        self.num_classes, self.num_ids, self.id_loss = num_classes, num_ids, id_loss
        self.strides, self.ranges, self.max_positives = tuple(strides), tuple(ranges), max_positives

    @torch.no_grad()
    def assign(self, locations: Locations, targets: Sequence[Instances]) -> Assignment:
        """Targets of N frames, as :meth:`~vis.modeling.detectors.base.Detector.losses` takes them."""
        counts = [len(target) for target in targets]
        centres = mass_centres(torch.cat([target.gt_masks.tensor for target in targets])).split(counts)
        instances, distances = assign_locations(
            locations, _padded([target.gt_boxes.tensor.float() for target in targets]), _padded(centres), self.ranges
        )
        frames, places = (instances >= 0).nonzero(as_tuple=True)
        classes = [target.gt_classes for target in targets]
        return Assignment(
            frames=frames,
            locations=places,
            instances=instances[frames, places],
            boxes=distances[frames, places],
            labels=_values(instances, classes, self.num_classes),
            ids=_values(instances, [x.gt_head_ids for x in targets], self.num_ids) if self.num_ids else None,
        )

    def forward(
        self,
        outputs: FCOSOutputs,
        features: Tensor,
        targets: Sequence[Instances],
        groups: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Assignment]:
        """``loss_cls``, ``loss_bbox``, ``loss_centerness``, ``loss_mask``, with ids ``loss_id``; and the positives.

        Args:
            features: (N, 8, h, w) of the mask branch.
            targets, groups: see :meth:`~vis.modeling.detectors.base.Detector.losses`. All parts of a batch (processes,
                steps) have as many groups. ``loss_mask`` is normalised by the positives of a part, as released.
        """
        locations = locations_of(outputs.logits, self.strides)
        found = self.assign(locations, targets)
        sums, wanted = _GroupSums(groups, len(targets), features.device), centerness(found.boxes)
        positives, weights = (
            effective_mean(name, count, minimum=least)
            for (name, count), least in zip(sums.counts(found.frames, wanted).items(), (1.0, 1e-6), strict=True)
        )
        # In float32: sums over thousands of locations, and boxes in pixels.
        with torch.autocast(device_type=features.device.type, enabled=False):
            losses = {"loss_cls": (sums.of_frames(self._class_losses(outputs, found)) / positives).mean()}
            boxes = rows(outputs.boxes)[found.frames, found.locations].float()
            missed = wanted * (1 - overlaps(_corners(boxes), _corners(found.boxes))[1])
            losses["loss_bbox"] = (sums.of_positives(missed, found.frames) / weights).mean()
            logits = rows(outputs.centerness)[found.frames, found.locations, 0].float()
            entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            losses["loss_centerness"] = (sums.of_positives(entropy, found.frames) / positives).mean()
            if found.ids is not None:
                losses["loss_id"] = (sums.of_frames(self._id_losses(outputs, found.ids)) / positives).mean()
        dice, frames = self._mask_losses(outputs, features, locations, targets, found)
        trained = sums.of_positives(torch.ones_like(dice), frames)
        masks = effective_mean(f"fcos.masks.{sums.first}", trained, of_part=True)
        losses["loss_mask"] = (sums.of_positives(dice, frames) / masks).mean()
        return losses, found

    @torch.no_grad()
    def target_counts(
        self, targets: Sequence[Instances], sizes: Sequence[tuple[int, int]], groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The counts that losses of these frames are divided by, but for those of masks.

        Args:
            sizes: (h, w) of the levels.
        """
        device = targets[0].gt_classes.device
        found = self.assign(grid_locations(sizes, self.strides, device), targets)
        return _GroupSums(groups, len(targets), device).counts(found.frames, centerness(found.boxes))

    def _class_losses(self, outputs: FCOSOutputs, found: Assignment) -> Tensor:
        """(N,) sums."""
        return _focal_sums(rows(outputs.logits).float(), found.labels)

    def _id_losses(self, outputs: FCOSOutputs, ids: Tensor) -> Tensor:
        """(N,) sums over all locations."""
        logits = rows(outputs.ids).float()
        if self.id_loss == "focal":
            return _focal_sums(logits, ids)
        with_background = F.pad(logits, (0, 1))  # (N, L, I+1)
        return F.cross_entropy(with_background.transpose(1, 2), ids, reduction="none").sum(dim=1)

    def _mask_losses(
        self,
        outputs: FCOSOutputs,
        features: Tensor,
        locations: Locations,
        targets: Sequence[Instances],
        found: Assignment,
    ) -> tuple[Tensor, Tensor]:
        """(m,) dice losses of positives, and the frames (m,) that they are of."""
        frames, places, instances = found.frames, found.locations, found.instances
        if self.max_positives:
            kept = self._capped(outputs, found)
            frames, places, instances = frames[kept], places[kept], instances[kept]
        params = rows(outputs.params)[frames, places]
        logits = dynamic_logits(features, params, frames, locations.points[places], locations.strides[places])
        true = _small_masks(targets, frames, instances)
        probabilities = logits.float().sigmoid().flatten(1)
        true = true.flatten(1).to(probabilities.dtype)
        overlap = 2 * (probabilities * true).sum(dim=1)
        total = probabilities.square().sum(dim=1) + true.sum(dim=1)  # the square of 0 or 1 is itself
        return 1 - overlap / (total + 1e-5), frames

    @torch.no_grad()
    def _capped(self, outputs: FCOSOutputs, found: Assignment) -> Tensor:
        """(m,) bool: of each instance of a frame the positives of best score, as many as its share of the frame's."""
        at = (found.frames, found.locations)
        best = rows(outputs.logits)[at].float().amax(dim=1).sigmoid()
        scores = best * rows(outputs.centerness)[at][:, 0].float().sigmoid()
        stride = int(found.instances.max()) + 1 if len(scores) else 1
        key, counts = (found.frames * stride + found.instances).unique(return_inverse=True, return_counts=True)[1:]
        with_some = torch.zeros(len(found.labels), dtype=torch.int64, device=key.device)
        frame_of_key = torch.zeros_like(counts).scatter_(0, key, found.frames)
        with_some.index_add_(0, frame_of_key, torch.ones_like(counts))
        share = (self.max_positives // with_some.clamp(min=1)).clamp(min=1)
        order = scores.argsort(descending=True, stable=True)
        order = order[key[order].argsort(stable=True)]  # by instance, the best first
        rank = torch.arange(len(order), device=key.device) - (counts.cumsum(0) - counts)[key[order]]
        kept = torch.zeros_like(key, dtype=torch.bool)
        kept[order] = rank < share[found.frames[order]]
        return kept


class _GroupSums:
    """Sums by group of frames; ``first`` is the lowest number of a group, 0 without groups."""

    def __init__(self, groups: Tensor | None, num_frames: int, device: torch.device) -> None:
        groups = torch.zeros(num_frames, dtype=torch.int64) if groups is None else groups
        numbers, group_of = groups.cpu().unique(return_inverse=True)
        self.first = int(numbers[0])
        self._group_of, self._count = group_of.to(device), len(numbers)

    def counts(self, frames: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The number (G,) of the positives and the sum (G,) of their weights, by the names of these counts.

        Calls for groups of other numbers in one forward pass have other names.
        """
        return {
            f"fcos.positives.{self.first}": self.of_positives(torch.ones_like(weights), frames),
            f"fcos.centerness.{self.first}": self.of_positives(weights, frames),
        }

    def of_frames(self, values: Tensor) -> Tensor:
        """(N,) -> (G,)."""
        return values.new_zeros(self._count).index_add(0, self._group_of, values)

    def of_positives(self, values: Tensor, frames: Tensor) -> Tensor:
        """(m,) of positives in ``frames`` (m,) -> (G,)."""
        return values.new_zeros(self._count).index_add(0, self._group_of[frames], values)


def id_probabilities(logits: Tensor, id_loss: str) -> Tensor:
    """(..., I) logits of a head that was trained with this loss -> (..., I) probabilities."""
    return logits.sigmoid() if id_loss == "focal" else F.pad(logits, (0, 1)).softmax(dim=-1)[..., :-1]


def _padded(rows_of: Sequence[Tensor], value: float = 0.0) -> Tensor:
    """N tensors (n_i, ...) -> (N, n, ...), n the largest but at least 1."""
    padded = pad_sequence(list(rows_of), batch_first=True, padding_value=value)
    return padded if padded.shape[1] else padded.new_full((len(padded), 1, *padded.shape[2:]), value)


def _values(instances: Tensor, values: Sequence[Tensor], background: int) -> Tensor:
    """(N, L) the value of each location's instance, or the background's."""
    padded = F.pad(_padded(values, background), (0, 1), value=background)
    return padded.gather(1, instances.where(instances >= 0, padded.shape[1] - 1))


def _focal_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, L, C) logits, (N, L) labels of which C is background -> (N,)."""
    wanted = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    return sigmoid_focal_loss(logits, wanted).sum(dim=(1, 2))


def _corners(distances: Tensor) -> Tensor:
    """Distances to left, top, right, bottom -> a box around the origin."""
    return torch.cat([-distances[:, :2], distances[:, 2:]], dim=1)


def _small_masks(targets: Sequence[Instances], frames: Tensor, instances: Tensor) -> Tensor:
    """(m, H/4, W/4) bool: the masks of the instances of frames, at the centres of cells of 4 x 4 pixels."""
    start = MASK_STRIDE // 2
    small = [target.gt_masks.tensor[:, start::MASK_STRIDE, start::MASK_STRIDE] for target in targets]
    offsets = torch.tensor([0, *(len(masks) for masks in small[:-1])], device=frames.device).cumsum(0)
    return torch.cat(small)[offsets[frames] + instances]
