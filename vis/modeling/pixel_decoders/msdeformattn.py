"""The multi-scale deformable attention pixel decoder (Cheng et al., Mask2Former, CVPR 2022, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vis.config import declare
from vis.layers.batch_former import BatchFormers
from vis.layers.linear import Linear
from vis.layers.ms_deform_attn import MSDeformAttn
from vis.layers.position_encoding import sine_position_encoding
from vis.modeling.pixel_decoders.batch_former import build_batch_former
from vis.modeling.registry import PIXEL_DECODER_REGISTRY

Shapes = list[tuple[int, int]]


@declare
def add_config(cfg: CfgNode) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    head.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    head.CONVS_DIM = 256
    head.MASK_DIM = 256
    head.NORM = "GN"
    head.COMMON_STRIDE = 4
    head.TRANSFORMER_ENC_LAYERS = 6
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8
    # The released models use 1024 whatever MASK_FORMER.DIM_FEEDFORWARD says.
    head.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD = 1024
    # Recompute the encoder in the backward pass instead of keeping its activations: less memory, a little more time.
    head.TRANSFORMER_ENC_CHECKPOINT = False


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward network; post-norm."""

    def __init__(
        self, *, embed_dim: int, feedforward_dim: int, num_levels: int, num_heads: int, num_points: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(
            embed_dim=embed_dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = Linear(embed_dim, feedforward_dim)
        self.linear2 = Linear(feedforward_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, pos: Tensor, reference_points: Tensor, shapes: Shapes, starts: list[int]) -> Tensor:
        """(N, S, C) -> (N, S, C); ``pos`` is added to the query only."""
        x = self.norm1(x + self.dropout(self.self_attn(x + pos, reference_points, x, shapes, starts)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Encoder(nn.Module):
    """A stack of :class:`EncoderLayer`."""

    def __init__(self, *, num_layers: int, use_checkpoint: bool, **layer: Any) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.layers = nn.ModuleList(EncoderLayer(**layer) for _ in range(num_layers))

    def forward(self, x: Tensor, pos: Tensor, shapes: Shapes, bf: BatchFormers | None = None) -> Tensor:
        """(N, S, C) -> (N, S, C); 2N with ``bf`` in training, see :class:`~vis.layers.batch_former.BatchFormers`."""
        starts = [0, *accumulate(h * w for h, w in shapes[:-1])]
        arguments = (pos, cell_centres(tuple(shapes), x.device), shapes, starts)

        def run(layer: nn.Module, x: Tensor) -> Tensor:
            if self.use_checkpoint and self.training:
                return checkpoint(layer, x, *arguments, use_reentrant=False)
            return layer(x, *arguments)

        for i, layer in enumerate(self.layers):
            x = run(layer, x) if bf is None else bf.run(i, partial(run, layer), x, shapes)
        return x


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
def cell_centres(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(1, S, 1, 2): the centre (x, y) in 0..1 of every cell of every level; cached, not to be changed in place."""
    points = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        points.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).view(-1, 2))
    return torch.cat(points)[None, :, None]


class DeformableTransformer(nn.Module):
    """Adds position and level to the levels and runs the encoder; holds the released parameter names."""

    def __init__(
        self, *, embed_dim: int, num_levels: int, num_layers: int, batch_former: BatchFormers | None, **layer: Any
    ) -> None:
        super().__init__()
        self.bf = batch_former
        self.encoder = Encoder(num_layers=num_layers, embed_dim=embed_dim, num_levels=num_levels, **layer)
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C, h_l, w_l), coarse to fine -> maps of the same sizes; 2N with a second stream."""
        shapes = [(int(x.shape[2]), int(x.shape[3])) for x in levels]
        tokens, positions = [], []
        for x, embed in zip(levels, self.level_embed, strict=True):
            pos = sine_position_encoding(int(x.shape[2]), int(x.shape[3]), int(x.shape[1]), x.device)
            positions.append(pos.flatten(2).transpose(1, 2) + embed)  # (1, h*w, C)
            tokens.append(x.flatten(2).transpose(1, 2))  # (N, h*w, C)
        out = self.encoder(torch.cat(tokens, dim=1), torch.cat(positions, dim=1), shapes, self.bf)
        split = out.split([h * w for h, w in shapes], dim=1)
        return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(split, shapes, strict=True)]


@PIXEL_DECODER_REGISTRY.register()
class MSDeformAttnPixelDecoder(nn.Module):
    """Backbone features to mask features at ``common_stride`` and three levels of memory."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        transformer_in_features: Sequence[str],
        conv_dim: int,
        mask_dim: int,
        norm: str,
        common_stride: int,
        num_encoder_layers: int,
        encoder_checkpoint: bool,
        num_heads: int,
        num_points: int,
        feedforward_dim: int,
        dropout: float,
        batch_former: BatchFormers | None = None,
    ) -> None:
        """Args:
        input_shape: channels and stride of each backbone feature that is used, by name.
        batch_former: a second stream in training, which doubles the number of frames that come out.
        """
        super().__init__()
        absent = [name for name in transformer_in_features if name not in input_shape]
        if absent:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES names {absent}; "
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES has {list(input_shape)}"
            )
        by_stride = sorted(input_shape, key=lambda name: input_shape[name].stride)
        # Coarse to fine, as the level index of the released weights counts.
        self.transformer_in_features = [name for name in reversed(by_stride) if name in transformer_in_features]
        self.input_proj = nn.ModuleList(
            _projection(input_shape[name].channels, conv_dim) for name in self.transformer_in_features
        )
        self.transformer = DeformableTransformer(
            embed_dim=conv_dim,
            num_levels=len(self.transformer_in_features),
            num_layers=num_encoder_layers,
            batch_former=batch_former,
            use_checkpoint=encoder_checkpoint,
            feedforward_dim=feedforward_dim,
            num_heads=num_heads,
            num_points=num_points,
            dropout=dropout,
        )
        finest = min(input_shape[name].stride for name in self.transformer_in_features)
        num_fpn_levels = int(math.log2(finest) - math.log2(common_stride))
        # Each step of the FPN doubles the size, down to the stride of the mask features.
        self.fpn_in_features = by_stride[: max(num_fpn_levels, 0)]
        strides = [input_shape[name].stride for name in self.fpn_in_features]
        if num_fpn_levels < 0 or strides != [common_stride * 2**i for i in range(num_fpn_levels)]:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {common_stride}: between it and the finest level of the encoder, "
                f"of stride {finest}, every stride needs a feature; IN_FEATURES has "
                f"{ {name: input_shape[name].stride for name in by_stride} }"
            )
        for i, name in enumerate(self.fpn_in_features, start=1):
            self.add_module(f"adapter_{i}", _conv(input_shape[name].channels, conv_dim, 1, norm))
            self.add_module(f"layer_{i}", _conv(conv_dim, conv_dim, 3, norm, activation=F.relu))
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        _init_conv(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        missing = [name for name in head.IN_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {missing}; the backbone gives {list(input_shape)}")
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "common_stride": head.COMMON_STRIDE,
            "num_encoder_layers": head.TRANSFORMER_ENC_LAYERS,
            "encoder_checkpoint": head.TRANSFORMER_ENC_CHECKPOINT,
            "num_heads": head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS,
            "num_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "feedforward_dim": head.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD,
            "dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "batch_former": build_batch_former(
                cfg, embed_dim=head.CONVS_DIM, encoder_layers=head.TRANSFORMER_ENC_LAYERS
            ),
        }

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Backbone features (N, c, h, w) by name -> mask features (N, C, H/4, W/4) and memory, coarse to fine.

        With a second stream 2N: all frames as they are, then all that went through the BatchFormer.

        Runs in float32 also under autocast: half-precision sampling positions are off by up to a pixel.
        """
        with torch.autocast(device_type=features[self.transformer_in_features[0]].device.type, enabled=False):
            levels = [
                projection(features[name].float())
                for projection, name in zip(self.input_proj, self.transformer_in_features, strict=True)
            ]
            memory = self.transformer(levels)
            finest = memory[-1]
            for i, name in reversed(list(enumerate(self.fpn_in_features, start=1))):
                lateral = self.get_submodule(f"adapter_{i}")(features[name].float())
                if len(lateral) < len(finest):
                    lateral = lateral.repeat(2, 1, 1, 1)  # for the second stream too
                up = F.interpolate(finest, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
                finest = self.get_submodule(f"layer_{i}")(lateral + up)
            return self.mask_features(finest), memory


def num_groups(channels: int) -> int:
    """32 groups as released; fewer for narrow models, so that a group keeps at least 8 channels."""
    return math.gcd(32, max(channels // 8, 1))


def _projection(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = Conv2d(in_channels, out_channels, 1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # there is one: bias=True
    return nn.Sequential(conv, nn.GroupNorm(num_groups(out_channels), out_channels))


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, activation: Any = None) -> Conv2d:
    normalise = nn.GroupNorm(num_groups(out_channels), out_channels) if norm == "GN" else get_norm(norm, out_channels)
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=normalise is None,
        norm=normalise,
        activation=activation,
    )
    _init_conv(conv)
    return conv


def _init_conv(conv: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
