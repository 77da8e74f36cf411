"""IDOL (Wu et al., "In Defense of Online Models for Video Instance Segmentation", ECCV 2022).

A deformable DETR finds the instances of single frames, with masks by dynamic convolutions and an embedding for each
instance that a contrastive loss between two frames trains. At test time detections of a frame are linked to tracks in a
memory bank; tracks begin and end, and a track's class scores are the mean over the frames that show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from vis.config import declare
from vis.layers.effective_batch import effective_mean
from vis.modeling.backbones import build_backbone
from vis.modeling.criterions.idol import FrameTargets, IDOLCriterion
from vis.modeling.heads.build import Heads, HeadTargets, build_heads
from vis.modeling.heads.deformable_detr import DeformableDETR, Detections, InstanceDETR
from vis.modeling.inference.detections import mask_nms, select_queries
from vis.modeling.inference.growing import FrameSizes, GrowingModel, ResultRules, TrackedFrame, encode_logits
from vis.modeling.matchers.ota import Assignment
from vis.modeling.pixel_decoders.batch_former import build_batch_former
from vis.modeling.registry import TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import FrameNormalizer, check_labels
from vis.modeling.segmenter.frames import pad_masks
from vis.modeling.trackers.memory_bank import FrameDetections, MemoryBankState
from vis.structures import ClipSample


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.IDOL = node = type(cfg)()
    # The network.
    node.HIDDEN_DIM = 256
    node.DIM_FEEDFORWARD = 1024
    node.NHEADS = 8
    node.ENC_LAYERS = 6
    node.DEC_LAYERS = 6
    node.ENC_N_POINTS = 4
    node.DEC_N_POINTS = 4
    node.NUM_FEATURE_LEVELS = 4
    node.NUM_OBJECT_QUERIES = 300
    node.DROPOUT = 0.1
    # Recompute the encoder in the backward pass instead of keeping its activations.
    node.ENC_CHECKPOINT = False
    # Losses.
    node.CLASS_WEIGHT = 2.0
    node.L1_WEIGHT = 5.0
    node.GIOU_WEIGHT = 2.0
    node.MASK_WEIGHT = 2.0
    node.DICE_WEIGHT = 5.0
    node.REID_WEIGHT = 2.0
    node.FOCAL_ALPHA = 0.25
    node.DEEP_SUPERVISION = True
    # As the released code assigns queries where instances are left without one: two may end with the same.
    node.RELEASED_MATCHER = False
    # Detections of a frame: threshold of the scores, IoU of boxes (by class) and of masks above which the worse goes.
    node.INFERENCE_SELECT_THRES = 0.1
    node.BOX_NMS = 0.9
    node.NMS_PRE = 0.5
    # Tracks: see vis.modeling.trackers.memory_bank.
    node.MATCH_SCORE = 0.5
    node.INIT_SCORE = 0.2
    node.ADD_NEW_SCORE = 0.2
    node.MEMORY_LEN = 3
    node.MEMORY_FRAMES = 10
    node.INFERENCE_TW = True
    node.INFERENCE_FW = True
    # "released", or "paper": weights of remembered embeddings and of long tracks as the paper states them.
    node.ASSOCIATION = "released"
    # A detection is linked only to a track with at least this cosine; -1, as released, links the best detection to a
    # track that is alone in memory whatever it looks like.
    node.MIN_COSINE = -1.0
    # Results: class scores of a track ("mean" or "max" over its frames, "video": mean over all frames of the video);
    # every class above APPLY_CLS_THRES is a result of its own, or, without MULTI_CLS_ON, the best class alone.
    node.TEMPORAL_SCORE_TYPE = "mean"
    node.MULTI_CLS_ON = True
    node.APPLY_CLS_THRES = 0.05


@META_ARCH_REGISTRY.register()
class IDOL(GrowingModel):
    """Detector, criterion and a tracker without parameters."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "MODEL": {
            "TRACKER": {"NAME": "MemoryBankTracker"},
            "BACKBONE": {"FREEZE_AT": 2},
            "MASK_FORMER": {"TEST": {"WINDOW_SIZE": 10}},
        },
        "INPUT": {"SAMPLING_FRAME_NUM": 2, "CROP": {"EACH_FRAME": True}},
        # The release decays every parameter alike.
        "SOLVER": {"WEIGHT_DECAY": 0.0001, "WEIGHT_DECAY_NORM": 0.0001, "WEIGHT_DECAY_EMBED": 0.0001},
    }
    #: See :func:`vis.modeling.heads.build.refuse_unused`.
    TAKES_HEADS: ClassVar[bool] = True
    TWO_STREAMS: ClassVar[bool] = True
    #: Trainings start from a backbone, or from an IDOL of other classes (the release's is trained on pairs of COCO).
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {"backbone": (), "idol": ()}

    @configurable
    def __init__(
        self,
        *,
        detr: InstanceDETR,
        criterion: IDOLCriterion,
        tracker: nn.Module,
        num_classes: int,
        select_threshold: float,
        box_iou: float,
        mask_iou: float,
        heads: Heads | None = None,
        **options: Any,
    ) -> None:
        """Args:
        select_threshold, box_iou, mask_iou: of a frame's detections, see :mod:`vis.modeling.inference.detections`.
        options: of :class:`~vis.modeling.inference.growing.GrowingModel`.
        """
        super().__init__(**options)
        self.detr, self.criterion, self.tracker = detr, criterion, tracker
        self.heads = Heads([]) if heads is None else heads
        self.num_classes = num_classes
        self.select_threshold, self.box_iou, self.mask_iou = select_threshold, box_iou, mask_iou

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.IDOL
        backbone = build_backbone(cfg)
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        detr = DeformableDETR(
            backbone=backbone,
            in_features=("res3", "res4", "res5"),
            num_classes=num_classes,
            num_queries=node.NUM_OBJECT_QUERIES,
            embed_dim=node.HIDDEN_DIM,
            feedforward_dim=node.DIM_FEEDFORWARD,
            num_heads=node.NHEADS,
            num_levels=node.NUM_FEATURE_LEVELS,
            num_encoder_layers=node.ENC_LAYERS,
            num_decoder_layers=node.DEC_LAYERS,
            num_encoder_points=node.ENC_N_POINTS,
            num_decoder_points=node.DEC_N_POINTS,
            dropout=node.DROPOUT,
            encoder_checkpoint=node.ENC_CHECKPOINT,
            batch_former=build_batch_former(cfg, embed_dim=node.HIDDEN_DIM, encoder_layers=node.ENC_LAYERS),
        )
        return {
            "detr": InstanceDETR(detr=detr, embed_dim=node.HIDDEN_DIM),
            "criterion": IDOLCriterion(cfg),
            "tracker": lookup(TRACKER_REGISTRY, cfg.MODEL.TRACKER.NAME, "MODEL.TRACKER.NAME")(cfg),
            "normalizer": FrameNormalizer(
                pixel_mean=cfg.MODEL.PIXEL_MEAN,
                pixel_std=cfg.MODEL.PIXEL_STD,
                size_divisibility=max(backbone.size_divisibility, 32),
            ),
            "heads": build_heads(cfg, embed_dim=node.HIDDEN_DIM, feature_dim=node.HIDDEN_DIM),
            "num_classes": num_classes,
            "window_size": cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE,
            "select_threshold": node.INFERENCE_SELECT_THRES,
            "box_iou": node.BOX_NMS,
            "mask_iou": node.NMS_PRE,
            "rules": ResultRules(
                score_type=node.TEMPORAL_SCORE_TYPE,
                classes="all" if node.MULTI_CLS_ON else "best",
                threshold=node.APPLY_CLS_THRES,
            ),
        }

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses of pairs (key frame, reference frame).

        With a second stream (``MODEL.BATCH_FORMER``) every pair counts twice, so that losses are means over both.

        Raises:
            ValueError: a clip is no pair, or a class that the head does not have.
        """
        lengths = {len(sample["image"]) for sample in samples}
        if lengths != {2}:
            raise ValueError(
                f"IDOL trains on pairs of frames, found clips of {sorted(lengths)}: set INPUT.SAMPLING_FRAME_NUM 2"
            )
        frames = [frame for sample in samples for frame in sample["image"]]
        images = self.normalizer(frames)
        padded = (int(images.shape[-2]), int(images.shape[-1]))
        pairs = [self._targets(sample, padded) for sample in samples]
        found = self.detr(images, [_size(frame) for frame in frames])
        pairs = pairs * (len(found.maps[0]) // len(frames))  # once more for a second stream
        keys = [key for key, _ in pairs]
        references = [reference for _, reference in pairs]
        losses, matches, features = self.criterion.losses_and_matches(self.detr, found, keys, references)
        if len(self.heads):
            losses |= self._head_losses(found, keys, matches, features)
        return losses

    def _head_losses(
        self, found: Detections, keys: Sequence[FrameTargets], matches: Sequence[Assignment], features: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the heads on the queries that the last layer assigned in the key frames.

        Args:
            features: mask features (B, 8, h, w) of the key frames.
        """
        last = found.layers[-1]
        height, width = keys[0].masks.shape[-2:]
        # the finest level of the memory, at the stride that masks have
        maps = F.interpolate(found.maps[0][::2], size=(height // 4, width // 4), mode="bilinear", align_corners=False)

        def matched_logits(pair: int) -> Tensor:
            queries = matches[pair].queries
            rows = (last.queries[2 * pair, queries], last.points[2 * pair, queries])
            return self.detr.masks(features[pair], *rows, keys[pair].image_size)

        assigned = sum(len(match.queries) for match in matches)
        targets = HeadTargets(
            pairs=[(match.queries, match.instances) for match in matches],
            masks=[key.masks for key in keys],
            image_sizes=[key.image_size for key in keys],
            num_masks=effective_mean("heads.masks", assigned, features.device, of_part=True),
            matched_logits=matched_logits,
        )
        return self.heads.losses({"pred_embeds": last.queries[::2], "mask_features": maps}, targets)

    def _targets(self, sample: ClipSample, padded: tuple[int, int]) -> list[FrameTargets]:
        """Of both frames the instances that are seen in the key frame."""
        seen = sample["instances"][0].gt_ids != -1
        targets = []
        for instances in sample["instances"]:
            height, width = instances.image_size
            labels = instances.gt_classes[seen]
            check_labels(labels, self.num_classes)
            x0, y0, x1, y1 = (instances.gt_boxes.tensor[seen].float() / torch.tensor([width, height] * 2)).unbind(1)
            boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
            masks = pad_masks(instances.gt_masks.tensor[seen], padded)
            visible = instances.gt_ids[seen] != -1
            labels, boxes, masks, visible = (x.to(self.device) for x in (labels, boxes, masks, visible))
            targets.append(FrameTargets(labels, boxes, masks, visible, (int(height), int(width))))
        return targets

    def track(
        self, images: Tensor, sizes: FrameSizes, state: MemoryBankState | None
    ) -> tuple[list[TrackedFrame], MemoryBankState | None]:
        """See :class:`~vis.modeling.inference.growing.WindowStep`; ``state`` is the memory of the video."""
        frames = []
        for probabilities, embeds, masks in self._detect(images, sizes.input):
            ids, state = self.tracker(FrameDetections(probabilities.amax(dim=1), embeds), state)
            rows = [row for row, track in enumerate(ids) if track >= 0]
            frames.append(TrackedFrame([ids[r] for r in rows], probabilities[rows], encode_logits(masks[rows], sizes)))
        return frames, state

    def _detect(self, images: Tensor, input_size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each frame its detections, best first: probabilities (n, K), embeddings (n, C), mask logits (n, h, w).

        Masks are made for what the box NMS leaves, embeddings for what the mask NMS leaves.
        """
        found = self.detr(images, [input_size] * len(images))
        features = self.detr.mask_features(found.maps)
        probabilities = self.detr.detr.class_logits(found.layers[-1], -1).sigmoid()
        factors = self.heads.score_factors({"pred_embeds": found.layers[-1].queries})
        if factors is not None:
            probabilities = probabilities * factors[..., None]
        for frame, (queries, boxes, points) in enumerate(zip(*found.layers[-1], strict=True)):
            of_frame = probabilities[frame]
            chosen = select_queries(of_frame, boxes, threshold=self.select_threshold, iou=self.box_iou)
            masks = self.detr.masks(features[frame], queries[chosen], points[chosen], input_size)
            kept = mask_nms(masks, self.mask_iou)
            chosen = chosen[kept]
            yield of_frame[chosen], self.detr.embeds(queries[chosen]), masks[kept]

    @torch.no_grad()
    def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
        """Outputs of all queries under the names of the recordings that parity is checked with.

        ``track_masks`` (tracks, T, h, w) are the mask logits of the result, for the comparison of its areas.
        """
        images = self.normalizer(list(sample["image"]))
        size = _size(sample["image"][0])
        found = self.detr(images, [size] * len(images))
        features = self.detr.mask_features(found.maps)
        last = found.layers[-1]
        rows = zip(features, last.queries, last.points, strict=True)
        return {
            "pred_logits": self.detr.detr.class_logits(last, -1),
            "pred_boxes": last.boxes,
            "pred_inst_embed": self.detr.embeds(last.queries),
            "reference_points": last.points,
            "pred_masks": torch.stack([self.detr.masks(*row, size) for row in rows])[:, :, None],
            "track_masks": self._track_masks(images, size),
        }

    def _track_masks(self, images: Tensor, input_size: tuple[int, int]) -> Tensor:
        """(tracks, T, h, w) mask logits of a short video; far below zero where a track has none."""
        state, frames = None, []
        for probabilities, embeds, masks in self._detect(images, input_size):
            ids, state = self.tracker(FrameDetections(probabilities.amax(dim=1), embeds), state)
            frames.append((ids, masks))
        count = max((max(ids) for ids, _ in frames), default=-1) + 1
        out = masks.new_full((count, len(frames), *masks.shape[1:]), -float(masks.abs().max()))
        for t, (ids, masks) in enumerate(frames):
            for row, track in enumerate(ids):
                if track >= 0:
                    out[track, t] = masks[row]
        return out


def _size(picture: Tensor) -> tuple[int, int]:
    """(height, width)."""
    return int(picture.shape[-2]), int(picture.shape[-1])
