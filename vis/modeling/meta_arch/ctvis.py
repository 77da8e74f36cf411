"""The CTVIS segmenter (Ying et al., ICCV 2023), as DVIS++ starts from it: MinVIS with re-identification embeddings.

It is trained on clips, with a contrastive loss over their frames, and tracked as MinVIS is: by matching the queries of
consecutive frames, here by both of their embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from vis.modeling.criterions.ctvis import CTVISCriterion
from vis.modeling.heads.build import Heads, build_heads, mask_former_losses
from vis.modeling.inference import VideoModel
from vis.modeling.inference.scored import ScoredTracks
from vis.modeling.registry import TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import clip_targets
from vis.modeling.segmenter.counts import only_targets_count, seen_in_clip
from vis.structures import ClipSample


@META_ARCH_REGISTRY.register()
class CTVIS(VideoModel):
    """Segmenter with a reid branch, clip-wise criterion and a tracker without parameters."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "MODEL": {"TRACKER": {"NAME": "QueryMatchingTracker"}, "MASK_FORMER": {"REID_BRANCH": True}}
    }
    #: See :func:`vis.modeling.heads.build.refuse_unused`.
    TAKES_HEADS: ClassVar[bool] = True
    TWO_STREAMS: ClassVar[bool] = True
    #: A training starts from an image model or a MinVIS, neither of which has the reid branch.
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("sem_seg_head.predictor.reid_embed.",),
        "segmenter": ("sem_seg_head.predictor.reid_embed.",),
        "ctvis": (),
    }

    @configurable
    def __init__(
        self, *, criterion: CTVISCriterion, tracker: nn.Module, heads: Heads | None = None, **options: Any
    ) -> None:
        """Args: ``options`` of :class:`~vis.modeling.inference.VideoModel`."""
        super().__init__(**options)
        self.criterion = criterion
        self.heads = Heads([]) if heads is None else heads
        self.tracker = tracker

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        if not cfg.MODEL.MASK_FORMER.REID_BRANCH:
            raise ValueError("CTVIS trains re-identification embeddings: set MODEL.MASK_FORMER.REID_BRANCH True")
        return {
            **super().from_config(cfg),
            "criterion": CTVISCriterion(cfg),
            "heads": build_heads(
                cfg, embed_dim=cfg.MODEL.MASK_FORMER.HIDDEN_DIM, feature_dim=cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
            ),
            "tracker": lookup(TRACKER_REGISTRY, cfg.MODEL.TRACKER.NAME, "MODEL.TRACKER.NAME")(cfg),
        }

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses of a batch of clips, all of T frames.

        With a second stream (``MODEL.BATCH_FORMER``) every clip counts twice, so that losses are means over both.

        Raises:
            ValueError: a class that the head does not have.
        """
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        size = (int(images.shape[-2]), int(images.shape[-1]))
        targets = [
            clip_targets(sample, size=size, num_classes=self.criterion.num_classes, device=self.device)
            for sample in samples
        ]
        sizes = [(frame.shape[-2], frame.shape[-1]) for sample in samples for frame in sample["image"]]
        outputs = self.segment(images)
        streams = len(outputs["pred_logits"]) // len(images)
        targets, sizes = targets * streams, sizes * streams
        losses, pairs = self.criterion.clip_losses_and_matches(outputs, targets)
        masks = [mask for clip in targets for mask in clip.masks.unbind(1)]
        return losses | mask_former_losses(self.heads, outputs, pairs, masks, sizes)

    def target_counts(self, samples: Sequence[ClipSample]) -> dict[str, float] | None:
        """See :mod:`vis.modeling.segmenter.counts`: every instance of a clip is a target of all its frames."""
        if not only_targets_count(self):
            return None
        return {"masks": sum(seen_in_clip(sample) * len(sample["image"]) for sample in samples)}

    def open_tracks(self) -> ScoredTracks:
        """Tracks by matching each frame with the one before."""
        return ScoredTracks(self.segment, self.tracker, self.heads)
