"""Backbones under the names that released configurations use: ResNet and Swin of detectron2, DINOv2 with an adapter."""

from __future__ import annotations

from vis.modeling.backbones.build import build_backbone
from vis.modeling.backbones.dinov2 import resize_patch_kernel
from vis.modeling.backbones.swin import D2SwinTransformer
from vis.modeling.backbones.vit_adapter import D2VitAdapterDinoV2

__all__ = ["D2SwinTransformer", "D2VitAdapterDinoV2", "build_backbone", "resize_patch_kernel"]
