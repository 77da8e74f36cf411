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
from vis.modeling.inference import OnlineTracks, TrackedFrames, VideoModel
from vis.modeling.registry import TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import clip_targets
from vis.structures import ClipSample


@META_ARCH_REGISTRY.register()
class CTVIS(VideoModel):
    """Segmenter with a reid branch, clip-wise criterion and a tracker without parameters."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "MODEL": {"TRACKER": {"NAME": "QueryMatchingTracker"}, "MASK_FORMER": {"REID_BRANCH": True}}
    }
    #: A training starts from an image model or a MinVIS, neither of which has the reid branch.
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("sem_seg_head.predictor.reid_embed.",),
        "segmenter": ("sem_seg_head.predictor.reid_embed.",),
        "ctvis": (),
    }

    @configurable
    def __init__(self, *, criterion: CTVISCriterion, tracker: nn.Module, **options: Any) -> None:
        """Args: ``options`` of :class:`~vis.modeling.inference.VideoModel`."""
        super().__init__(**options)
        self.criterion = criterion
        self.tracker = tracker

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        if not cfg.MODEL.MASK_FORMER.REID_BRANCH:
            raise ValueError("CTVIS trains re-identification embeddings: set MODEL.MASK_FORMER.REID_BRANCH True")
        return {
            **super().from_config(cfg),
            "criterion": CTVISCriterion(cfg),
            "tracker": lookup(TRACKER_REGISTRY, cfg.MODEL.TRACKER.NAME, "MODEL.TRACKER.NAME")(cfg),
        }

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses of a batch of clips, all of T frames.

        Raises:
            ValueError: a class that the head does not have.
        """
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        size = (int(images.shape[-2]), int(images.shape[-1]))
        targets = [
            clip_targets(sample, size=size, num_classes=self.criterion.num_classes, device=self.device)
            for sample in samples
        ]
        return self.criterion.clip_losses(self.segment(images), targets)

    def open_tracks(self) -> OnlineTracks:
        """Tracks by matching each frame with the one before."""
        return OnlineTracks(self._step)

    def _step(self, images: Tensor, state: Any) -> tuple[TrackedFrames, Any]:
        tracked, state = self.tracker(self.segment(images), state)
        return TrackedFrames(tracked["pred_logits"], tracked["mask_embeds"], tracked["mask_features"]), state
