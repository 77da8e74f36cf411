"""The per-frame segmenter: backbone and head. MinVIS trains it; other methods build it by the same function."""

from __future__ import annotations

from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, Backbone
from torch import nn

from vis.layers.linear import speed_up_pointwise
from vis.modeling.backbones.build import build_backbone
from vis.modeling.registry import lookup
from vis.modeling.segmenter.frames import FrameNormalizer


class Segmenter(NamedTuple):
    """Parts of a segmenter. A meta-architecture keeps them under these names, which are those of released weights."""

    backbone: Backbone
    sem_seg_head: nn.Module
    normalizer: FrameNormalizer


def build_segmenter(cfg: CfgNode) -> Segmenter:
    """Backbone, head and frame normalisation that the configuration names, with initial weights."""
    backbone = build_backbone(cfg)
    head_class = lookup(SEM_SEG_HEADS_REGISTRY, cfg.MODEL.SEM_SEG_HEAD.NAME, "MODEL.SEM_SEG_HEAD.NAME")
    sem_seg_head = head_class(cfg, backbone.output_shape())
    for part in (backbone, sem_seg_head):
        speed_up_pointwise(part)
    divisibility = max(cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY, backbone.size_divisibility, 1)
    normalizer = FrameNormalizer(
        pixel_mean=cfg.MODEL.PIXEL_MEAN, pixel_std=cfg.MODEL.PIXEL_STD, size_divisibility=divisibility
    )
    return Segmenter(backbone, sem_seg_head, normalizer)
