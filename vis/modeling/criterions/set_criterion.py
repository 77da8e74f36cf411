"""The set criterion of the Mask2Former family (Cheng et al., CVPR 2022, section 3.3), without all dense masks.

A mask logit is the inner product of a query's mask embedding with the mask features, and bilinear sampling is linear.
So matching samples the *features* at the points once per image and multiplies them with the embeddings of all layers,
and only matched queries ever get a dense mask. The numbers are those of the dense computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vis.layers.effective_batch import effective_mean
from vis.layers.item_streams import of_item
from vis.layers.points import sample_points
from vis.modeling.criterions.mask_criterion import MaskCriterion, MaskTargets
from vis.modeling.matchers.hungarian import Pairs
from vis.modeling.transformer_decoders.masked import DecoderOutput

__all__ = ["MaskTargets", "SetCriterion"]


class SetCriterion(MaskCriterion):
    """Classification, mask and dice loss of the final prediction and of every auxiliary one."""

    def forward(self, outputs: DecoderOutput, targets: Sequence[MaskTargets]) -> dict[str, Tensor]:
        """Weighted losses of N images: ``loss_ce``, ``loss_mask``, ``loss_dice``, and with ``_{i}`` per layer."""
        return self.losses_and_matches(outputs, targets)[0]

    def losses_and_matches(
        self, outputs: DecoderOutput, targets: Sequence[MaskTargets]
    ) -> tuple[dict[str, Tensor], list[list[Pairs]]]:
        """The losses, and image -> layer -> pairs (queries, instances), the final layer last."""
        layers = [*outputs["aux_outputs"], outputs]
        class_logits = torch.stack([layer["pred_logits"] for layer in layers]).float()  # (layers, N, Q, K+1)
        mask_embeds = torch.stack([layer["mask_embeds"] for layer in layers])  # (layers, N, Q, C)
        features = outputs["mask_features"]
        matches = self.matches(class_logits, mask_embeds, features, targets)
        num_masks = effective_mean("masks", sum(len(target.labels) for target in targets), class_logits.device)
        ce = self.class_losses(class_logits, [target.labels for target in targets], matches, name="classes")
        mask, dice = self.image_losses(mask_embeds, features, targets, matches, num_masks)
        return self.weighted(ce, mask, dice), matches

    def matches(
        self, class_logits: Tensor, mask_embeds: Tensor, features: Tensor, targets: Sequence[MaskTargets]
    ) -> list[list[Pairs]]:
        """What :meth:`match` gives for each of N images: (layers, N, Q, .), features (N, C, h, w)."""
        found = []
        for i, target in enumerate(targets):
            with of_item(i, len(targets)):
                found.append(self.match(class_logits[:, i], mask_embeds[:, i], features[i], target))
        return found

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
