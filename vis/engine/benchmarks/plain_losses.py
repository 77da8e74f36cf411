"""Losses of the Mask2Former family from dense masks, the straightforward way.

Every layer predicts the masks of all queries at a quarter of the frame, keeps them for the backward pass, and is
matched and compared with the ground truth on its own: predictions and ground truth are sampled mask by mask, one
matching and one transfer to the CPU for each image and layer.

Points are random. Ours draws them image by image for all layers together, so they are drawn in that order here too,
before anything else: the same seed gives the same points, and the losses are equal within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.engine.benchmarks.plain import DensePrediction
from vis.layers.effective_batch import effective_mean
from vis.layers.points import sample_points
from vis.modeling.criterions.mask_criterion import MaskCriterion, MaskTargets, attached_zero
from vis.modeling.criterions.set_criterion import SetCriterion
from vis.modeling.losses.masks import dice_loss, sigmoid_ce_loss
from vis.modeling.matchers.hungarian import Pairs, linear_assignment
from vis.modeling.transformer_decoders.masked import DecoderOutput


@dataclass
class Points:
    """Random points of one image: of matching (1, P, 2), and for the R masks of its losses those to choose from, rest.

    ``candidates`` (R, more than P, 2) and ``fresh`` (R, P - important, 2).
    """

    matching: Tensor
    candidates: Tensor
    fresh: Tensor


def draw_points(criterion: MaskCriterion, masks: Sequence[int], device: torch.device) -> list[Points]:
    """Those of images whose losses count so many masks in all layers together; without masks nothing is drawn."""
    num = criterion.num_points
    rest = num - int(criterion.importance_ratio * num)
    candidates = int(num * criterion.oversample_ratio)
    matching = [torch.rand(int(rows > 0), num, 2, device=device) for rows in masks]
    return [
        Points(first, torch.rand(rows, candidates, 2, device=device), torch.rand(rows, rest, 2, device=device))
        for first, rows in zip(matching, masks, strict=True)
    ]


@torch.no_grad()
def match_dense(criterion: MaskCriterion, logits: Tensor, masks: Tensor, labels: Tensor, wanted: Tensor) -> Pairs:
    """Pairs of Q queries with n instances: logits (Q, K+1), masks (Q, P) at the points, wanted (n, P)."""
    masks, wanted = masks.float(), wanted.float()
    positive = F.binary_cross_entropy_with_logits(masks, torch.ones_like(masks), reduction="none")
    negative = F.binary_cross_entropy_with_logits(masks, torch.zeros_like(masks), reduction="none")
    bce = torch.einsum("qp,np->qn", positive, wanted) + torch.einsum("qp,np->qn", negative, 1 - wanted)
    inside = masks.sigmoid()
    both = torch.einsum("qp,np->qn", inside, wanted)
    dice = 1 - (2 * both + 1) / (inside.sum(dim=1)[:, None] + wanted.sum(dim=1) + 1)
    cost = criterion.mask_weight * bce / masks.shape[1] + criterion.dice_weight * dice
    return linear_assignment((cost - criterion.class_weight * logits.float().softmax(dim=-1)[:, labels]).cpu())


def sample_dense(
    criterion: MaskCriterion, logits: Tensor, masks: Tensor, candidates: Tensor, fresh: Tensor
) -> tuple[Tensor, Tensor]:
    """Predictions (R, h, w) and ground truth (R, H, W) at points of each row's own: (R, P) each."""
    logits = logits.float()
    with torch.no_grad():
        uncertainty = -sample_points(logits[:, None], candidates)[:, 0].abs()
        index = uncertainty.topk(criterion.num_points - fresh.shape[1], dim=1).indices
        points = torch.cat([torch.take_along_dim(candidates, index[..., None], dim=1), fresh], dim=1)
        wanted = sample_points(masks[:, None].float(), points)[:, 0]
    return sample_points(logits[:, None], points)[:, 0], wanted


class PlainSetCriterion(SetCriterion):
    """Losses of single frames, layer by layer, from the ``pred_masks`` of a plain decoder."""

    def losses_and_matches(
        self, outputs: DecoderOutput, targets: Sequence[MaskTargets]
    ) -> tuple[dict[str, Tensor], list[list[Pairs]]]:
        """As in the base class."""
        layers = [*outputs["aux_outputs"], outputs]
        sizes = [min(len(target.labels), outputs["pred_logits"].shape[1]) for target in targets]
        points = draw_points(self, [len(layers) * size for size in sizes], outputs["pred_logits"].device)
        num_masks = effective_mean("masks", sum(len(target.labels) for target in targets), points[0].fresh.device)
        ce, mask, dice, matches = [], [], [], []
        for i, layer in enumerate(layers):
            masks = cast(DensePrediction, layer)["pred_masks"]
            pairs = [
                self._match_dense(layer["pred_logits"][n], masks[n], target, points[n])
                for n, target in enumerate(targets)
            ]
            labels = [target.labels for target in targets]
            ce += self.class_losses(layer["pred_logits"][None], labels, [[own] for own in pairs])
            predicted, wanted = self._sample_layer(masks, targets, pairs, points, i)
            mask.append(sigmoid_ce_loss(predicted, wanted, num_masks))
            dice.append(dice_loss(predicted, wanted, num_masks))
            matches.append(pairs)
        return self.weighted(ce, mask, dice), [list(of_image) for of_image in zip(*matches, strict=True)]

    def _match_dense(self, logits: Tensor, masks: Tensor, target: MaskTargets, points: Points) -> Pairs:
        if not len(target.labels):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        with torch.no_grad():
            predicted = sample_points(masks[:, None].float(), points.matching.expand(len(masks), -1, -1))[:, 0]
            every = points.matching.expand(len(target.masks), -1, -1)
            wanted = sample_points(target.masks[:, None].float(), every)[:, 0]
        return match_dense(self, logits, predicted, target.labels, wanted)

    def _sample_layer(
        self,
        masks: Tensor,
        targets: Sequence[MaskTargets],
        pairs: Sequence[Pairs],
        points: Sequence[Points],
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Predictions and ground truth of all images of one layer, (R, P) each."""
        chosen, wanted, candidates, fresh = [], [], [], []
        for n, (queries, instances) in enumerate(pairs):
            own = slice(layer * len(queries), (layer + 1) * len(queries))
            chosen.append(masks[n, queries.to(masks.device)])
            wanted.append(targets[n].masks[instances.to(masks.device)].float())
            candidates.append(points[n].candidates[own])
            fresh.append(points[n].fresh[own])
        together = torch.cat(chosen)
        if not len(together):
            return together.flatten(1) + attached_zero(masks), together.flatten(1)
        return sample_dense(self, together, torch.cat(wanted), torch.cat(candidates), torch.cat(fresh))
