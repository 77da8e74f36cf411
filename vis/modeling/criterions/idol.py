"""Losses of IDOL (Wu et al., ECCV 2022, section 3): detection and masks on the key frame, contrast with the reference.

Queries are assigned by SimOTA at every decoder layer anew. Sums are divided by the number of queries that this process
(this part of a batch) assigned, not by a number of instances or of all processes, as in the released code; under
``SOLVER.NORMALIZER "effective_batch"`` by its mean over the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.layers.effective_batch import effective_mean
from vis.layers.item_streams import of_item
from vis.modeling.criterions.mask_criterion import attached_zero
from vis.modeling.heads.contrastive import key_reference_losses
from vis.modeling.heads.deformable_detr import Detections, InstanceDETR
from vis.modeling.losses.boxes import giou_loss, l1_loss
from vis.modeling.losses.focal import sigmoid_focal_loss
from vis.modeling.losses.masks import dice_loss
from vis.modeling.matchers.ota import Assignment, assign, ota_costs
from vis.modeling.transformer_decoders.deformable_detr import stacked_boxes

# Candidates of the queries that are an instance, and of those that are not without doubt something else.
_POSITIVE_CANDIDATES, _COVER_CANDIDATES = 10, 100
#: Ground-truth masks are read at the centres of the predicted cells.
MASK_STRIDE = 4


@dataclass
class FrameTargets:
    """The instances of one frame; key and reference frame of a pair have the same ones in the same order.

    Attributes:
        labels: (M,) int64; boxes: (M, 4) centre and size in shares of the picture without padding.
        masks: (M, H, W) bool, padded as the pictures are; visible: (M,) bool (in a key frame all).
        image_size: (height, width) without padding.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor
    visible: Tensor
    image_size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors of the losses; the auxiliary contrastive loss has 1.5 times that of ``reid``."""

    ce: float
    bbox: float
    giou: float
    mask: float
    dice: float
    reid: float


class IDOLCriterion(nn.Module):
    """Weighted losses of pairs of frames; holds no parameters."""

    @configurable
    def __init__(
        self,
        *,
        weights: LossWeights,
        focal_alpha: float = 0.25,
        deep_supervision: bool = True,
        released_matcher: bool = False,
    ) -> None:
        """Args: ``deep_supervision``: every decoder layer has losses; ``released_matcher``: see :func:`assign`."""
        super().__init__()
        self.weights, self.focal_alpha = weights, focal_alpha
        self.deep_supervision, self.released_matcher = deep_supervision, released_matcher

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.IDOL
        weights = LossWeights(
            ce=node.CLASS_WEIGHT,
            bbox=node.L1_WEIGHT,
            giou=node.GIOU_WEIGHT,
            mask=node.MASK_WEIGHT,
            dice=node.DICE_WEIGHT,
            reid=node.REID_WEIGHT,
        )
        return {
            "weights": weights,
            "focal_alpha": node.FOCAL_ALPHA,
            "deep_supervision": node.DEEP_SUPERVISION,
            "released_matcher": node.RELEASED_MATCHER,
        }

    def forward(
        self, detr: InstanceDETR, found: Detections, keys: Sequence[FrameTargets], references: Sequence[FrameTargets]
    ) -> dict[str, Tensor]:
        """Weighted losses of B pairs: the first of what :meth:`losses_and_matches` gives."""
        return self.losses_and_matches(detr, found, keys, references)[0]

    def losses_and_matches(
        self, detr: InstanceDETR, found: Detections, keys: Sequence[FrameTargets], references: Sequence[FrameTargets]
    ) -> tuple[dict[str, Tensor], list[Assignment], Tensor]:
        """Weighted losses of B pairs, the queries that the last layer assigned in each key frame, and the mask features
        (B, 8, h, w) of the key frames.

        Args:
            found: of 2B frames: key, reference, key, reference ...

        The losses are ``loss_ce``, ``loss_bbox``, ``loss_giou``, ``loss_mask``, ``loss_dice``, the same with ``_{i}``
        for earlier decoder layers, ``loss_reid`` and ``loss_reid_aux``.
        """
        last = len(found.layers) - 1
        features = detr.mask_features([level[::2] for level in found.maps])
        logits = torch.stack([detr.detr.class_logits(layer, i)[::2] for i, layer in enumerate(found.layers)]).float()
        boxes = stacked_boxes(found.layers)[:, ::2]  # (layers, B, Q, 4)
        trained = range(last + 1) if self.deep_supervision else range(last, last + 1)
        of_images = [self._match(logits[:, b], boxes[:, b], target, trained) for b, target in enumerate(keys)]
        losses: dict[str, Tensor] = {}
        matches: list[Assignment] = []
        for layer, assigned in zip(trained, zip(*of_images, strict=True), strict=True):
            matches = list(assigned)
            suffix = "" if layer == last else f"_{layer}"
            assigned_queries = sum(len(match.queries) for match in matches)
            count = effective_mean(f"idol.assigned{suffix}", assigned_queries, features.device, of_part=True)
            detection = self._detection_losses(logits[layer], boxes[layer], keys, matches, count)
            masks = self._mask_losses(detr, found, layer, features, keys, matches, count)
            losses |= {f"{name}{suffix}": value for name, value in (detection | masks).items()}
        contrastive, auxiliary = self._reid_losses(detr, found, references, matches)
        losses["loss_reid"] = self.weights.reid * contrastive
        losses["loss_reid_aux"] = 1.5 * self.weights.reid * auxiliary
        # What nothing reads takes part, or data-parallel training would wait for its gradients forever.
        losses["loss_ce"] = losses["loss_ce"] + attached_zero(features, logits, boxes, *found.unused)
        return losses, matches, features

    def _match(self, logits: Tensor, boxes: Tensor, target: FrameTargets, layers: Sequence[int]) -> list[Assignment]:
        """Of one key frame, for each of ``layers``: logits (all layers, Q, K), boxes (all layers, Q, 4)."""
        costs, ious = ota_costs(logits, boxes, target.labels, target.boxes)
        return [
            assign(costs[i], ious[i], num_candidates=_POSITIVE_CANDIDATES, released=self.released_matcher)
            for i in layers
        ]

    def _detection_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[FrameTargets],
        matches: Sequence[Assignment],
        count: Tensor,
    ) -> dict[str, Tensor]:
        """Class and box losses of one layer: logits (B, Q, K), boxes (B, Q, 4); sums are divided by ``count``."""
        wanted = torch.zeros_like(logits)
        for row, target, (queries, instances, _) in zip(wanted, targets, matches, strict=True):
            row[queries.to(row.device), target.labels[instances.to(row.device)]] = 1.0
        own = torch.cat([row[match.queries] for row, match in zip(boxes, matches, strict=True)])
        true = torch.cat([target.boxes[match.instances] for target, match in zip(targets, matches, strict=True)])
        return {
            "loss_ce": self.weights.ce * sigmoid_focal_loss(logits, wanted, alpha=self.focal_alpha).sum() / count,
            "loss_bbox": self.weights.bbox * l1_loss(own, true) / count,
            "loss_giou": self.weights.giou * giou_loss(own, true) / count,
        }

    def _mask_losses(
        self,
        detr: InstanceDETR,
        found: Detections,
        layer: int,
        features: Tensor,
        targets: Sequence[FrameTargets],
        matches: Sequence[Assignment],
        count: Tensor,
    ) -> dict[str, Tensor]:
        """Focal and dice loss of one layer's masks, decoded for assigned queries alone; features (B, 8, h, w)."""
        decoded = found.layers[layer]
        focal, dice = features.new_zeros(()), features.new_zeros(())
        for b, (target, match) in enumerate(zip(targets, matches, strict=True)):
            queries, points = decoded.queries[2 * b, match.queries], decoded.points[2 * b, match.queries]
            logits = detr.masks(features[b], queries, points, target.image_size).flatten(1)
            start = MASK_STRIDE // 2
            small = target.masks[:, start::MASK_STRIDE, start::MASK_STRIDE].flatten(1)
            true = small[match.instances.to(small.device)].to(logits.dtype)
            focal = focal + sigmoid_focal_loss(logits, true, alpha=self.focal_alpha).mean(dim=1).sum()
            dice = dice + dice_loss(logits, true, 1.0)
        return {"loss_mask": self.weights.mask * focal / count, "loss_dice": self.weights.dice * dice / count}

    def _reid_losses(
        self, detr: InstanceDETR, found: Detections, references: Sequence[FrameTargets], matches: Sequence[Assignment]
    ) -> Tensor:
        """(2,) contrastive and auxiliary loss, means over the instances that both frames show."""
        decoded = found.layers[-1]
        embeds = detr.embeds(decoded.queries).float()  # (2B, Q, C)
        logits = detr.detr.class_logits(decoded, len(found.layers) - 1)[1::2].detach()
        items = []
        for b, (target, match) in enumerate(zip(references, matches, strict=True)):
            visible = target.visible.nonzero()[:, 0]
            cost, iou = ota_costs(
                logits[b], decoded.boxes[2 * b + 1].detach(), target.labels[visible], target.boxes[visible]
            )
            # One after the other: as released, the second sees what the first did to the costs.
            positive, cover = (
                assign(cost, iou, num_candidates=number, released=self.released_matcher)
                for number in (_POSITIVE_CANDIDATES, _COVER_CANDIDATES)
            )
            for row, instance in enumerate(visible.tolist()):
                best = int(match.best[instance])
                if best >= 0:
                    masks = [_rows(side, row, len(cost)).to(embeds.device) for side in (positive, cover)]
                    with of_item(b, len(references)):
                        items.append(key_reference_losses(embeds[2 * b, best], embeds[2 * b + 1], masks[0], ~masks[1]))
        count = effective_mean("idol.pairs", len(items), embeds.device, of_part=True)
        return torch.stack(items).sum(dim=0) / count if items else attached_zero(embeds).expand(2)


def _rows(assignment: Assignment, instance: int, num_queries: int) -> Tensor:
    """(Q,) bool, the queries of one instance."""
    result = torch.zeros(num_queries, dtype=torch.bool)
    result[assignment.queries[assignment.instances == instance]] = True
    return result
