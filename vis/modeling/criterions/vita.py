"""VITA's losses on whole tracklets and the similarity loss (Heo et al., NeurIPS 2022, section 3.3).

A tracklet of T frames is one mask of T pictures: matching reads every frame at the same points, the mask losses read
each frame at points of its own and count all of them together. An instance that is absent in a frame has an empty mask
there. Nothing dense is made but the masks of matched queries, since a mask logit is linear in the mask features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from vis.layers.effective_batch import effective_mean
from vis.layers.item_streams import of_item
from vis.layers.points import sample_points
from vis.modeling.criterions.mask_criterion import MaskCriterion, attached_zero, stacked
from vis.modeling.losses.masks import dice_loss, sigmoid_ce_loss
from vis.modeling.matchers.hungarian import Pairs, linear_assignment
from vis.modeling.transformer_decoders.vita import VitaOutput
from vis.structures import ClipTargets


class VitaCriterion(MaskCriterion):
    """``loss_vita_{ce,mask,dice}`` of each decoder layer, and ``loss_vita_sim`` of the last."""

    @configurable
    def __init__(self, *, sim_weight: float, sim_use_clip: bool, **options: Any) -> None:
        """Args: ``sim_use_clip``: video queries are compared too, not only those of frames; others: the base's."""
        super().__init__(**options)
        self.sim_weight, self.sim_use_clip = sim_weight, sim_use_clip

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.VITA
        return {
            **super().from_config(cfg),
            "no_object_weight": node.NO_OBJECT_WEIGHT,
            "sim_weight": node.SIM_WEIGHT,
            "sim_use_clip": node.SIM_USE_CLIP,
        }

    def forward(
        self,
        video: VitaOutput,
        features: Tensor,
        targets: Sequence[ClipTargets],
        frame_matches: Sequence[Sequence[Pairs]],
    ) -> dict[str, Tensor]:
        """Weighted losses of B clips of T frames.

        Class loss is a mean over the B clips (and the L copies of a query), mask losses are sums over all instances
        divided by their number on average over the parts of the batch, the similarity loss is a mean over pairs.

        Args:
            features: (B, T, Cm, h, w).
            frame_matches: frame b*T + t -> layer -> pairs (queries, instances), instances counted among those that are
                visible in the frame; the last L layers are those that the module was given.
        """
        depth, copies, clips = video.pred_logits.shape[:3]
        matches = []
        for b, target in enumerate(targets):
            with of_item(b, clips):
                matches.append(self._match(video, features[b], b, target))
        # The L copies of B clips are L*B images of the class loss.
        ce = self.class_losses(
            video.pred_logits.flatten(1, 2),
            [target.labels for target in targets] * copies,
            [[matches[b][d * copies + c] for d in range(depth)] for c in range(copies) for b in range(clips)],
            name="vita.classes",
        )
        count = copies * sum(len(target.labels) for target in targets)
        num_masks = effective_mean("vita.masks", count, features.device)
        of_clips = []
        for b, target in enumerate(targets):
            with of_item(b, clips):
                embeds = video.mask_embeds[:, :, b]
                of_clips.append(self._mask_losses(embeds, features[b], target, matches[b], num_masks))
        terms = torch.stack(of_clips).sum(dim=0)
        named = self.weighted(ce, list(terms[0]), list(terms[1]))
        losses = {name.replace("loss_", "loss_vita_", 1): loss for name, loss in named.items()}
        losses["loss_vita_sim"] = self.sim_weight * self._similarity(video, targets, frame_matches, matches)
        return losses

    @torch.no_grad()
    def _match(self, video: VitaOutput, features: Tensor, b: int, target: ClipTargets) -> list[Pairs]:
        """Pairs (queries, instances) of clip ``b`` of layer d and copy c at d*L + c; features (T, Cm, h, w)."""
        logits = video.pred_logits[:, :, b].flatten(0, 1)  # (D*L, Q, K+1)
        if not len(target.labels):
            none = torch.zeros(0, dtype=torch.int64)
            return [(none, none)] * len(logits)
        num_frames = len(features)
        points = torch.rand(1, self.num_points, 2, device=features.device).expand(num_frames, -1, -1)
        with torch.autocast(device_type=features.device.type, enabled=False):
            sampled = sample_points(features.float(), points).transpose(0, 1).flatten(1)  # (Cm, T*P)
            masks = sample_points(target.masks.transpose(0, 1).float(), points).transpose(0, 1).flatten(1)  # (N, T*P)
            embeds = video.mask_embeds[:, :, b].flatten(0, 1).float()
            costs = torch.stack(
                [self.matcher.cost(logits[i], embeds[i] @ sampled, target.labels, masks) for i in range(len(logits))]
            )
        return [linear_assignment(cost) for cost in costs.cpu()]

    def _mask_losses(
        self, mask_embeds: Tensor, features: Tensor, target: ClipTargets, matches: Sequence[Pairs], num_masks: Tensor
    ) -> Tensor:
        """(2, D): mask and dice loss of each decoder layer for one clip.

        Args:
            mask_embeds: (D, L, Q, Cm); features: (T, Cm, h, w); matches: as :meth:`_match` gives them.
        """
        depth, num_frames = len(mask_embeds), len(features)
        if not len(target.labels):
            return attached_zero(mask_embeds, features).expand(2, depth)
        queries, instances = stacked(matches, features.device)  # (D*L, n)
        chosen = mask_embeds.flatten(0, 1).gather(1, queries[..., None].expand(-1, -1, mask_embeds.shape[-1]))
        maps = torch.einsum("rc,tcp->rtp", chosen.flatten(0, 1), features.flatten(2))  # (D*L*n, T, h*w)
        rows = instances.flatten()[:, None] * num_frames + torch.arange(num_frames, device=features.device)
        predicted, wanted = self.sample_masks(
            maps.flatten(0, 1).unflatten(1, features.shape[-2:]),
            target.masks.flatten(0, 1),
            rows.flatten(),
            self.num_points,
        )  # (D*L*n*T, P)
        per_layer = [x.view(depth, -1, num_frames * self.num_points) for x in (predicted, wanted)]
        pairs = list(zip(*per_layer, strict=True))
        mask = [sigmoid_ce_loss(logits, masks, num_masks) for logits, masks in pairs]
        dice = [dice_loss(logits, masks, num_masks) for logits, masks in pairs]
        return torch.stack([torch.stack(mask), torch.stack(dice)])

    def _similarity(
        self,
        video: VitaOutput,
        targets: Sequence[ClipTargets],
        frame_matches: Sequence[Sequence[Pairs]],
        matches: Sequence[Sequence[Pairs]],
    ) -> Tensor:
        """Binary cross entropy of the inner products of embeddings of one clip and copy: 1 for those of one instance.

        Released code tells the clips apart by adding 1000 to the ids, which mixes them where ids lie further apart.
        """
        assert video.frame_embeds is not None
        copies, _, num_frames = video.frame_embeds.shape[:3]
        total, count = attached_zero(video.frame_embeds, video.clip_embeds), 0
        for b, target in enumerate(targets):
            visible = [(ids != -1).nonzero()[:, 0] for ids in target.ids.cpu().T]
            for c in range(copies):
                embeds, owners = [], []
                for t in range(num_frames):
                    queries, rows = frame_matches[b * num_frames + t][c - copies]
                    embeds.append(video.frame_embeds[c, b, t, queries])
                    owners.append(visible[t][rows])
                if self.sim_use_clip:
                    queries, instances = matches[b][c - copies]
                    embeds.append(video.clip_embeds[c, b, queries])
                    owners.append(instances)
                owner = torch.cat(owners).to(total.device)
                total = total + _pairwise_ce(torch.cat(embeds), owner[:, None] == owner)
                count += len(owner) ** 2
        return total / (effective_mean("vita.pairs", count, total.device, of_part=True, minimum=0.0) + 1e-6)


def _pairwise_ce(embeds: Tensor, same: Tensor) -> Tensor:
    """Sum of the binary cross entropy of all inner products of (n, C), the diagonal too; float32."""
    with torch.autocast(device_type=embeds.device.type, enabled=False):
        embeds = embeds.float()
        return F.binary_cross_entropy_with_logits(embeds @ embeds.T, same.float(), reduction="sum")
