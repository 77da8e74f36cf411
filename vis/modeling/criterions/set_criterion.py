"""The set criterion of the Mask2Former family (Cheng et al., CVPR 2022, section 3.3), without all dense masks.

A mask logit is the inner product of a query's mask embedding with the mask features, and bilinear sampling is linear.
So matching samples the *features* at the points once per image and multiplies them with the embeddings of all layers,
and only matched queries ever get a dense mask. The numbers are those of the dense computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import Tensor, nn

from vis.layers.points import sample_points, uncertain_points
from vis.modeling.losses.masks import dice_loss, sigmoid_ce_loss
from vis.modeling.matchers.hungarian import HungarianMatcher, Pairs
from vis.modeling.transformer_decoders.masked import DecoderOutput


@dataclass
class MaskTargets:
    """The instances of one image: ``labels`` (N,) int64 and ``masks`` (N, H, W) bool at the padded size; N may be 0."""

    labels: Tensor
    masks: Tensor


class SetCriterion(nn.Module):
    """Classification, mask and dice loss of the final prediction and of every auxiliary one."""

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

    def forward(self, outputs: DecoderOutput, targets: Sequence[MaskTargets]) -> dict[str, Tensor]:
        """Weighted losses of N images: ``loss_ce``, ``loss_mask``, ``loss_dice``, and with ``_{i}`` per layer."""
        layers = [*outputs["aux_outputs"], outputs]
        class_logits = torch.stack([layer["pred_logits"] for layer in layers]).float()  # (layers, N, Q, K+1)
        mask_embeds = torch.stack([layer["mask_embeds"] for layer in layers])  # (layers, N, Q, C)
        matches = [
            self.match(class_logits[:, i], mask_embeds[:, i], outputs["mask_features"][i], target)
            for i, target in enumerate(targets)
        ]  # image -> layer -> pairs
        num_masks = self._num_masks(targets, class_logits.device)
        ce = self._class_losses(class_logits, targets, matches)
        mask, dice = self._mask_losses(mask_embeds, outputs["mask_features"], targets, matches, num_masks)
        losses: dict[str, Tensor] = {}
        for i in range(len(layers)):
            suffix = "" if i == len(layers) - 1 else f"_{i}"
            losses[f"loss_ce{suffix}"] = self.class_weight * ce[i]
            losses[f"loss_mask{suffix}"] = self.mask_weight * mask[i]
            losses[f"loss_dice{suffix}"] = self.dice_weight * dice[i]
        return losses

    @torch.no_grad()
    def match(self, class_logits: Tensor, mask_embeds: Tensor, features: Tensor, target: MaskTargets) -> list[Pairs]:
        """Pairs (queries, instances) for each layer of one image, all layers on the same points.

        Args:
            class_logits: (layers, Q, K+1); mask_embeds: (layers, Q, C); features: (C, h, w).
        """
        if not len(target.labels):
            none = torch.zeros(0, dtype=torch.int64)
            return [(none, none)] * len(class_logits)
        points = torch.rand(1, self.num_points, 2, device=features.device)
        with torch.autocast(device_type=features.device.type, enabled=False):
            sampled = sample_points(features[None].float(), points)[0]  # (C, P)
            masks = sample_points(target.masks[None].float(), points)[0]  # (instances, P)
            return self.matcher(class_logits, mask_embeds.float() @ sampled, target.labels, masks)

    def _num_masks(self, targets: Sequence[MaskTargets], device: torch.device) -> Tensor:
        """Instances per rank, on average over the ranks, at least 1."""
        count = torch.tensor(float(sum(len(target.labels) for target in targets)), device=device)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
        return (count / comm.get_world_size()).clamp(min=1)

    def _class_losses(
        self, logits: Tensor, targets: Sequence[MaskTargets], matches: Sequence[Sequence[Pairs]]
    ) -> list[Tensor]:
        classes = torch.full(logits.shape[:3], self.num_classes, dtype=torch.int64)
        for i, (target, layers) in enumerate(zip(targets, matches, strict=True)):
            labels = target.labels.cpu()
            for layer, (queries, instances) in enumerate(layers):
                classes[layer, i, queries] = labels[instances]
        classes = classes.to(logits.device)
        return [
            F.cross_entropy(layer.flatten(0, 1), wanted.flatten(), self.empty_weight)
            for layer, wanted in zip(logits, classes, strict=True)
        ]

    def _mask_losses(
        self,
        mask_embeds: Tensor,
        features: Tensor,
        targets: Sequence[MaskTargets],
        matches: Sequence[Sequence[Pairs]],
        num_masks: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mask and dice loss of each layer; one pass per image over the matched queries of all layers."""
        num_layers, device = len(mask_embeds), features.device
        zero = mask_embeds.new_zeros((), dtype=torch.float32)
        if not any(len(target.labels) for target in targets):
            # Still attached to every embedding and feature: a batch without instances must not leave parameters
            # without a gradient, or data-parallel training waits for them forever.
            zero = (mask_embeds.float().sum() + features.float().sum()) * 0.0
        mask_sum, dice_sum = [zero] * num_layers, [zero] * num_layers
        for i, target in enumerate(targets):
            if not len(target.labels):
                continue
            queries = torch.stack([q for q, _ in matches[i]]).to(device)  # (layers, n)
            instances = torch.stack([t for _, t in matches[i]]).to(device)
            n = queries.shape[1]
            embeds = mask_embeds[:, i].gather(1, queries[..., None].expand(-1, -1, mask_embeds.shape[-1])).flatten(0, 1)
            logits = (embeds @ features[i].flatten(1)).unflatten(1, features.shape[-2:]).float()  # (layers*n, h, w)
            points = uncertain_points(logits, self.num_points, self.oversample_ratio, self.importance_ratio)
            predicted = sample_points(logits[:, None], points)[:, 0]  # (layers*n, P)
            wanted = self._sample_targets(target.masks, instances, points)
            for layer in range(num_layers):
                rows = slice(layer * n, (layer + 1) * n)
                mask_sum[layer] = mask_sum[layer] + sigmoid_ce_loss(predicted[rows], wanted[rows], num_masks)
                dice_sum[layer] = dice_sum[layer] + dice_loss(predicted[rows], wanted[rows], num_masks)
        return mask_sum, dice_sum

    @staticmethod
    @torch.no_grad()
    def _sample_targets(masks: Tensor, instances: Tensor, points: Tensor) -> Tensor:
        """Ground truth (layers*n, P) at ``points`` (layers*n, P, 2); a mask is read once for all layers."""
        out = points.new_empty(points.shape[:2])
        flat = instances.flatten()
        for instance, mask in enumerate(masks):
            rows = (flat == instance).nonzero()[:, 0]
            if len(rows):
                read = sample_points(mask[None, None].float(), points[rows].flatten(0, 1)[None])
                out[rows] = read.view(len(rows), -1)
        return out
