"""VITA's module over the object queries of all frames (Heo et al., NeurIPS 2022, section 3.2).

It sees no picture: an encoder lets the queries of neighbouring frames talk, a decoder lets the video's own queries look
at all of them. A video query has a class and a mask embedding, whose product with a frame's mask features is its mask.

The encoder attends within windows of W frames, which every other layer shifts by half. The released code pads the video
to whole windows, rolls it and masks what does not belong together; groups of frames that attend among themselves give
the same numbers without any of it: floor(t/W), and floor((t + ceil(W/2))/W) in shifted layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.layers.attention import CrossAttentionLayer, FFNLayer, SelfAttentionLayer
from vis.layers.linear import Linear, PointwiseConv2d
from vis.layers.mlp import MLP

# Frames that pass an encoder layer together: more would only widen the FFN's intermediate values.
_FRAMES_AT_ONCE = 36


@dataclass
class VitaOutput:
    """What the module says of B clips, for queries of the last L layers of the frame decoder.

    Attributes:
        pred_logits: (D, L, B, Q, K+1), in training of every decoder layer, in eval mode of the last alone (D = 1).
        mask_embeds: (D, L, B, Q, Cm).
        clip_embeds: (L, B, Q, C), of the last decoder layer, for telling objects apart.
        frame_embeds: (L, B, T, F, C), the same of the F queries of each frame; in training only, else None.
    """

    pred_logits: Tensor
    mask_embeds: Tensor
    clip_embeds: Tensor
    frame_embeds: Tensor | None


class VitaModule(nn.Module):
    """Encoder and decoder of object tokens; parameters are named as in the released weights."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        num_frame_queries: int,
        num_queries: int,
        in_dim: int,
        feature_dim: int,
        hidden_dim: int,
        mask_dim: int,
        num_heads: int,
        feedforward_dim: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        window_size: int,
        shift_in_training: bool,
        dropout: float,
        pre_norm: bool,
        enforce_input_proj: bool,
        deep_supervision: bool,
    ) -> None:
        """Args:
        in_dim: channels of frame queries; feature_dim: of the maps that :meth:`mask_features` takes.
        window_size: frames of an encoder window, 0 for one window over the whole video.
        shift_in_training: shift windows in training too; released models shift at test time alone.
        """
        super().__init__()
        if num_encoder_layers < 1 or num_decoder_layers < 1 or window_size < 0:
            raise ValueError(
                f"MODEL.VITA: ENC_LAYERS {num_encoder_layers} and DEC_LAYERS {num_decoder_layers} must be at least 1, "
                f"ENC_WINDOW_SIZE {window_size} at least 0 (0: no windows)"
            )
        self.window_size, self.shift_in_training = window_size, shift_in_training
        self.deep_supervision = deep_supervision
        layer: dict[str, Any] = {"embed_dim": hidden_dim, "dropout": dropout, "pre_norm": pre_norm}
        attention, feedforward = {**layer, "num_heads": num_heads}, {**layer, "hidden_dim": feedforward_dim}
        self.enc_self_attn = nn.ModuleList(SelfAttentionLayer(**attention) for _ in range(num_encoder_layers))
        self.enc_ffn = nn.ModuleList(FFNLayer(**feedforward) for _ in range(num_encoder_layers))
        layers = range(num_decoder_layers)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttentionLayer(**attention) for _ in layers)
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(**attention) for _ in layers)
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(**feedforward) for _ in layers)
        self.vita_mask_features = PointwiseConv2d(feature_dim, mask_dim, kernel_size=1)
        nn.init.kaiming_uniform_(self.vita_mask_features.weight, a=1)
        nn.init.zeros_(self.vita_mask_features.bias)  # type: ignore[arg-type]  # there is one: bias=True
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.fq_pos = nn.Embedding(num_frame_queries, hidden_dim)
        project = in_dim != hidden_dim or enforce_input_proj
        self.input_proj_dec = Linear(in_dim, hidden_dim) if project else nn.Identity()
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(input_dim=hidden_dim, hidden_dim=hidden_dim, output_dim=mask_dim)
        self.sim_embed_frame = Linear(hidden_dim, hidden_dim)
        self.sim_embed_clip = Linear(hidden_dim, hidden_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, head = cfg.MODEL.VITA, cfg.MODEL.SEM_SEG_HEAD
        return {
            "num_classes": head.NUM_CLASSES,
            "num_frame_queries": cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES,
            "num_queries": node.NUM_OBJECT_QUERIES,
            "in_dim": cfg.MODEL.MASK_FORMER.HIDDEN_DIM,
            "feature_dim": head.CONVS_DIM,
            "hidden_dim": node.HIDDEN_DIM,
            "mask_dim": head.MASK_DIM,
            "num_heads": node.NHEADS,
            "feedforward_dim": node.DIM_FEEDFORWARD,
            "num_encoder_layers": node.ENC_LAYERS,
            "num_decoder_layers": node.DEC_LAYERS,
            "window_size": node.ENC_WINDOW_SIZE,
            "shift_in_training": node.SHIFT_IN_TRAIN,
            "dropout": node.DROPOUT,
            "pre_norm": node.PRE_NORM,
            "enforce_input_proj": node.ENFORCE_INPUT_PROJ,
            "deep_supervision": node.DEEP_SUPERVISION,
        }

    def forward(self, frame_queries: Tensor) -> VitaOutput:
        """Queries (L, B, T, F, C) of all frames -> :class:`VitaOutput`."""
        return self.decode(self.encode(frame_queries))

    def mask_features(self, features: Tensor) -> Tensor:
        """The pixel decoder's finest map (N, C, h, w) -> what mask embeddings multiply, (N, Cm, h, w)."""
        return self.vita_mask_features(features)

    def encode(self, frame_queries: Tensor) -> Tensor:
        """(L, B, T, F, C) -> (L, B, T, F, C): every query knows those of the frames around it."""
        # Groups of a layer do not see one another: without gradients each is written over what it came from.
        in_place = not torch.is_grad_enabled()
        x = self.input_proj_dec(frame_queries).flatten(0, 1)  # (L*B, T, F, C)
        if in_place and isinstance(self.input_proj_dec, nn.Identity):
            x = x.clone()
        shifts = self.shift_in_training or not self.training
        for i, (attention, ffn) in enumerate(zip(self.enc_self_attn, self.enc_ffn, strict=True)):
            parts = []
            for start, size, count in frame_groups(x.shape[1], self.window_size, shifted=shifts and i % 2 == 1):
                part = x[:, start : start + size * count]
                groups = part.unflatten(1, (count, size)).flatten(2, 3).flatten(0, 1)  # (L*B*count, size*F, C)
                out = ffn(attention(groups)).view(part.shape)
                parts.append(part.copy_(out) if in_place else out)
            x = x if in_place else torch.cat(parts, dim=1)
        return x.unflatten(0, frame_queries.shape[:2])

    def decode(self, tokens: Tensor) -> VitaOutput:
        """Encoded tokens (L, B, T, F, C) -> :class:`VitaOutput`."""
        memory = tokens.flatten(0, 1).flatten(1, 2)  # (L*B, T*F, C)
        # One position per query of a frame, the same in all frames: nothing tells the order of time.
        memory_pos = self.fq_pos.weight.repeat(tokens.shape[2], 1)
        query_pos = self.query_embed.weight
        x = self.query_feat.weight.expand(len(memory), -1, -1)
        normed = []
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for cross_attention, self_attention, ffn in layers:
            x = ffn(self_attention(cross_attention(x, memory, query_pos=query_pos, memory_pos=memory_pos), query_pos))
            if self.training and self.deep_supervision:
                normed.append(self.decoder_norm(x))
        stacked = torch.stack(normed or [self.decoder_norm(x)]).unflatten(1, tokens.shape[:2])  # (D, L, B, Q, C)
        return VitaOutput(
            pred_logits=self.class_embed(stacked),
            mask_embeds=self.mask_embed(stacked),
            clip_embeds=self.sim_embed_clip(stacked[-1]),
            frame_embeds=self.sim_embed_frame(tokens) if self.training else None,
        )


def frame_groups(num_frames: int, window: int, *, shifted: bool) -> Iterator[tuple[int, int, int]]:
    """Groups of frames that attend among themselves, as (first frame, frames of a group, groups): equal ones together.

    Args:
        window: frames of a group, 0 for one group of all.
        shifted: the first group has only floor(window/2) frames; the last one may always be short.
    """
    if not window:
        yield 0, num_frames, 1
        return
    start = min(window // 2, num_frames) if shifted else 0
    if start:
        yield 0, start, 1
    whole, rest = divmod(num_frames - start, window)
    at_once = max(_FRAMES_AT_ONCE // window, 1)
    for first in range(0, whole, at_once):
        yield start + first * window, window, min(at_once, whole - first)
    if rest:
        yield num_frames - rest, rest, 1
