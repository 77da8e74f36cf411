"""The segmentation head of the Mask2Former family: a pixel decoder and a transformer decoder, each by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from vis.config import declare
from vis.modeling.registry import PIXEL_DECODER_REGISTRY, TRANSFORMER_DECODER_REGISTRY, lookup
from vis.modeling.transformer_decoders.masked import DecoderOutput


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.SEM_SEG_HEAD.NAME = "MaskFormerHead"
    # 0: as many as the data set has.
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 0


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(nn.Module):
    """Backbone features of N frames to the predictions of Q queries in each."""

    @configurable
    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        if head.NUM_CLASSES < 1:
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 0 and no data set in DATASETS.TRAIN or TEST gives it; set it"
            )
        decoder = lookup(PIXEL_DECODER_REGISTRY, head.PIXEL_DECODER_NAME, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME")
        name = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
        predictor = lookup(TRANSFORMER_DECODER_REGISTRY, name, "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME")
        return {
            "pixel_decoder": decoder(cfg, input_shape),
            "predictor": predictor(cfg, head.CONVS_DIM),
            "num_classes": head.NUM_CLASSES,
        }

    def forward(self, features: Mapping[str, Tensor]) -> DecoderOutput:
        """Backbone features (N, c, h, w) by name -> :class:`DecoderOutput` of N frames."""
        mask_features, memory = self.pixel_decoder(features)
        return self.predictor(memory, mask_features)
