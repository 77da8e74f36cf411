"""Mask R-CNN (He et al., ICCV 2017) as a detector of single frames: detectron2's network on a pyramid in two halves.

Names of parameters are those of detectron2's model zoo: ``backbone.*``, ``proposal_generator.*``, ``roi_heads.*``.

Anchors and proposals are sampled with torch's global random state, which the trainer seeds. Frames of a batch are
sampled one after the other, first all their anchors, then all their proposals; so a batch and its frames one by one
draw other samples, and have equal losses where ``BATCH_SIZE_PER_IMAGE`` of ``MODEL.RPN`` and ``MODEL.ROI_HEADS`` (times
``POSITIVE_FRACTION``) exceed the numbers of anchors and proposals, so that every one is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage, has_event_storage
from torch import Tensor

from vis.config import declare
from vis.layers.paste_masks import paste_masks
from vis.modeling.backbones.fpn import SplitFPN, build_fpn
from vis.modeling.detectors.base import Detector, FrameDetections, Positives, Pyramid
from vis.modeling.detectors.roi_heads import VideoROIHeads
from vis.modeling.registry import DETECTOR_REGISTRY


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.MASK_RCNN = node = type(cfg)()
    # Channels of the pyramid.
    node.CHANNELS = 256
    # Each class has its own NMS, and a box may be several detections of different classes.
    node.NMS_BY_CLASS = False
    # Hidden layer of the identity branch, or that of the class head.
    node.ID_HEAD = type(cfg)()
    node.ID_HEAD.FC_DIM = 1024
    node.ID_HEAD.SHARED_FC = False
    # Embedding branch: hidden layer; ReLU after the last layer too (mmtracking).
    node.TRACK_HEAD = type(cfg)()
    node.TRACK_HEAD.FC_DIM = 1024
    node.TRACK_HEAD.LAST_RELU = False
    # detectron2's keys: its defaults are of a network without a pyramid; numbers of samples are those of video methods.
    model = cfg.MODEL
    model.MASK_ON = True
    model.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.RPN.BATCH_SIZE_PER_IMAGE = 64
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 200
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 200
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 128
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC = 2
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model.ROI_MASK_HEAD.NUM_CONV = 4
    model.ROI_MASK_HEAD.POOLER_RESOLUTION = 14


@DETECTOR_REGISTRY.register()
class MaskRCNN(Detector):
    """See :class:`Detector`; ``mask_inputs`` holds ``labels`` (n,), the class whose mask a detection has."""

    ID_LOSSES: ClassVar[tuple[str, ...]] = ("ce",)  # of a softmax over ids and background

    @configurable
    def __init__(
        self,
        *,
        backbone: SplitFPN,
        proposal_generator: RPN,
        roi_heads: VideoROIHeads,
        num_classes: int,
        num_ids: int,
        class_threshold: float,
        id_threshold: float,
        nms: float,
        nms_by_class: bool,
        max_detections: int,
    ) -> None:
        """Args: the last five are ``MODEL.DETECTOR.{CLS_THR,ID_THR,NMS}``, ``MODEL.MASK_RCNN.NMS_BY_CLASS`` and
        ``MODEL.DETECTOR.TOPK``."""
        super().__init__()
        self.backbone, self.proposal_generator, self.roi_heads = backbone, proposal_generator, roi_heads
        self.num_classes, self.num_ids, self.res5_channels = num_classes, num_ids, backbone.last_channels
        self.size_divisibility = max(backbone.size_divisibility, 32)
        self.class_threshold, self.id_threshold = class_threshold, id_threshold
        self.nms, self.nms_by_class, self.max_detections = nms, nms_by_class, max_detections

    @classmethod
    def from_config(
        cls, cfg: CfgNode, *, num_ids: int = 0, id_convs: int = 1, id_loss: str = "ce", embed_dim: int = 0
    ) -> dict[str, Any]:
        """Args: ``id_convs`` and ``id_loss`` are CondInst's: the id branch here is linear, its loss the softmax's."""
        cfg, num_classes = cfg.clone(), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes  # what detectron2's heads read
        node = cfg.MODEL.MASK_RCNN
        backbone = build_fpn(
            cfg,
            in_features=("res2", "res3", "res4", "res5"),
            out_channels=node.CHANNELS,
            top="pool",
            norm_eval=cfg.MODEL.DETECTOR.NORM_EVAL,
        )
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "proposal_generator": RPN(cfg, shapes),
            "roi_heads": VideoROIHeads(cfg, shapes, num_ids=num_ids, embed_dim=embed_dim),
            "num_classes": num_classes,
            "num_ids": num_ids,
            "class_threshold": cfg.MODEL.DETECTOR.CLS_THR,
            "id_threshold": cfg.MODEL.DETECTOR.ID_THR,
            "nms": cfg.MODEL.DETECTOR.NMS,
            "nms_by_class": node.NMS_BY_CLASS,
            "max_detections": cfg.MODEL.DETECTOR.TOPK,
        }

    def bottom_up(self, images: Tensor) -> dict[str, Tensor]:
        """See :class:`Detector`: res2 to res5."""
        maps: dict[str, Tensor] = self.backbone.bottom_up(images)
        return maps

    def top_down(self, features: Pyramid) -> dict[str, Tensor]:
        """See :class:`Detector`: p2 to p6."""
        return self.backbone.top_down(features)

    def losses_and_positives(
        self,
        pyramid: Pyramid,
        targets: Sequence[Instances],
        padded_size: tuple[int, int],
        *,
        groups: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Positives]:
        """See :class:`Detector`. Positives are the sampled regions of instances."""
        with _storage():
            proposals, losses = self._propose(pyramid, targets, groups)
            of_regions, positives = self.roi_heads.region_losses(pyramid, proposals, targets, groups)
        return losses | of_regions, positives

    def _propose(
        self, pyramid: Pyramid, targets: Sequence[Instances], groups: Tensor | None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Proposals of each frame; losses, which detectron2 divides by numbers of samples, the same for every frame."""
        numbers = [0] * len(targets) if groups is None else groups.tolist()
        parts = [[i for i, number in enumerate(numbers) if number == group] for group in sorted(set(numbers))]
        if len({len(part) for part in parts}) == 1:
            parts = [list(range(len(targets)))]  # the mean over groups of one size is the mean over all frames
        proposals: list[Any] = [None] * len(targets)
        total: dict[str, Tensor] = {}
        for part in parts:
            features = dict(pyramid) if len(part) == len(targets) else {k: x[part] for k, x in pyramid.items()}
            sizes = [targets[i].image_size for i in part]
            # Of the images detectron2 reads the sizes alone.
            images = ImageList(features[self.proposal_generator.in_features[0]], sizes)
            found, losses = self.proposal_generator(images, features, [targets[i] for i in part])
            for i, of_frame in zip(part, found, strict=True):
                proposals[i] = of_frame
            total = {name: total.get(name, 0.0) + loss / len(parts) for name, loss in losses.items()}
        return proposals, total

    def detect(
        self,
        pyramid: Pyramid,
        image_size: tuple[int, int],
        *,
        weights: tuple[float, float] = (1.0, 0.0),
        scale: tuple[float, float] | None = None,
    ) -> FrameDetections:
        """See :class:`Detector`.

        A detection is a proposal with the box of its best class. With ``nms_by_class`` it is a proposal and one of the
        classes that are above the threshold, and its ``class_probs`` are 0 elsewhere.
        """
        features = dict(pyramid)
        images = ImageList(features[self.proposal_generator.in_features[0]], [image_size])
        proposals, _ = self.proposal_generator(images, features, None)
        probs, of_classes, ids = self.roi_heads.predict(features, proposals[0].proposal_boxes)
        if self.nms_by_class:
            rows, labels = (probs > self.class_threshold).nonzero(as_tuple=True)
        else:
            best, labels = probs.max(dim=1)
            rows = (best > self.class_threshold).nonzero()[:, 0]
            labels = labels[rows]
        boxes = Boxes(of_classes[rows, labels])
        boxes.clip(image_size)
        scores = weights[0] * probs[rows, labels]
        usable = boxes.nonempty()
        if ids is not None:
            best_id = ids[rows].amax(dim=1)
            scores = scores + weights[1] * best_id
            usable &= best_id > self.id_threshold
        rows, labels, scores, corners = rows[usable], labels[usable], scores[usable], boxes.tensor[usable]
        # nms_by_class: other classes of a proposal are other detections
        of_rows = torch.zeros_like(probs[rows]).scatter_(1, labels[:, None], 1) if self.nms_by_class else 1.0
        found = FrameDetections(
            boxes=corners,
            scores=scores,
            class_probs=probs[rows] * of_rows,
            id_probs=None if ids is None else ids[rows],
            embeds=None,
            mask_inputs={"labels": labels},
            candidates=len(rows),
        )
        apart = labels if self.nms_by_class else torch.zeros_like(labels)
        compared = corners if scale is None else corners / corners.new_tensor([*scale, *scale])
        found = found.take(batched_nms(compared, scores, apart, self.nms)[: self.max_detections])
        if self.roi_heads.track_head is not None:
            found.embeds = self.roi_heads.embeds(pyramid, [found.boxes])
        return found

    def embed_boxes(self, pyramid: Pyramid, boxes: Sequence[Tensor]) -> Tensor:
        """Embeddings (sum of n_i, C) of boxes (n_i, 4), pixels of the network's input, of each frame."""
        return self.roi_heads.embeds(pyramid, boxes)

    def mask_probs(self, found: FrameDetections, pyramid: Pyramid, padded_size: tuple[int, int]) -> Tensor:
        """See :class:`Detector`."""
        return self.masks_at(found, pyramid, padded_size)

    def masks_at(
        self,
        found: FrameDetections,
        pyramid: Pyramid,
        size: tuple[int, int],
        scale: tuple[float, float] = (1.0, 1.0),
    ) -> Tensor:
        """(n, H, W) foreground probabilities in a picture of any size, without a detour over that of the input.

        Args:
            scale: (x, y), pixels of this picture per pixel of the network's input.
        """
        crops = self.roi_heads.mask_crops(pyramid, found.boxes, found.mask_inputs["labels"])
        return paste_masks(crops, found.boxes * found.boxes.new_tensor([*scale, *scale]), size)


def _storage() -> AbstractContextManager[Any]:
    """detectron2's heads write numbers of samples down; where nobody listens, to nowhere."""
    return nullcontext() if has_event_storage() else EventStorage()
