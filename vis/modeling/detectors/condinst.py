"""CondInst (Tian et al., "Conditional Convolutions for Instance Segmentation", ECCV 2020) in two halves.

FCOS on a pyramid with masks by dynamic convolutions; with an id branch it is the image model of IAI (ECCV 2022). Only
detections that survive NMS get masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn
from torchvision.ops import nms

from vis.config import declare
from vis.layers.dynamic_conv import aligned_bilinear, num_parameters
from vis.modeling.backbones.fpn import SplitFPN, build_fpn
from vis.modeling.criterions.fcos import MASK_STRIDE, RANGES, FCOSCriterion, id_probabilities
from vis.modeling.detectors.base import Detector, FrameDetections, Positives, Pyramid
from vis.modeling.heads.condinst import WIDTHS, MaskBranch, dynamic_logits
from vis.modeling.heads.fcos import FCOSHead, FCOSOutputs, locations_of, rows
from vis.modeling.registry import DETECTOR_REGISTRY

_LEVELS = ("p3", "p4", "p5", "p6", "p7")
_STRIDES = (8, 16, 32, 64, 128)
# Of the levels, those that the mask branch reads.
_MASK_LEVELS = 3
# Masks that are resized together: what that needs beside the result is a few times their size.
_CHUNK = 16


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.CONDINST = node = CfgNode()
    # Channels of the pyramid and of the towers.
    node.DIM = 256
    # Depth of the towers of classes and of boxes.
    node.NUM_CONVS = 4
    # Depth of the embedding tower, for methods that ask for one.
    node.EMBED_CONVS = 4
    # The mask branch.
    node.MASK_DIM = 128
    node.MASK_CONVS = 4
    # Its norms: BN, with the statistics of a process's frames (of all time steps of its clips together), SyncBN, GN ...
    node.MASK_NORM = "BN"
    # Upper ends of the ranges of the levels: largest distance, in pixels, from a location to a side of its box.
    node.RANGES = list(RANGES[:-1])
    # Masks of at most so many positives of a frame are trained (AdelaiDet: 64); 0, as IAI, trains all.
    node.MAX_POSITIVES = 0


class FCOSProposals(nn.Module):
    """Gives the head the name that it has in AdelaiDet."""

    def __init__(self, head: FCOSHead) -> None:
        super().__init__()
        self.fcos_head = head


@DETECTOR_REGISTRY.register()
class CondInst(Detector):
    """Backbone, pyramid, head and mask branch; see :class:`~vis.modeling.detectors.base.Detector`."""

    @configurable
    def __init__(
        self,
        *,
        backbone: SplitFPN,
        head: FCOSHead,
        mask_branch: MaskBranch,
        criterion: FCOSCriterion,
        num_classes: int,
        class_threshold: float,
        id_threshold: float,
        nms_iou: float,
        candidates_per_level: int,
        max_detections: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = FCOSProposals(head)
        self.mask_branch, self.criterion = mask_branch, criterion
        self.num_classes, self.num_ids = num_classes, head.num_ids
        self.res5_channels = backbone.last_channels
        self.size_divisibility = max(backbone.bottom_up.size_divisibility, 32)
        self.class_threshold, self.id_threshold, self.nms_iou = class_threshold, id_threshold, nms_iou
        self.candidates_per_level, self.max_detections = candidates_per_level, max_detections

    @classmethod
    def from_config(
        cls, cfg: CfgNode, *, num_ids: int = 0, id_convs: int = 1, id_loss: str = "focal", embed_dim: int = 0
    ) -> dict[str, Any]:
        node, shared = cfg.MODEL.CONDINST, cfg.MODEL.DETECTOR
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if len(node.RANGES) != len(_LEVELS) - 1:
            raise ValueError(
                f"MODEL.CONDINST.RANGES has {len(node.RANGES)} ends, expected {len(_LEVELS) - 1}: one for each of "
                f"{', '.join(_LEVELS[:-1])}, that of {_LEVELS[-1]} being open"
            )
        return {
            "backbone": build_fpn(
                cfg,
                in_features=("res3", "res4", "res5"),
                out_channels=node.DIM,
                top="p6p7",
                norm_eval=shared.NORM_EVAL,
            ),
            "head": FCOSHead(
                in_channels=node.DIM,
                num_classes=num_classes,
                num_params=num_parameters(WIDTHS),
                num_convs=node.NUM_CONVS,
                strides=_STRIDES,
                num_ids=num_ids,
                id_convs=id_convs,
                embed_dim=embed_dim,
                embed_convs=node.EMBED_CONVS,
            ),
            "mask_branch": MaskBranch(
                in_channels=node.DIM,
                channels=node.MASK_DIM,
                num_levels=_MASK_LEVELS,
                num_convs=node.MASK_CONVS,
                norm=node.MASK_NORM,
            ),
            "criterion": FCOSCriterion(
                num_classes=num_classes,
                num_ids=num_ids,
                id_loss=id_loss,
                strides=_STRIDES,
                ranges=(*node.RANGES, RANGES[-1]),
                max_positives=node.MAX_POSITIVES,
            ),
            "num_classes": num_classes,
            "class_threshold": shared.CLS_THR,
            "id_threshold": shared.ID_THR,
            "nms_iou": shared.NMS,
            "candidates_per_level": shared.NMS_PRE,
            "max_detections": shared.TOPK,
        }

    def bottom_up(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised and padded frames (N, 3, H, W) -> the backbone's maps."""
        return self.backbone.bottom_up(images)

    def top_down(self, features: Pyramid) -> dict[str, Tensor]:
        """res3, res4 and res5 (or what replaces it) -> p3..p7, (N, C, H/8, W/8) to (N, C, H/128, W/128)."""
        return self.backbone.top_down(features)

    def head(self, pyramid: Pyramid) -> FCOSOutputs:
        """What every location predicts."""
        outputs: FCOSOutputs = self.proposal_generator.fcos_head([pyramid[name] for name in _LEVELS])
        return outputs

    def mask_features(self, pyramid: Pyramid) -> Tensor:
        """(N, 8, H/8, W/8)."""
        features: Tensor = self.mask_branch([pyramid[name] for name in _LEVELS[:_MASK_LEVELS]])
        return features

    def losses_and_positives(
        self,
        pyramid: Pyramid,
        targets: Sequence[Instances],
        padded_size: tuple[int, int],
        *,
        groups: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Positives]:
        """See :class:`~vis.modeling.detectors.base.Detector`; positives are locations."""
        outputs = self.head(pyramid)
        losses, found = self.criterion(outputs, self.mask_features(pyramid), targets, groups)
        embeds = rows(outputs.embeds)[found.frames, found.locations] if outputs.embeds else None
        return losses, Positives(found.frames, found.instances, embeds)

    def target_counts(
        self, targets: Sequence[Instances], padded_size: tuple[int, int], *, groups: Tensor | None = None
    ) -> dict[str, Tensor] | None:
        """See :class:`~vis.modeling.detectors.base.Detector`."""
        sizes = [(padded_size[0] // stride, padded_size[1] // stride) for stride in _STRIDES[:_MASK_LEVELS]]
        while len(sizes) < len(_LEVELS):  # by convolutions of stride 2
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return self.criterion.target_counts(targets, sizes, groups)

    def detect(
        self,
        pyramid: Pyramid,
        image_size: tuple[int, int],
        *,
        weights: tuple[float, float] = (1.0, 0.0),
        scale: tuple[float, float] | None = None,
    ) -> FrameDetections:
        """See :class:`~vis.modeling.detectors.base.Detector`. The rank is ctr * (w0 * best class + w1 * best id)."""
        outputs = self.head(pyramid)
        rows_of = self._candidates(outputs)
        locations = locations_of(outputs.logits, _STRIDES)
        classes = rows(outputs.logits)[0, rows_of].float().sigmoid()
        center = rows(outputs.centerness)[0, rows_of, 0].float().sigmoid()
        best = classes.amax(dim=1)
        chosen, rank = best > self.class_threshold, weights[0] * best
        ids = self._id_probabilities(outputs, rows_of)
        if ids is not None:
            best_id = ids.amax(dim=1)
            chosen, rank = chosen & (best_id > self.id_threshold), rank + weights[1] * best_id
        kept = chosen.nonzero()[:, 0]
        candidates = len(kept)
        rank = (center * rank)[kept]
        points = locations.points[rows_of[kept]]
        boxes = self._boxes(rows(outputs.boxes)[0, rows_of[kept]], points, image_size)
        in_original = boxes if scale is None else boxes / boxes.new_tensor([*scale, *scale])
        survivors = nms(in_original, rank, self.nms_iou)[: self.max_detections]
        kept = kept[survivors]
        at = rows_of[kept]
        return FrameDetections(
            boxes=boxes[survivors],
            scores=rank[survivors],
            class_probs=classes[kept] * center[kept, None],
            id_probs=None if ids is None else ids[kept],
            embeds=rows(outputs.embeds)[0, at] if outputs.embeds else None,
            mask_inputs={
                "params": rows(outputs.params)[0, at],
                "points": points[survivors],
                "strides": locations.strides[at],
            },
            candidates=candidates,
        )

    def _id_probabilities(self, outputs: FCOSOutputs, rows_of: Tensor) -> Tensor | None:
        if not outputs.ids:
            return None
        return id_probabilities(rows(outputs.ids)[0, rows_of].float(), self.criterion.id_loss)

    def _candidates(self, outputs: FCOSOutputs) -> Tensor:
        """(m,) locations: of each level the best ones by class times centerness, all of a small level."""
        chosen, start = [], 0
        for logits, center in zip(outputs.logits, outputs.centerness, strict=True):
            scores = (logits[0].float().amax(dim=0).sigmoid() * center[0, 0].float().sigmoid()).flatten()
            count = len(scores)
            if count > self.candidates_per_level:
                chosen.append(scores.topk(self.candidates_per_level).indices + start)
            else:
                chosen.append(torch.arange(start, start + count, device=scores.device))
            start += count
        return torch.cat(chosen)

    @staticmethod
    def _boxes(distances: Tensor, points: Tensor, image_size: tuple[int, int]) -> Tensor:
        """(n, 4) corners inside the image."""
        boxes = torch.cat([points - distances[:, :2], points + distances[:, 2:]], dim=1)
        height, width = image_size
        return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))

    def mask_probs(self, found: FrameDetections, pyramid: Pyramid, padded_size: tuple[int, int]) -> Tensor:
        """(n, H, W) foreground probabilities: resized from stride 8 to 4 as logits, from there as probabilities."""
        height, width = padded_size
        full = found.scores.new_zeros(len(found), height, width)
        if not len(found):
            return full
        params, points, strides = (found.mask_inputs[name] for name in ("params", "points", "strides"))
        frames = torch.zeros(len(found), dtype=torch.int64, device=params.device)
        logits = dynamic_logits(self.mask_features(pyramid), params, frames, points, strides)
        for i in range(0, len(found), _CHUNK):
            small = logits[i : i + _CHUNK, None].float().sigmoid()
            full[i : i + _CHUNK] = aligned_bilinear(small, MASK_STRIDE)[:, 0, :height, :width]
        return full
