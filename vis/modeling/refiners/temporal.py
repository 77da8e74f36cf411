"""The temporal refiner (Zhang et al., DVIS, ICCV 2023, section 3.3): tracks of a whole video, looked at once more.

There is no code of time anywhere: order is known to the short convolutions alone.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.config import declare
from vis.layers.attention import FFNLayer, SelfAttentionLayer
from vis.layers.linear import Linear
from vis.layers.mlp import MLP
from vis.layers.referring_attention import ReferringAttentionLayer
from vis.modeling.registry import REFINER_REGISTRY
from vis.structures import RefinerOutput

# Queries (of some frames, or of some tracks) that are computed together at test time: what a layer needs beside its
# input and output, which is the width of its FFN above all, then does not grow with the video.
_TOKENS_AT_ONCE = 2048


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.REFINER = type(cfg)()
    cfg.MODEL.REFINER.NAME = "TemporalRefiner"
    cfg.MODEL.REFINER.DECODER_LAYERS = 6


@REFINER_REGISTRY.register()
class TemporalRefiner(nn.Module):
    """Attention along time, short convolutions, attention among objects, attention to each frame's queries, FFN.

    Every step is followed by its residual and layer norm. Parameter names are those of the release.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        mask_dim: int,
        num_heads: int,
        feedforward_dim: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        """Raises:
        ValueError: there is no layer.
        """
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"MODEL.REFINER.DECODER_LAYERS is {num_layers}, expected at least 1")
        attention: dict[str, Any] = {"embed_dim": embed_dim, "num_heads": num_heads, "dropout": dropout}
        self.transformer_time_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(**attention) for _ in range(num_layers)
        )
        self.conv_short_aggregate_layers = nn.ModuleList(
            nn.Sequential(_conv(embed_dim, 5), nn.ReLU(inplace=True), _conv(embed_dim, 3)) for _ in range(num_layers)
        )
        self.conv_norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(num_layers))
        self.transformer_obj_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(**attention) for _ in range(num_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            ReferringAttentionLayer(**attention) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(embed_dim=embed_dim, hidden_dim=feedforward_dim, dropout=dropout) for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.class_embed = Linear(embed_dim, num_classes + 1)
        self.mask_embed = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=mask_dim)
        self.activation_proj = Linear(embed_dim, 1)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        former = cfg.MODEL.MASK_FORMER
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "embed_dim": former.HIDDEN_DIM * (2 if former.REID_BRANCH else 1),
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "num_heads": former.NHEADS,
            "feedforward_dim": former.DIM_FEEDFORWARD,
            "num_layers": cfg.MODEL.REFINER.DECODER_LAYERS,
            "dropout": former.DROPOUT,
        }

    def forward(self, track_embeds: Tensor, frame_memory: Tensor) -> RefinerOutput:
        """Refine B videos of T frames.

        Args:
            track_embeds: (B, T, Q, C), the tracker's, slot q the same object in every frame.
            frame_memory: (B, T, Q, C), the queries of each frame, in any order.

        Returns:
            Predictions of every layer in training, of the last in eval mode.
        """
        if not track_embeds.shape[1]:
            raise ValueError("the refiner was given no frame")
        in_parts = not (self.training or torch.is_grad_enabled())
        x = track_embeds.clone() if in_parts else track_embeds
        layers: list[Tensor] = []
        for i in range(len(self.transformer_ffn_layers)):
            x = self._layer_in_parts(i, x, frame_memory) if in_parts else self._layer(i, x, frame_memory)
            layers = [*layers, x] if self.training else [x]
        normed = self.decoder_norm(torch.stack(layers) if self.training else x[None])  # (L, B, T, Q, C)
        del x, layers
        return RefinerOutput(
            pred_logits=self.class_embed(self._pool(normed)),
            mask_embeds=self._mask_embeds_in_parts(normed) if in_parts else self.mask_embed(normed),
            pred_embeds=normed[-1],
        )

    def _layer(self, i: int, x: Tensor, memory: Tensor) -> Tensor:
        return self._in_frames(i, self._in_tracks(i, x), memory)

    def _layer_in_parts(self, i: int, x: Tensor, memory: Tensor) -> Tensor:
        """One layer on (B, T, Q, C), in place, so that a long video needs little more than ``x``.

        Tracks do not see one another along time, nor frames while objects interact: parts do not change the result.
        """
        size = self._at_once(x[:, :, 0])
        for tracks in x.split(size, dim=2):
            tracks.copy_(self._in_tracks(i, tracks))
        size = self._at_once(x[:, 0])
        for frames, seen in zip(x.split(size, dim=1), memory.split(size, dim=1), strict=True):
            frames.copy_(self._in_frames(i, frames, seen))
        return x

    def _mask_embeds_in_parts(self, normed: Tensor) -> Tensor:
        size = self._at_once(normed[0, :, 0])
        first, *others = normed.split(size, dim=2)
        embeds = self.mask_embed(first)
        out = embeds.new_empty(*normed.shape[:-1], embeds.shape[-1])
        out[:, :, :size] = embeds
        for part, rows in zip(others, out.split(size, dim=2)[1:], strict=True):
            rows.copy_(self.mask_embed(part))
        return out

    @staticmethod
    def _at_once(one: Tensor) -> int:
        """How many tracks, or frames, are computed together where ``one`` of all videos is (B, tokens, C)."""
        return max(1, _TOKENS_AT_ONCE // (one.shape[0] * one.shape[1]))

    def _in_tracks(self, i: int, x: Tensor) -> Tensor:
        """Each track by itself: all frames attend to all, then neighbours are mixed. (B, T, N, C) -> the same."""
        tracks = x.transpose(1, 2)  # (B, N, T, C)
        # Fused attention: the T x T weights of a long video are never stored.
        flat = self.transformer_time_self_attention_layers[i](tracks.flatten(0, 1))  # (B*N, T, C)
        mixed = self.conv_short_aggregate_layers[i](flat.transpose(1, 2)).transpose(1, 2)
        return self.conv_norms[i](flat + mixed).unflatten(0, tracks.shape[:2]).transpose(1, 2)

    def _in_frames(self, i: int, x: Tensor, memory: Tensor) -> Tensor:
        """Each frame by itself: objects attend to one another, then to the memory. (B, F, Q, C) -> the same."""
        frames = self.transformer_obj_self_attention_layers[i](x.flatten(0, 1))
        frames = self.transformer_cross_attention_layers[i](frames, frames, memory.flatten(0, 1))
        return self.transformer_ffn_layers[i](frames).view_as(x)

    def _pool(self, normed: Tensor) -> Tensor:
        """Weighted mean over the frames, (L, B, T, Q, C) -> (L, B, Q, C)."""
        return (self.activation_proj(normed).softmax(dim=2) * normed).sum(dim=2)


def _conv(channels: int, kernel: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel, padding="same", padding_mode="replicate")
