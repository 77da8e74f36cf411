"""Build a backbone by name.

ResNets (He et al., CVPR 2016) come from detectron2 as they are: ``build_resnet_backbone`` with ``MODEL.RESNETS.*``.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from vis.config import declare
from vis.modeling.registry import lookup


@declare
def add_config(cfg: CfgNode) -> None:
    # The family uses ResNets with the stride in the 3x3 convolution, frozen statistics and no frozen stage.
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]


def build_backbone(cfg: CfgNode) -> Backbone:
    """The backbone that ``MODEL.BACKBONE.NAME`` names, for RGB frames; its forward gives res2..res5."""
    builder = lookup(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
    return builder(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
