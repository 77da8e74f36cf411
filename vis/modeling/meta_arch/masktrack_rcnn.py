"""MaskTrack R-CNN (Yang et al., "Video Instance Segmentation", ICCV 2019), the classic baseline.

A detector of single frames whose detections carry an embedding: trained on pairs of frames, the instances of one
against those of the other; at test time compared with what is remembered of the objects so far. The image model is Mask
R-CNN, as published, or CondInst ("CondInst Track", Zhu et al., ECCV 2022, table 6), by ``MODEL.DETECTOR.NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from vis.config import declare
from vis.modeling.criterions.embedding import MatchCriterion, MatchPair
from vis.modeling.detectors.base import Detector, Positives, Pyramid, build_detector
from vis.modeling.detectors.targets import detector_targets
from vis.modeling.heads.track_embedding import MatchLogits
from vis.modeling.inference.detected import encode_detections
from vis.modeling.inference.growing import FrameSizes, GrowingModel, ResultRules, TrackedFrame
from vis.modeling.registry import TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import FrameNormalizer
from vis.modeling.trackers.embedding import TrackedDetections
from vis.structures import ClipSample


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.MASKTRACK = node = type(cfg)()
    node.EMBED_DIM = 1024
    # How embeddings are compared, in training and at test time: "product", or "cosine" over TEMPERATURE.
    node.SIMILARITY = "product"
    node.TEMPERATURE = 0.1
    # Weight of loss_match; of a pair it is the mean over its positives, or their sum over the "matched" ones.
    node.MATCH_WEIGHT = 1.0
    node.MATCH_NORMALIZER = "positives"
    # Train the detector on both frames, and each against the other. As published on the key frame alone.
    node.BOTH_FRAMES = False
    # Association: see vis.modeling.trackers.embedding.
    node.SCORE = "masktrack"
    node.COEFFICIENTS = [1.0, 2.0, 10.0]
    node.NEW_THR = 0.4
    node.ASSIGNMENT = "greedy"
    node.MEMORY_FRAMES = 0
    node.UPDATE_LABEL = False
    node.EMBED_MOMENTUM = 1.0
    # Results of a video, the best; 0: all.
    node.MAX_NUM = 0


@runtime_checkable
class EmbedsBoxes(Protocol):
    """A detector that gives any box an embedding."""

    def embed_boxes(self, pyramid: Pyramid, boxes: Sequence[Tensor]) -> Tensor:
        """(sum of n_i, C) of boxes (n_i, 4) of each frame."""


@META_ARCH_REGISTRY.register()
class MaskTrackRCNN(GrowingModel):
    """Detector with embeddings, matching loss, and a tracker without parameters."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "MODEL": {
            "DETECTOR": {"NAME": "MaskRCNN", "CLS_THR": 0.05},
            "MASK_RCNN": {"NMS_BY_CLASS": True},
            "TRACKER": {"NAME": "EmbeddingTracker"},
            "BACKBONE": {"FREEZE_AT": 2},
            "MASK_FORMER": {"TEST": {"WINDOW_SIZE": 10}},
        },
        # Any two frames of a video, in any order.
        "INPUT": {"SAMPLING_FRAME_NUM": 2, "SAMPLING_FRAME_RANGE": 10000, "SAMPLING_FRAME_SHUFFLE": True},
    }
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "backbone": (),
        "mask_rcnn": ("image_model.roi_heads.track_head.",),
        "condinst": ("image_model.proposal_generator.fcos_head.embed_",),
        "masktrack_rcnn": (),
    }

    @configurable
    def __init__(
        self,
        *,
        image_model: Detector,
        criterion: MatchCriterion,
        tracker: nn.Module,
        num_classes: int,
        match_weight: float,
        both_frames: bool,
        **options: Any,
    ) -> None:
        """Args: ``both_frames``: see MODEL.MASKTRACK.BOTH_FRAMES; ``options`` of
        :class:`~vis.modeling.inference.growing.GrowingModel`."""
        super().__init__(**options)
        if not (both_frames or isinstance(image_model, EmbedsBoxes)):
            raise ValueError(
                f"detector {type(image_model).__name__} has embeddings of its own predictions alone, so both frames of "
                "a pair have to be trained: set MODEL.MASKTRACK.BOTH_FRAMES True"
            )
        self.image_model, self.criterion, self.tracker = image_model, criterion, tracker
        self.num_classes, self.match_weight, self.both_frames = num_classes, match_weight, both_frames

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.MASKTRACK
        image_model = build_detector(cfg, embed_dim=node.EMBED_DIM)
        return {
            "image_model": image_model,
            "criterion": MatchCriterion(
                logits=MatchLogits(kind=node.SIMILARITY, temperature=node.TEMPERATURE),
                normalizer=node.MATCH_NORMALIZER,
            ),
            "tracker": lookup(TRACKER_REGISTRY, cfg.MODEL.TRACKER.NAME, "MODEL.TRACKER.NAME")(cfg),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "match_weight": node.MATCH_WEIGHT,
            "both_frames": node.BOTH_FRAMES,
            "normalizer": FrameNormalizer(
                pixel_mean=cfg.MODEL.PIXEL_MEAN,
                pixel_std=cfg.MODEL.PIXEL_STD,
                size_divisibility=image_model.size_divisibility,
            ),
            "window_size": cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE,
            "rules": ResultRules(classes="vote", max_num=node.MAX_NUM, drop_noise=False),
        }

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Losses of the detector under its names, and ``loss_match``, of pairs (key frame, reference frame).

        Raises:
            ValueError: a clip is no pair, or a class that the head does not have.
        """
        lengths = {len(sample["image"]) for sample in samples}
        if lengths != {2}:
            raise ValueError(
                f"MaskTrackRCNN trains on pairs of frames, found clips of {sorted(lengths)}: set "
                "INPUT.SAMPLING_FRAME_NUM 2"
            )
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        padded = (int(images.shape[-2]), int(images.shape[-1]))
        targets = [
            target
            for sample in samples
            for target in detector_targets(sample, padded_size=padded, num_classes=self.num_classes, device=self.device)
        ]
        pyramid = self.image_model.top_down(self.image_model.bottom_up(images))
        keys = list(range(0, len(targets), 1 if self.both_frames else 2))
        of_keys = {name: level[keys] for name, level in pyramid.items()}
        losses, positives = self.image_model.losses_and_positives(of_keys, [targets[i] for i in keys], padded)
        references = [key ^ 1 for key in keys]
        pairs = self._pairs(positives, [targets[i] for i in keys], self._known(pyramid, targets, references, positives))
        return losses | {"loss_match": self.criterion(pairs) * self.match_weight}

    def _known(
        self, pyramid: Pyramid, targets: Sequence[Instances], references: Sequence[int], positives: Positives
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each reference frame embeddings (n, C) of its instances, and their ids (n,).

        Of their boxes, or the means of their positive predictions; an instance without one counts as absent.
        """
        of_frames = [targets[frame] for frame in references]
        if isinstance(self.image_model, EmbedsBoxes):
            levels = {name: level[list(references)] for name, level in pyramid.items()}
            embeds = self.image_model.embed_boxes(levels, [target.gt_boxes.tensor for target in of_frames])
            parts = embeds.split([len(target) for target in of_frames])
            return [(part, target.gt_ids) for part, target in zip(parts, of_frames, strict=True)]
        assert positives.embeds is not None
        known = []
        for frame, target in zip(references, of_frames, strict=True):
            rows = positives.frames == frame  # both frames are keys, so these are numbers of the same frames
            places = positives.instances[rows]
            counts = torch.bincount(places, minlength=len(target))
            sums = positives.embeds.new_zeros(len(target), positives.embeds.shape[1])
            sums = sums.index_add(0, places, positives.embeds[rows])
            has = counts > 0
            known.append((sums[has] / counts[has, None], target.gt_ids[has]))
        return known

    def _pairs(
        self, positives: Positives, targets: Sequence[Instances], known: Sequence[tuple[Tensor, Tensor]]
    ) -> list[MatchPair]:
        assert positives.embeds is not None
        pairs = []
        for frame, (target, reference) in enumerate(zip(targets, known, strict=True)):
            rows = positives.frames == frame
            pairs.append(MatchPair(positives.embeds[rows], target.gt_ids[positives.instances[rows]], *reference))
        return pairs

    def track(self, images: Tensor, sizes: FrameSizes, state: Any) -> tuple[Sequence[TrackedFrame], Any]:
        """See :class:`~vis.modeling.inference.growing.WindowStep`; the state is the tracker's."""
        pyramid = self.image_model.top_down(self.image_model.bottom_up(images))
        frames = []
        for t in range(len(images)):
            of_frame = {name: level[t : t + 1] for name, level in pyramid.items()}
            found = self.image_model.detect(of_frame, sizes.input)
            assert found.embeds is not None
            scores, labels = found.class_probs.max(dim=1)
            ids, state = self.tracker(TrackedDetections(found.boxes, scores, labels, found.embeds), state)
            rows = [row for row, track in enumerate(ids) if track >= 0]
            kept = found.take(torch.tensor(rows, dtype=torch.int64, device=scores.device))
            masks = encode_detections(self.image_model, kept, of_frame, sizes)
            frames.append(TrackedFrame([ids[row] for row in rows], kept.class_probs, masks))
        return frames, state
