"""The criterions of DVIS: of the referring tracker and of the temporal refiner (Zhang et al., ICCV 2023, section 3.4).

Both give one query to an instance for the whole clip. In the first half of a training ("guided") the frozen stage
before says which query that is, since the new stage's own predictions mean nothing yet; afterwards its own do.

Losses are those of each video of the batch alone, averaged over the videos of the process. The number of masks of a
video that mask losses are divided by is the mean over the parts of a batch (the processes, where gradients are not
accumulated); under ``SOLVER.NORMALIZER "effective_batch"`` that over all videos of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from vis.config import declare
from vis.layers.effective_batch import effective_mean_of_items
from vis.layers.item_streams import of_item
from vis.modeling.criterions.clip_matching import match_by_first_appearance, match_stacked
from vis.modeling.criterions.mask_criterion import MaskCriterion, MaskTargets, attached_zero
from vis.modeling.losses.contrastive import adjacent_frames_loss, whole_track_loss
from vis.modeling.losses.masks import dice_loss, sigmoid_ce_loss
from vis.modeling.matchers.hungarian import Pairs
from vis.structures import ClipTargets, RefinerOutput, SegmenterClip, TrackerOutput

#: Weight of DVIS++'s contrastive losses of tracker and refiner.
CONTRASTIVE_WEIGHT = 2.0
#: Embeddings, of single frames of earlier videos, that the refiner's contrastive loss keeps of each class.
MEMORY_PER_CLASS = 20


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.CLIP_CRITERION = type(cfg)()
    # As the matcher of DVIS' first release: a query may be given to two instances that enter in different frames.
    cfg.MODEL.CLIP_CRITERION.RELEASED_MATCHER = False
    # As the data mapper of that release labels a clip: an instance that is absent in the last frame is trained as no
    # object. Its matcher and losses have no part in it, so a released yaml does not set it; for who wants to train as
    # the release did, mistakes included.
    cfg.MODEL.CLIP_CRITERION.RELEASED_LABELS = False
    # Contrastive losses of DVIS++ on the tracker's references and on the refiner's embeddings (released: USE_CL).
    cfg.MODEL.CLIP_CRITERION.TRACKER_CONTRASTIVE = False
    cfg.MODEL.CLIP_CRITERION.REFINER_CONTRASTIVE = False


class ClipCriterion(MaskCriterion):
    """What the two have in common: targets as they are matched, and means over the videos."""

    @configurable
    def __init__(self, *, released_labels: bool = False, contrastive_weight: float = 0.0, **options: Any) -> None:
        """Args:
        released_labels: an instance that is absent in the last frame is no object, in matching and losses.
        contrastive_weight: of ``loss_reid``, 0 for none.
        options: of :class:`MaskCriterion`.
        """
        super().__init__(**options)
        self.released_labels = released_labels
        self.contrastive_weight = contrastive_weight

    def _labels(self, target: ClipTargets) -> Tensor:
        if not self.released_labels:
            return target.labels
        return target.labels.masked_fill(target.ids[:, -1] == -1, self.num_classes)

    def _targets(self, targets: Sequence[ClipTargets]) -> list[ClipTargets]:
        return [ClipTargets(self._labels(target), target.ids, target.masks) for target in targets]


def _mean(videos: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([losses[name] for losses in videos]).mean() for name in videos[0]}


class TrackerCriterion(ClipCriterion):
    """Losses of the tracker: every frame is an image, the pairs are those of the whole clip."""

    @configurable
    def __init__(self, *, released_matcher: bool = False, **options: Any) -> None:
        """Args:
        released_matcher: a query may be given to instances that enter in different frames.
        options: those of :class:`ClipCriterion`.
        """
        super().__init__(**options)
        self.released_matcher = released_matcher

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.CLIP_CRITERION
        return {
            **super().from_config(cfg),
            "released_matcher": node.RELEASED_MATCHER,
            "released_labels": node.RELEASED_LABELS,
            "contrastive_weight": CONTRASTIVE_WEIGHT * node.TRACKER_CONTRASTIVE,
        }

    def forward(
        self, tracker: TrackerOutput, segmenter: SegmenterClip, targets: Sequence[ClipTargets], *, guided: bool
    ) -> dict[str, Tensor]:
        """Weighted losses of B videos: ``loss_ce``, ``loss_mask``, ``loss_dice`` and with ``_{i}`` of earlier layers.

        With a contrastive weight also ``loss_reid``.

        Args:
            segmenter: what the tracker worked on; read where ``guided``.
            guided: the segmenter's masks and classes, in the order the tracker started from, choose the queries.

        Raises:
            ValueError: a contrastive loss is asked of a tracker that gives no references.
        """
        targets = self._targets(targets)
        counts = [target.masks.shape[0] * target.masks.shape[1] for target in targets]
        num_masks = effective_mean_of_items("clip.masks", counts, tracker.pred_logits.device)
        videos = []
        for b, (target, count) in enumerate(zip(targets, num_masks, strict=True)):
            with of_item(b, len(targets)):
                videos.append(self._video(tracker, segmenter, b, target, count, guided))
        return _mean(videos)

    def _video(
        self, tracker: TrackerOutput, segmenter: SegmenterClip, b: int, target: ClipTargets, count: Tensor, guided: bool
    ) -> dict[str, Tensor]:
        logits, mask_embeds = tracker.pred_logits[:, b], tracker.mask_embeds[:, b]  # (L, T, Q, .)
        features = tracker.mask_features[b]
        if guided:
            order = tracker.order[b]
            pairs = self._match(
                _in_order(segmenter.pred_logits[b], order)[None],
                _in_order(segmenter.mask_embeds[b], order)[None],
                segmenter.mask_features[b],
                target,
            ) * len(logits)
        else:
            pairs = self._match(logits, mask_embeds, features, target)
        num_frames = len(features)
        frames = [MaskTargets(target.labels, target.masks[:, t]) for t in range(num_frames)]
        matches = [pairs] * num_frames
        ce = self.class_losses(logits, [target.labels.cpu()] * num_frames, matches)  # from the device once
        losses = self.weighted(ce, *self.image_losses(mask_embeds, features, frames, matches, count))
        if self.contrastive_weight:
            if tracker.references is None:
                raise ValueError(
                    "MODEL.CLIP_CRITERION.TRACKER_CONTRASTIVE is True, but this tracker has no references: the loss is "
                    "for the tracker of DVIS++"
                )
            queries = pairs[-1][0].to(logits.device)
            reid = adjacent_frames_loss(tracker.references[b], queries)
            losses["loss_reid"] = self.contrastive_weight * reid
        return losses

    def _match(self, logits: Tensor, mask_embeds: Tensor, features: Tensor, target: ClipTargets) -> list[Pairs]:
        return match_by_first_appearance(
            logits,
            mask_embeds,
            features,
            target,
            matcher=self.matcher,
            num_points=self.num_points,
            block_used=not self.released_matcher,
        )


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """(T, Q, C) with the queries of every frame in ``order`` (T, Q)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


class RefinerCriterion(ClipCriterion):
    """Losses of the refiner: the T frames, one below the other, are one tall image with one class per track."""

    @configurable
    def __init__(self, **options: Any) -> None:
        """Args: those of :class:`ClipCriterion`."""
        super().__init__(**options)
        self._memory: dict[int, Tensor] = {}  # class: (m, C) float32

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.CLIP_CRITERION
        return {
            **super().from_config(cfg),
            "released_labels": node.RELEASED_LABELS,
            "contrastive_weight": CONTRASTIVE_WEIGHT * node.REFINER_CONTRASTIVE,
        }

    def forward(
        self, refiner: RefinerOutput, tracker: TrackerOutput, targets: Sequence[ClipTargets], *, guided: bool
    ) -> dict[str, Tensor]:
        """Weighted losses of B videos, named as :meth:`TrackerCriterion.forward` names them.

        Args:
            tracker: what the refiner worked on.
            guided: the tracker's masks, and its classes averaged over time, choose the queries.
        """
        targets = self._targets(targets)
        counts = [len(target.labels) for target in targets]
        num_masks = effective_mean_of_items("clip.masks", counts, refiner.pred_logits.device)
        videos = []
        for b, (target, count) in enumerate(zip(targets, num_masks, strict=True)):
            with of_item(b, len(targets)):
                videos.append(self._video(refiner, tracker, b, target, count, guided))
        return _mean(videos)

    def _video(
        self, refiner: RefinerOutput, tracker: TrackerOutput, b: int, target: ClipTargets, count: Tensor, guided: bool
    ) -> dict[str, Tensor]:
        logits, mask_embeds = refiner.pred_logits[:, b], refiner.mask_embeds[:, b]  # (L, Q, K+1), (L, T, Q, Cm)
        features = (tracker.mask_features if refiner.mask_features is None else refiner.mask_features)[b]
        guide = logits, mask_embeds, features
        if guided:
            mean = tracker.pred_logits[-1:, b].float().mean(dim=1)
            guide = mean, tracker.mask_embeds[-1:, b], tracker.mask_features[b]
        pairs = match_stacked(*guide, target, matcher=self.matcher, num_points=self.num_points)
        pairs = pairs * (len(logits) // len(pairs))
        ce = self.class_losses(logits[:, None], [target.labels], [pairs])
        losses = self.weighted(ce, *self._stack_losses(mask_embeds, features, target, pairs, count))
        if self.contrastive_weight:
            reid = self._contrastive(refiner.pred_embeds[b], pairs[-1], target)
            losses["loss_reid"] = self.contrastive_weight * reid
        return losses

    def _stack_losses(
        self, mask_embeds: Tensor, features: Tensor, target: ClipTargets, pairs: Sequence[Pairs], num_masks: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mask and dice loss of each layer on T times as many points, layer by layer: a stack is large."""
        if not len(target.labels):
            zero = attached_zero(mask_embeds, features)
            return [zero] * len(mask_embeds), [zero] * len(mask_embeds)
        num_frames, height, width = len(features), *features.shape[-2:]
        mask_sum, dice_sum = [], []
        for embeds, (queries, instances) in zip(mask_embeds, pairs, strict=True):
            rows = embeds[:, queries.to(embeds.device)] @ features.flatten(2)  # (T, n, h*w)
            stack = rows.transpose(0, 1).reshape(len(queries), num_frames * height, width)
            predicted, wanted = self.sample_masks(
                stack, target.masks.flatten(1, 2), instances.to(embeds.device), self.num_points * num_frames
            )
            mask_sum.append(sigmoid_ce_loss(predicted, wanted, num_masks))
            dice_sum.append(dice_loss(predicted, wanted, num_masks))
        return mask_sum, dice_sum

    def _contrastive(self, embeds: Tensor, pairs: Pairs, target: ClipTargets) -> Tensor:
        """The loss against the clip and the memory; then the clip's tracks are remembered, each frame on its own.

        The memory is no part of a checkpoint: it fills again within a few dozen videos after a training is resumed.
        """
        queries, instances = pairs
        labels = target.labels.cpu()[instances].tolist()
        none = embeds.new_zeros(0, embeds.shape[-1])
        loss = whole_track_loss(embeds, queries.to(embeds.device), [self._memory.get(c, none) for c in labels])
        # A pass without gradients only counts (vis.layers.effective_batch), and comes again.
        for query, label in zip(queries.tolist(), labels, strict=True) if torch.is_grad_enabled() else ():
            self._remember(label, embeds[:, query].detach().float())
        return loss

    def _remember(self, label: int, embeds: Tensor) -> None:
        """Add (T, C) embeddings to those of a class; of more than there is room for, random ones stay."""
        known = torch.cat([self._memory[label], embeds]) if label in self._memory else embeds
        if len(known) > MEMORY_PER_CLASS:
            known = known[torch.randperm(len(known))[:MEMORY_PER_CLASS].to(known.device)]
        self._memory[label] = known.clone()
