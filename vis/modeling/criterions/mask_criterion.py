"""What the criterions of the Mask2Former family share: class loss, point-sampled mask losses, names and weights.

Terms of Cheng et al., Mask2Former, CVPR 2022, section 3.3. A mask logit is the inner product of a query's mask
embedding with the mask features, so only matched queries ever get a dense mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.layers.effective_batch import effective_mean
from vis.layers.item_streams import of_item
from vis.layers.points import sample_points, uncertain_points
from vis.modeling.losses.masks import dice_loss, sigmoid_ce_loss
from vis.modeling.matchers.hungarian import HungarianMatcher, Pairs


@dataclass
class MaskTargets:
    """The instances of one image: ``labels`` (N,) int64 and ``masks`` (N, H, W) bool at the padded size; N may be 0."""

    labels: Tensor
    masks: Tensor


class MaskCriterion(nn.Module):
    """Weights, matcher and losses; a subclass says which prediction answers for which instance."""

    empty_weight: Tensor

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        no_object_weight: float,
        num_points: int,
        oversample_ratio: float,
        importance_ratio: float,
    ) -> None:
        """Args: the last three are those of :func:`~vis.layers.points.uncertain_points`."""
        super().__init__()
        if num_points < 1 or not 0 <= importance_ratio <= min(1, oversample_ratio):
            raise ValueError(
                f"MODEL.MASK_FORMER: TRAIN_NUM_POINTS {num_points} must be at least 1, IMPORTANCE_SAMPLE_RATIO "
                f"{importance_ratio} in 0..1 and OVERSAMPLE_RATIO {oversample_ratio} not below it"
            )
        self.num_classes = num_classes
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.num_points = num_points
        self.oversample_ratio, self.importance_ratio = oversample_ratio, importance_ratio
        self.matcher = HungarianMatcher(class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight)
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.MASK_FORMER
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "class_weight": node.CLASS_WEIGHT,
            "mask_weight": node.MASK_WEIGHT,
            "dice_weight": node.DICE_WEIGHT,
            "no_object_weight": node.NO_OBJECT_WEIGHT,
            "num_points": node.TRAIN_NUM_POINTS,
            "oversample_ratio": node.OVERSAMPLE_RATIO,
            "importance_ratio": node.IMPORTANCE_SAMPLE_RATIO,
        }

    def weighted(self, ce: Sequence[Tensor], mask: Sequence[Tensor], dice: Sequence[Tensor]) -> dict[str, Tensor]:
        """Weighted and named losses of all layers, the last one without a number."""
        losses: dict[str, Tensor] = {}
        for i in range(len(ce)):
            suffix = "" if i == len(ce) - 1 else f"_{i}"
            losses[f"loss_ce{suffix}"] = self.class_weight * ce[i]
            losses[f"loss_mask{suffix}"] = self.mask_weight * mask[i]
            losses[f"loss_dice{suffix}"] = self.dice_weight * dice[i]
        return losses

    def class_losses(
        self, logits: Tensor, labels: Sequence[Tensor], matches: Sequence[Sequence[Pairs]], *, name: str = ""
    ) -> list[Tensor]:
        """Cross entropy of each layer, the mean over N images weighted by class; unmatched queries are no object.

        Args:
            logits: (layers, N, Q, K+1).
            labels: (n,) for each image; matches: image -> layer -> pairs.
            name: of the sums of weights in :func:`~vis.layers.effective_batch.effective_mean`; "": the mean is over
                these images and no others, however the batch is spread.
        """
        classes = torch.full(logits.shape[:3], self.num_classes, dtype=torch.int64)
        for i, (known, layers) in enumerate(zip(labels, matches, strict=True)):
            known = known.cpu()
            for layer, (queries, instances) in enumerate(layers):
                classes[layer, i, queries] = known[instances]
        classes = classes.to(logits.device)
        sums = [
            F.cross_entropy(layer.flatten(0, 1).float(), wanted.flatten(), self.empty_weight.float(), reduction="sum")
            for layer, wanted in zip(logits, classes, strict=True)
        ]
        weights = self.empty_weight.float()[classes].flatten(1).sum(dim=1)  # (layers,)
        if name:
            weights = effective_mean(name, weights, of_part=True, minimum=1e-6)
        return [total / weight for total, weight in zip(sums, weights.clamp(min=1e-6), strict=True)]

    def image_losses(
        self,
        mask_embeds: Tensor,
        features: Tensor,
        targets: Sequence[MaskTargets],
        matches: Sequence[Sequence[Pairs]],
        num_masks: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mask and dice loss of each layer; one pass per image over the matched queries of all layers.

        Args:
            mask_embeds: (layers, N, Q, C); features: (N, C, h, w).
            matches: image -> layer -> pairs; the layers of an image have equally many.
            num_masks: what sums over masks are divided by.
        """
        num_layers = len(mask_embeds)
        zero = mask_embeds.new_zeros((), dtype=torch.float32)
        if not any(len(target.labels) for target in targets):
            zero = attached_zero(mask_embeds, features)
        mask_sum, dice_sum = [zero] * num_layers, [zero] * num_layers
        for i, target in enumerate(targets):
            if not len(target.labels):
                continue
            queries, instances = stacked(matches[i], features.device)
            n = queries.shape[1]
            embeds = mask_embeds[:, i].gather(1, queries[..., None].expand(-1, -1, mask_embeds.shape[-1])).flatten(0, 1)
            logits = (embeds @ features[i].flatten(1)).unflatten(1, features.shape[-2:])  # (layers*n, h, w)
            with of_item(i, len(targets)):
                predicted, wanted = self.sample_masks(logits, target.masks, instances.flatten(), self.num_points)
            for layer in range(num_layers):
                rows = slice(layer * n, (layer + 1) * n)
                mask_sum[layer] = mask_sum[layer] + sigmoid_ce_loss(predicted[rows], wanted[rows], num_masks)
                dice_sum[layer] = dice_sum[layer] + dice_loss(predicted[rows], wanted[rows], num_masks)
        return mask_sum, dice_sum

    def sample_masks(self, logits: Tensor, masks: Tensor, instances: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
        """Logits and ground truth at points of each mask's own, most of them where it is undecided.

        Args:
            logits: (R, h, w); masks: (n, H, W); instances: (R,), which of the masks each row has to become.

        Returns:
            (R, num_points) float32 each.
        """
        logits = logits.float()
        points = uncertain_points(logits, num_points, self.oversample_ratio, self.importance_ratio)
        return sample_points(logits[:, None], points)[:, 0], sample_targets(masks, instances, points)


def stacked(pairs: Sequence[Pairs], device: torch.device) -> Pairs:
    """Pairs of all layers as (layers, n) each."""
    return torch.stack([queries for queries, _ in pairs]).to(device), torch.stack([rows for _, rows in pairs]).to(
        device
    )


def attached_zero(*tensors: Tensor) -> Tensor:
    """0 that is still part of the graph of every tensor.

    A batch without instances must not leave parameters without a gradient: data-parallel training waits for them
    forever.
    """
    return torch.stack([tensor.float().sum() for tensor in tensors]).sum() * 0.0


@torch.no_grad()
def sample_targets(masks: Tensor, instances: Tensor, points: Tensor) -> Tensor:
    """Ground truth (R, P) of ``instances`` (R,) at ``points`` (R, P, 2); each of ``masks`` (n, H, W) is read once."""
    out = points.new_empty(points.shape[:2])
    for instance, mask in enumerate(masks):
        rows = (instances == instance).nonzero()[:, 0]
        if len(rows):
            read = sample_points(mask[None, None].float(), points[rows].flatten(0, 1)[None])
            out[rows] = read.view(len(rows), -1)
    return out
