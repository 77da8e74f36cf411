"""MinVIS (Huang, Yu, Anandkumar, NeurIPS 2022): an image segmenter on single frames, tracked by its own queries.

Training is per frame: every frame of a clip is an image of its own. At test time the queries of consecutive frames are
matched by their embeddings, class logits are averaged over the video, and the best (query, class) pairs are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from vis.modeling.criterions.set_criterion import MaskTargets, SetCriterion
from vis.modeling.heads.build import Heads, HeadTargets, build_heads, matched_rows
from vis.modeling.inference import OnlineTracks, TrackedFrames, VideoModel
from vis.modeling.matchers.hungarian import Pairs
from vis.modeling.registry import TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import check_labels
from vis.modeling.segmenter.frames import pad_masks
from vis.modeling.transformer_decoders.masked import DecoderOutput, predict_masks
from vis.structures import ClipSample


class ScoredState(NamedTuple):
    """State of the tracker, and the sum over frames of what class scores are multiplied by, (Q,) or None."""

    tracker: Any
    factors: Tensor | None


class ScoredTracks(OnlineTracks):
    """Tracks whose class scores are multiplied by the mean over time of what the heads say."""

    def probabilities(self) -> Tensor:
        """(Q, K)."""
        found, factors = super().probabilities(), self._state.factors
        return found if factors is None else found * (factors / len(self))[:, None]


@META_ARCH_REGISTRY.register()
class MinVIS(VideoModel):
    """Segmenter, criterion, a tracker without parameters, and heads that ``MODEL.HEADS`` adds for training."""

    #: See :func:`vis.modeling.heads.build.refuse_unused`.
    TAKES_HEADS: ClassVar[bool] = True
    TWO_STREAMS: ClassVar[bool] = True
    DEFAULTS: ClassVar[dict[str, Any]] = {"MODEL": {"TRACKER": {"NAME": "QueryMatchingTracker"}}}

    @configurable
    def __init__(
        self, *, criterion: SetCriterion, tracker: nn.Module, heads: Heads | None = None, **options: Any
    ) -> None:
        """Args: ``options`` of :class:`~vis.modeling.inference.VideoModel`."""
        super().__init__(**options)
        self.criterion = criterion
        self.heads = Heads([]) if heads is None else heads
        self.tracker = tracker

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            **super().from_config(cfg),
            "criterion": SetCriterion(cfg),
            "heads": build_heads(
                cfg, embed_dim=cfg.MODEL.MASK_FORMER.HIDDEN_DIM, feature_dim=cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
            ),
            "tracker": lookup(TRACKER_REGISTRY, cfg.MODEL.TRACKER.NAME, "MODEL.TRACKER.NAME")(cfg),
        }

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses; every frame is an image, an instance that is absent in a frame is no target there.

        With a second stream (``MODEL.BATCH_FORMER``) every frame counts twice, so that losses are means over both.

        Raises:
            ValueError: a class that the head does not have.
        """
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        size = (int(images.shape[-2]), int(images.shape[-1]))
        targets = []
        for instances in (frame for sample in samples for frame in sample["instances"]):
            present = instances.gt_ids != -1
            labels = instances.gt_classes[present]
            check_labels(labels, self.criterion.num_classes)
            masks = pad_masks(instances.gt_masks.tensor[present], size)
            targets.append(MaskTargets(labels.to(self.device), masks.to(self.device)))
        sizes = [(frame.shape[-2], frame.shape[-1]) for sample in samples for frame in sample["image"]]
        outputs = self.segment(images)
        streams = len(outputs["pred_logits"]) // len(targets)
        targets, sizes = targets * streams, sizes * streams
        losses, matches = self.criterion.losses_and_matches(outputs, targets)
        if len(self.heads):
            losses.update(self.heads.losses(outputs, self._head_targets(outputs, targets, matches, sizes)))
        return losses

    def _head_targets(
        self,
        outputs: DecoderOutput,
        targets: Sequence[MaskTargets],
        matches: Sequence[Sequence[Pairs]],
        sizes: Sequence[tuple[int, int]],
    ) -> HeadTargets:
        """The matches of the final layer, as heads take them."""
        pairs = [layers[-1] for layers in matches]
        embeds, features = outputs["mask_embeds"], outputs["mask_features"]

        def matched_logits(frame: int) -> Tensor:
            queries = matched_rows(embeds, frame, pairs[frame])
            return predict_masks(queries[None], features[frame, None])[0]

        (num_masks,) = self.criterion.mean_counts([sum(len(queries) for queries, _ in pairs)], features.device)
        return HeadTargets(pairs, [target.masks for target in targets], sizes, num_masks, matched_logits)

    def open_tracks(self) -> OnlineTracks:
        """Tracks by matching each frame with the one before."""
        return ScoredTracks(self._step)

    def _step(self, images: Tensor, state: Any) -> tuple[TrackedFrames, Any]:
        state = state or ScoredState(None, None)
        tracked, tracker = self.tracker(self.segment(images), state.tracker)
        factors = self.heads.score_factors(tracked)
        if factors is not None:
            factors = factors.float().sum(dim=0) + (0 if state.factors is None else state.factors)
        frames = TrackedFrames(tracked["pred_logits"], tracked["mask_embeds"], tracked["mask_features"])
        return frames, ScoredState(tracker, factors)

    @torch.no_grad()
    def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
        """Intermediate arrays of a short video under the names of the recordings that parity is checked with."""
        images = self.normalizer(list(sample["image"]))
        features = self.backbone(images)
        tracked, _ = self.tracker(self.sem_seg_head(features), None)
        masks = predict_masks(tracked["mask_embeds"], tracked["mask_features"])
        return {
            **{f"backbone.{name}": feature for name, feature in features.items()},
            "pred_cls": tracked["pred_logits"].mean(dim=0),
            "pred_masks": masks.transpose(0, 1),
        }
