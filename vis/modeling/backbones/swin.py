"""Swin Transformer (Liu et al., ICCV 2021): detectron2's, as the released weights need it, with outputs res2..res5."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vis.config import declare
from vis.layers.linear import Linear

_STAGES = ("res2", "res3", "res4", "res5")


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.SWIN = node = CfgNode()
    node.PRETRAIN_IMG_SIZE = 224
    node.PATCH_SIZE = 4
    node.EMBED_DIM = 96
    node.DEPTHS = [2, 2, 6, 2]
    node.NUM_HEADS = [3, 6, 12, 24]
    node.WINDOW_SIZE = 7
    node.MLP_RATIO = 4.0
    node.QKV_BIAS = True
    node.QK_SCALE = None
    node.DROP_RATE = 0.0
    node.ATTN_DROP_RATE = 0.0
    node.DROP_PATH_RATE = 0.3
    node.APE = False
    node.PATCH_NORM = True
    node.OUT_FEATURES = list(_STAGES)
    # Recompute the blocks in the backward pass instead of keeping their activations.
    node.USE_CHECKPOINT = False


class FusedWindowAttention(WindowAttention):
    """Attention in windows by torch's fused kernel where no gradient is wanted.

    With one, the fused kernel does not give that of the position table on CPUs, and torch's way around it is slower
    than the plain formula.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N windows, L, C) -> the same; ``mask`` (windows of a picture, L, L) is added to the scores."""
        if torch.is_grad_enabled():
            return super().forward(x, mask)
        windows, length, _ = x.shape
        q, k, v = self.qkv(x).view(windows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = table.view(length, length, -1).permute(2, 0, 1)[None]  # (1, heads, L, L)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(windows // len(mask), 1, 1, 1)
        bias = bias.to(q.dtype).expand(windows, -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class RecomputedBlock(SwinTransformerBlock):
    """A block whose activations are computed again in the backward pass.

    detectron2's own switch takes torch's reentrant way, which gives the first blocks no gradient if what is below them
    needs none, and which torch is about to refuse.
    """

    H: int
    W: int

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        """(N, h*w, C) -> (N, h*w, C)."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x, mask_matrix)
        size = self.H, self.W  # as they are now: another picture may come before the backward pass

        def run(x: Tensor) -> Tensor:
            self.H, self.W = size
            return SwinTransformerBlock.forward(self, x, mask_matrix)

        return checkpoint(run, x, use_reentrant=False)


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(SwinTransformer):
    """detectron2's Swin Transformer with the stage names of the VIS family."""

    @configurable
    def __init__(self, *, out_features: list[str], use_checkpoint: bool = False, **swin: Any) -> None:
        """Args:
        out_features: among res2..res5.
        use_checkpoint: recompute the blocks in the backward pass.
        swin: the rest, as detectron2's ``SwinTransformer`` takes it.
        """
        unknown = [name for name in out_features if name not in _STAGES]
        if unknown:
            raise ValueError(f"MODEL.SWIN.OUT_FEATURES names {unknown}; there are {', '.join(_STAGES)}")
        super().__init__(out_indices=[i for i, name in enumerate(_STAGES) if name in out_features], **swin)
        self._out_features = [name for name in _STAGES if name in out_features]
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear  # the same layer, faster on CPUs
            elif type(module) is WindowAttention:
                module.__class__ = FusedWindowAttention
            elif use_checkpoint and type(module) is SwinTransformerBlock:
                module.__class__ = RecomputedBlock

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.SWIN
        return {
            "out_features": list(node.OUT_FEATURES),
            "pretrain_img_size": node.PRETRAIN_IMG_SIZE,
            "patch_size": node.PATCH_SIZE,
            "in_chans": input_shape.channels,
            "embed_dim": node.EMBED_DIM,
            "depths": node.DEPTHS,
            "num_heads": node.NUM_HEADS,
            "window_size": node.WINDOW_SIZE,
            "mlp_ratio": node.MLP_RATIO,
            "qkv_bias": node.QKV_BIAS,
            "qk_scale": node.QK_SCALE,
            "drop_rate": node.DROP_RATE,
            "attn_drop_rate": node.ATTN_DROP_RATE,
            "drop_path_rate": node.DROP_PATH_RATE,
            "ape": node.APE,
            "patch_norm": node.PATCH_NORM,
            "use_checkpoint": node.USE_CHECKPOINT,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> res2..res5, (N, c, H/4, W/4) to (N, 8c, H/32, W/32)."""
        stages = super().forward(x)
        return {name: stages[f"p{i}"] for i, name in enumerate(_STAGES) if name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        """Frames are padded to a multiple of this, so that every stage halves evenly."""
        return 32

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        index = {name: _STAGES.index(name) for name in self._out_features}
        return {name: ShapeSpec(channels=self.num_features[i], stride=2 ** (i + 2)) for name, i in index.items()}
