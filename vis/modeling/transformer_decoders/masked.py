"""The masked-attention transformer decoder (Cheng et al., Mask2Former, CVPR 2022, section 3.2), frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.config import declare
from vis.layers.attention import CrossAttentionLayer, FFNLayer, SelfAttentionLayer
from vis.layers.mlp import MLP
from vis.layers.position_encoding import sine_position_encoding
from vis.modeling.registry import TRANSFORMER_DECODER_REGISTRY


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.MASK_FORMER = node = type(cfg)()
    node.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    node.HIDDEN_DIM = 256
    node.NUM_OBJECT_QUERIES = 100
    node.NHEADS = 8
    node.DIM_FEEDFORWARD = 2048
    # Counts the prediction on the initial queries too: 10 means nine layers.
    node.DEC_LAYERS = 10
    node.DROPOUT = 0.0
    node.PRE_NORM = False
    node.ENFORCE_INPUT_PROJ = False
    # A second embedding of every query for telling objects apart (CTVIS, DVIS++), appended to what tracking uses.
    node.REID_BRANCH = False
    _add_training_config(node)
    _add_test_config(node)


def _add_training_config(node: CfgNode) -> None:
    node.DEEP_SUPERVISION = True
    node.NO_OBJECT_WEIGHT = 0.1
    node.CLASS_WEIGHT = 2.0
    node.MASK_WEIGHT = 5.0
    node.DICE_WEIGHT = 5.0
    node.TRAIN_NUM_POINTS = 12544
    node.OVERSAMPLE_RATIO = 3.0
    node.IMPORTANCE_SAMPLE_RATIO = 0.75
    # Frames are padded to a multiple of this.
    node.SIZE_DIVISIBILITY = 32


def _add_test_config(node: CfgNode) -> None:
    node.TEST = type(node)()
    # Frames per pass of the network. The result is the same for every size; memory is not.
    node.TEST.WINDOW_SIZE = 4
    # Kept for released files: inference is always windowed.
    node.TEST.WINDOW_INFERENCE = True
    # (query, class) pairs reported per video.
    node.TEST.MAX_NUM = 10
    # Multiply the class score by the mean probability inside the mask, as the image model is evaluated on COCO.
    node.TEST.MASK_SCORE = False


class LayerPrediction(TypedDict):
    """Logits (N, Q, K+1) and mask embeddings (N, Q, C) of one layer for N frames."""

    pred_logits: Tensor
    mask_embeds: Tensor


class DecoderOutput(TypedDict, total=False):
    """What the decoder says of N frames with Q queries.

    ``pred_logits`` (N, Q, K+1), ``pred_embeds`` (N, Q, C) the normalised queries that tracking compares, ``raw_embeds``
    (N, Q, C) the same before normalisation, ``mask_embeds`` (N, Q, C), ``mask_features`` (N, C, h, w): a query's mask
    logits are the inner product of the last two, made where somebody reads them. ``aux_outputs``: the earlier
    predictions, in training with deep supervision. With a reid branch its ``reid_embeds`` (N, Q, C) are appended to
    ``pred_embeds`` and ``raw_embeds``, which are (N, Q, 2C) then.
    """

    pred_logits: Tensor
    pred_embeds: Tensor
    raw_embeds: Tensor
    reid_embeds: Tensor
    mask_embeds: Tensor
    mask_features: Tensor
    aux_outputs: list[LayerPrediction]


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Queries look at one memory level per layer, each only where the mask it predicted so far is."""

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        num_heads: int,
        feedforward_dim: int,
        num_layers: int,
        num_levels: int,
        mask_dim: int,
        dropout: float,
        pre_norm: bool,
        enforce_input_proj: bool,
        deep_supervision: bool,
        reid_branch: bool = False,
    ) -> None:
        """Args: ``num_layers`` real layers; ``num_levels`` memory levels, used in turn, coarse to fine."""
        super().__init__()
        self.num_heads, self.num_layers, self.num_levels = num_heads, num_layers, num_levels
        self.deep_supervision = deep_supervision
        attention: dict[str, Any] = {
            "embed_dim": hidden_dim,
            "num_heads": num_heads,
            "dropout": dropout,
            "pre_norm": pre_norm,
        }
        feedforward: dict[str, Any] = {
            "embed_dim": hidden_dim,
            "hidden_dim": feedforward_dim,
            "dropout": dropout,
            "pre_norm": pre_norm,
        }
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(**attention) for _ in range(num_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(**attention) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(**feedforward) for _ in range(num_layers))
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        project = in_channels != hidden_dim or enforce_input_proj
        self.input_proj = nn.ModuleList(
            nn.Conv2d(in_channels, hidden_dim, 1) if project else nn.Sequential() for _ in range(num_levels)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(input_dim=hidden_dim, hidden_dim=hidden_dim, output_dim=mask_dim)
        reid = MLP(input_dim=hidden_dim, hidden_dim=hidden_dim, output_dim=hidden_dim) if reid_branch else None
        self.reid_embed = reid

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        node = cfg.MODEL.MASK_FORMER
        if node.DEC_LAYERS < 2:
            raise ValueError(f"MODEL.MASK_FORMER.DEC_LAYERS is {node.DEC_LAYERS}; it needs at least 2 (one real layer)")
        return {
            "in_channels": in_channels,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": node.HIDDEN_DIM,
            "num_queries": node.NUM_OBJECT_QUERIES,
            "num_heads": node.NHEADS,
            "feedforward_dim": node.DIM_FEEDFORWARD,
            "num_layers": node.DEC_LAYERS - 1,
            "num_levels": len(cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES),
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "dropout": node.DROPOUT,
            "pre_norm": node.PRE_NORM,
            "enforce_input_proj": node.ENFORCE_INPUT_PROJ,
            "deep_supervision": node.DEEP_SUPERVISION,
            "reid_branch": node.REID_BRANCH,
        }

    def forward(self, memory: Sequence[Tensor], mask_features: Tensor) -> DecoderOutput:
        """Memory maps (N, C, h_l, w_l), coarse to fine, and mask features (N, C, h, w) -> :class:`DecoderOutput`."""
        n = mask_features.shape[0]
        levels, positions = self._prepare(memory)
        # Mask logits at a level are a resize of <embedding, features>; both are linear, so resizing the features once
        # and taking the product there gives the same mask for a fraction of the work.
        small = [
            F.interpolate(mask_features, size=x.shape[-2:], mode="bilinear", align_corners=False).flatten(2).detach()
            for x in memory
        ]  # (N, C, h_l*w_l)
        query_pos = self.query_embed.weight
        x = self.query_feat.weight.expand(n, -1, -1)  # (N, Q, C)
        with_aux = self.training and self.deep_supervision
        aux_outputs: list[LayerPrediction] = []
        for i in range(self.num_layers):
            level = i % self.num_levels
            normed = self.decoder_norm(x)
            mask_embeds = self.mask_embed(normed)
            if with_aux:
                aux_outputs.append({"pred_logits": self.class_embed(normed), "mask_embeds": mask_embeds})
            allowed = attention_mask(mask_embeds, small[level])
            x = self.transformer_cross_attention_layers[i](
                x, levels[level], query_pos=query_pos, memory_pos=positions[level], allowed=allowed
            )
            x = self.transformer_self_attention_layers[i](x, query_pos)
            x = self.transformer_ffn_layers[i](x)
        normed = self.decoder_norm(x)
        output: DecoderOutput = {
            "pred_logits": self.class_embed(normed),
            "pred_embeds": normed,
            "raw_embeds": x,
            "mask_embeds": self.mask_embed(normed),
            "mask_features": mask_features,
            "aux_outputs": aux_outputs,
        }
        if self.reid_embed is not None:
            reid = output["reid_embeds"] = self.reid_embed(normed)
            output["pred_embeds"], output["raw_embeds"] = torch.cat([normed, reid], -1), torch.cat([x, reid], -1)
        return output

    def _prepare(self, memory: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        levels, positions = [], []
        for x, projection, embed in zip(memory, self.input_proj, self.level_embed.weight, strict=True):
            projected = projection(x)
            height, width = int(x.shape[2]), int(x.shape[3])
            levels.append(projected.flatten(2).transpose(1, 2) + embed)  # (N, h*w, C)
            pos = sine_position_encoding(height, width, int(projected.shape[1]), x.device)
            positions.append(pos.flatten(2).transpose(1, 2))  # (1, h*w, C)
        return levels, positions


@torch.no_grad()
def attention_mask(mask_embeds: Tensor, features: Tensor) -> Tensor:
    """Where each query may look next: inside its own mask, or everywhere while that is empty.

    Args:
        mask_embeds: (N, Q, C); features: (N, C, L), the mask features at the size of the memory level.

    Returns:
        (N, 1, Q, L) bool.
    """
    allowed = torch.bmm(mask_embeds, features.to(mask_embeds.dtype)) >= 0
    return (allowed | ~allowed.any(dim=-1, keepdim=True))[:, None]


def predict_masks(mask_embeds: Tensor, mask_features: Tensor) -> Tensor:
    """Mask logits (N, Q, h, w) of embeddings (N, Q, C) on features (N, C, h, w)."""
    return torch.bmm(mask_embeds, mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])
