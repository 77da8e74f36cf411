"""MinVIS (Huang, Yu, Anandkumar, NeurIPS 2022): an image segmenter on single frames, tracked by its own queries.

Training is per frame: every frame of a clip is an image of its own. At test time the queries of consecutive frames are
matched by their embeddings, class logits are averaged over the video, and the best (query, class) pairs are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from vis.modeling.criterions.set_criterion import MaskTargets, SetCriterion
from vis.modeling.heads.build import Heads, build_heads, mask_former_losses
from vis.modeling.inference import VideoModel
from vis.modeling.inference.scored import ScoredTracks
from vis.modeling.registry import TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import check_labels
from vis.modeling.segmenter.counts import only_targets_count, seen_in_frames
from vis.modeling.segmenter.frames import pad_masks
from vis.modeling.transformer_decoders.masked import predict_masks
from vis.structures import ClipSample


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
        pairs, of_frames = [layers[-1] for layers in matches], [target.masks for target in targets]
        return losses | mask_former_losses(self.heads, outputs, pairs, of_frames, sizes)

    def target_counts(self, samples: Sequence[ClipSample]) -> dict[str, float] | None:
        """See :mod:`vis.modeling.segmenter.counts`."""
        return {"masks": seen_in_frames(samples)} if only_targets_count(self) else None

    def open_tracks(self) -> ScoredTracks:
        """Tracks by matching each frame with the one before."""
        return ScoredTracks(self.segment, self.tracker, self.heads)

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
