"""CTVIS (Ying et al., "CTVIS: Consistent Training for Online Video Instance Segmentation", ICCV 2023): the segmenter's
losses and, on its re-identification embeddings, a contrastive loss against what a tracker would remember.

Training plays the memory of a tracker through the clip: an instance's embedding in a frame is compared with its average
so far, in which an embedding counts the more, the more it resembles those before. Settings are those that the segmenter
of DVIS++ was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from vis.config import declare
from vis.layers.item_streams import of_item
from vis.modeling.criterions.mask_criterion import MaskTargets
from vis.modeling.criterions.set_criterion import SetCriterion
from vis.modeling.losses.contrastive import contrastive_loss, cosine_loss
from vis.modeling.matchers.hungarian import Pairs
from vis.modeling.transformer_decoders.masked import DecoderOutput
from vis.structures import ClipTargets


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.CL_PLUGIN = node = type(cfg)()
    # Weights of the contrastive loss and of the cosine loss beside it.
    node.REID_WEIGHT = 2.0
    node.AUX_REID_WEIGHT = 3.0
    # Other queries of the frame before that an instance is compared with; at most all but its own.
    node.NUM_NEGATIVES = 99
    # Half of the comparisons are with the running average instead of the latest embedding.
    node.MOMENTUM_EMBED = True


class CTVISCriterion(SetCriterion):
    """Losses of single frames, and ``loss_reid`` and ``loss_aux_reid`` over clips.

    Every frame has all N instances of its clip as targets, those that are absent in it with an empty mask: a query is
    to keep the class of an occluded object and show nothing.
    """

    @configurable
    def __init__(
        self, *, reid_weight: float, aux_reid_weight: float, num_negatives: int, momentum: bool, **options: Any
    ) -> None:
        """Args: those of :func:`add_config`; ``options`` of :class:`~.mask_criterion.MaskCriterion`."""
        super().__init__(**options)
        if num_negatives < 1:
            raise ValueError(f"MODEL.CL_PLUGIN.NUM_NEGATIVES is {num_negatives}, expected at least 1")
        self.reid_weight, self.aux_reid_weight = reid_weight, aux_reid_weight
        self.num_negatives, self.momentum = num_negatives, momentum

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.CL_PLUGIN
        return {
            **super().from_config(cfg),
            "reid_weight": node.REID_WEIGHT,
            "aux_reid_weight": node.AUX_REID_WEIGHT,
            "num_negatives": node.NUM_NEGATIVES,
            "momentum": node.MOMENTUM_EMBED,
        }

    def clip_losses_and_matches(
        self, outputs: DecoderOutput, targets: Sequence[ClipTargets]
    ) -> tuple[dict[str, Tensor], list[Pairs]]:
        """Weighted losses of B clips, whose B*T frames are ``outputs``, clip after clip.

        Returns:
            The losses, and of each frame the pairs (queries, instances) of the final layer with an instance in sight.

        Raises:
            ValueError: the decoder has no reid branch.
        """
        if "reid_embeds" not in outputs:
            raise ValueError("CTVIS trains re-identification embeddings: set MODEL.MASK_FORMER.REID_BRANCH True")
        num_frames = targets[0].masks.shape[1]
        frames = [MaskTargets(clip.labels, clip.masks[:, t]) for clip in targets for t in range(num_frames)]
        losses, matches = self.losses_and_matches(outputs, frames)
        embeds = outputs["reid_embeds"].float().unflatten(0, (len(targets), num_frames))
        clips, seen = [], []
        for b, target in enumerate(targets):
            pairs = [layers[-1] for layers in matches[b * num_frames : (b + 1) * num_frames]]
            visible = target.ids.cpu() != -1  # (N, T)
            with of_item(b, len(targets)):
                clips.append(self._reid(embeds[b], matched_queries(pairs, len(target.labels)), visible))
            for t, (queries, instances) in enumerate(pairs):
                shown = visible[instances, t]
                seen.append((queries[shown], instances[shown]))
        contrastive, cosine = torch.stack(clips).mean(dim=0)
        losses["loss_reid"] = self.reid_weight * contrastive
        losses["loss_aux_reid"] = self.aux_reid_weight * cosine
        return losses, seen

    def _reid(self, embeds: Tensor, queries: Tensor, visible: Tensor) -> Tensor:
        """Contrastive and cosine loss (2,) of one clip, means over its comparisons.

        Args:
            embeds: (T, Q, C); queries: (T, N), the query of each instance, -1 for none; visible: (N, T).
        """
        anchors, keys = [], []
        for instance, seen in enumerate(visible):
            own = queries[:, instance]
            frames = [t for t in seen.nonzero()[:, 0].tolist() if own[t] >= 0]
            track = [embeds[t, own[t]] for t in frames]
            averages = running_averages(track)
            for i, t in enumerate(frames):
                positive = self._positive(track, averages, i)
                if t == 0 or positive is None:
                    continue
                anchors.append(track[i])
                keys.append(
                    torch.cat([positive[None], embeds[t - 1, self._negatives(embeds.shape[1], int(own[t - 1]))]])
                )
        if not anchors:
            return embeds.sum() * embeds.new_zeros(2)
        anchor, key = torch.stack(anchors), torch.stack(keys)  # (M, C), (M, 1 + negatives, C)
        is_positive = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
        is_positive[:, 0] = True
        with torch.autocast(device_type=key.device.type, enabled=False):
            similarity = torch.einsum("mc,mkc->mk", anchor, key)
        contrastive = contrastive_loss(similarity, is_positive, ~is_positive).mean()
        return torch.stack([contrastive, cosine_loss(anchor, key, is_positive).mean()])

    def _positive(self, track: Sequence[Tensor], averages: Sequence[Tensor], i: int) -> Tensor | None:
        """What the i-th sight of an instance is compared with; None where it has no other."""
        if i == 0:
            return track[1] if len(track) > 1 else None
        return averages[i - 1] if self.momentum and float(torch.rand(())) < 0.5 else track[i - 1]

    def _negatives(self, num_queries: int, own: int) -> Tensor:
        """Indices of other queries, the same number whatever ``own`` is (-1: the instance has none in that frame)."""
        others = torch.tensor([query for query in range(num_queries) if query != own])
        return others[torch.randperm(len(others))[: min(self.num_negatives, num_queries - 1)]]


def matched_queries(pairs: Sequence[Pairs], num_instances: int) -> Tensor:
    """(T, N) the query of each instance in each frame, -1 where it has none."""
    result = torch.full((len(pairs), num_instances), -1, dtype=torch.int64)
    for row, (queries, instances) in zip(result, pairs, strict=True):
        row[instances] = queries
    return result


def running_averages(track: Sequence[Tensor]) -> list[Tensor]:
    """After each embedding of ``track`` the average so far: m <- (1 - b) m + b e.

    b is the mean cosine of the new embedding e with all before it, at least 0: one that was taken under occlusion
    resembles the others little and changes little. No gradient goes through b.
    """
    averages: list[Tensor] = []
    for i, embed in enumerate(track):
        if i == 0:
            averages.append(embed)
            continue
        with torch.no_grad():
            share = F.cosine_similarity(embed[None], torch.stack(list(track[:i])), dim=-1).mean().clamp(min=0)
        averages.append((1 - share) * averages[-1] + share * embed)
    return averages
