"""Deformable DETR (Zhu et al., ICLR 2021) without proposals, and the instance heads that IDOL puts on it.

Attribute names are those of the released state dicts: ``detr`` (:class:`InstanceDETR`) holds the heads and another
``detr`` (:class:`DeformableDETR`), which holds the backbone. All of it but the backbone runs in float32: sampling
positions and coordinates in pixels do not fit half precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from vis.layers.batch_former import BatchFormers
from vis.layers.linear import Linear, speed_up_pointwise
from vis.layers.mlp import MLP
from vis.modeling.heads.contrastive import ContrastiveHead
from vis.modeling.heads.dynamic_mask import MaskBranch, build_controller, dynamic_masks
from vis.modeling.pixel_decoders.deformable_encoder import (
    DeformableEncoder,
    PaddedLevels,
    repeated,
    valid_position_encoding,
)
from vis.modeling.transformer_decoders.deformable_detr import DecodedLayer, DeformableDecoder, Memory

Sizes = Sequence[tuple[int, int]]


class Detections(NamedTuple):
    """What the network says of N pictures.

    Attributes:
        layers: queries, boxes and points of every decoder layer, the last one last.
        maps: the memory's levels at strides 8, 16 and 32, (N, C, h, w) each.
        unused: features of the backbone that nothing reads.
    """

    layers: list[DecodedLayer]
    maps: list[Tensor]
    unused: list[Tensor]


class DeformableTransformer(nn.Module):
    """Encoder and decoder."""

    def __init__(
        self,
        *,
        embed_dim: int,
        feedforward_dim: int,
        num_heads: int,
        num_levels: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        num_encoder_points: int,
        num_decoder_points: int,
        dropout: float,
        encoder_checkpoint: bool,
        bbox_embed: nn.ModuleList,
        batch_former: BatchFormers | None = None,
    ) -> None:
        super().__init__()
        self.bf = batch_former
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        self.encoder = DeformableEncoder(
            num_layers=num_encoder_layers,
            use_checkpoint=encoder_checkpoint,
            embed_dim=embed_dim,
            feedforward_dim=feedforward_dim,
            num_levels=num_levels,
            num_heads=num_heads,
            num_points=num_encoder_points,
            dropout=dropout,
        )
        self.decoder = DeformableDecoder(
            num_layers=num_decoder_layers,
            bbox_embed=bbox_embed,
            embed_dim=embed_dim,
            feedforward_dim=feedforward_dim,
            num_levels=num_levels,
            num_heads=num_heads,
            num_points=num_decoder_points,
            dropout=dropout,
        )
        self.reference_points = Linear(embed_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(
        self, maps: Sequence[Tensor], query_embed: Tensor, image_sizes: Sizes, padded: tuple[int, int]
    ) -> tuple[list[DecodedLayer], list[Tensor]]:
        """Maps (N, C, h_l, w_l), fine to coarse, and queries (Q, 2C): position, content -> decoded layers, memory maps.

        With a second stream in training both are of 2N pictures: all as they are, then all through the BatchFormer.

        Args: ``image_sizes`` (height, width) of each picture without padding, ``padded`` with it.
        """
        channels, device = maps[0].shape[1], maps[0].device
        shapes = [(int(x.shape[2]), int(x.shape[3])) for x in maps]
        levels = PaddedLevels.of(shapes, image_sizes, padded, device)
        cells = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (N, S, C)
        # Pictures of one size have one encoding, which is as much work as several layers for each of them.
        own = slice(0, 1) if len({tuple(size) for size in image_sizes}) == 1 else slice(None)
        positions = [
            (valid_position_encoding(inside[own], channels) + embed).expand(len(cells), -1, -1)
            for inside, embed in zip(levels.inside, self.level_embed, strict=True)
        ]
        cells = self.encoder(cells, torch.cat(positions, dim=1), levels, self.bf)
        streams = len(cells) // len(levels.valid_ratios)
        padding = None if levels.padding is None else repeated(levels.padding, streams)
        memory = Memory(cells, shapes, levels.starts, repeated(levels.valid_ratios, streams), padding)
        position, content = (part[None].expand(len(cells), -1, -1) for part in query_embed.split(channels, dim=1))
        decoded = self.decoder(content, position, self.reference_points(position).sigmoid(), memory)
        split = cells.split([h * w for h, w in shapes], dim=1)
        return decoded, [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(split, shapes, strict=True)]


class DeformableDETR(nn.Module):
    """Backbone, projection to one width, transformer, class and box heads of every decoder layer."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        num_classes: int,
        num_queries: int,
        embed_dim: int,
        feedforward_dim: int,
        num_heads: int,
        num_levels: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        num_encoder_points: int,
        num_decoder_points: int,
        dropout: float,
        encoder_checkpoint: bool = False,
        batch_former: BatchFormers | None = None,
    ) -> None:
        """Args:
        in_features: of the backbone, fine to coarse; one coarser level is made of the last of them.
        batch_former: a second stream in training, which doubles the number of pictures that come out.
        """
        super().__init__()
        shapes: Mapping[str, ShapeSpec] = backbone.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing or num_levels != len(in_features) + 1:
            raise ValueError(
                f"MODEL.IDOL.NUM_FEATURE_LEVELS is {num_levels}: it must be one more than the features {in_features}, "
                f"all of which the backbone must give; it gives {list(shapes)}"
            )
        self.in_features = list(in_features)
        boxes = nn.ModuleList(
            MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=4) for _ in range(num_decoder_layers)
        )
        self.transformer = DeformableTransformer(
            embed_dim=embed_dim,
            feedforward_dim=feedforward_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            num_encoder_points=num_encoder_points,
            num_decoder_points=num_decoder_points,
            dropout=dropout,
            encoder_checkpoint=encoder_checkpoint,
            bbox_embed=boxes,
            batch_former=batch_former,
        )
        self.class_embed = nn.ModuleList(Linear(embed_dim, num_classes) for _ in range(num_decoder_layers))
        self.bbox_embed = boxes  # the decoder's own: released files name them twice
        self.query_embed = nn.Embedding(num_queries, 2 * embed_dim)
        widths = [int(shapes[name].channels or 0) for name in in_features]
        self.input_proj = nn.ModuleList(_projection(Conv2d(width, embed_dim, 1)) for width in widths)
        self.input_proj.append(_projection(Conv2d(widths[-1], embed_dim, 3, stride=2, padding=1)))
        self.backbone = nn.ModuleList([nn.ModuleDict({"backbone": backbone})])
        self._init_heads()
        speed_up_pointwise(self)

    def _init_heads(self) -> None:
        """Every class starts with probability 0.01, every box at its reference with a tenth of the picture's size."""
        for head in self.class_embed:
            nn.init.constant_(head.get_parameter("bias"), -math.log(99.0))
        for i, head in enumerate(self.bbox_embed):
            nn.init.zeros_(head.get_parameter("layers.2.weight"))
            bias = nn.init.zeros_(head.get_parameter("layers.2.bias"))
            if i == 0:  # from there on sizes are refined
                nn.init.constant_(bias[2:], -2.0)

    def forward(self, images: Tensor, image_sizes: Sizes) -> Detections:
        """Normalised, padded pictures (N, 3, H, W), with their sizes (height, width) before padding."""
        features: Mapping[str, Tensor] = self.backbone.get_submodule("0.backbone")(images)
        padded = (int(images.shape[-2]), int(images.shape[-1]))
        with torch.autocast(device_type=images.device.type, enabled=False):
            inputs = [features[name].float() for name in self.in_features]
            maps = [project(x) for project, x in zip(self.input_proj, [*inputs, inputs[-1]], strict=True)]
            decoded, maps = self.transformer(maps, self.query_embed.weight, image_sizes, padded)
        return Detections(decoded, maps[:3], [x for name, x in features.items() if name not in self.in_features])

    def class_logits(self, decoded: DecodedLayer, layer: int) -> Tensor:
        """(N, Q, K) of one decoder layer; sigmoid, without a class for no object."""
        with torch.autocast(device_type=decoded.queries.device.type, enabled=False):
            return self.class_embed[layer](decoded.queries)


def _projection(conv: nn.Conv2d) -> nn.Sequential:
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # there is one
    channels = conv.out_channels
    # 32 groups as released; fewer for narrow models, so that a group keeps at least 8 channels.
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, max(channels // 8, 1)), channels))


class InstanceDETR(nn.Module):
    """:class:`DeformableDETR` with masks by dynamic convolutions and embeddings for association."""

    def __init__(self, *, detr: DeformableDETR, embed_dim: int) -> None:
        super().__init__()
        self.detr = detr
        self.controller = build_controller(embed_dim)
        self.mask_head = MaskBranch(embed_dim=embed_dim)
        self.reid_embed_head = ContrastiveHead(embed_dim=embed_dim)

    def forward(self, images: Tensor, image_sizes: Sizes) -> Detections:
        """As :class:`DeformableDETR`."""
        return self.detr(images, image_sizes)

    def mask_features(self, maps: Sequence[Tensor]) -> Tensor:
        """Memory maps (N, C, h, w) -> (N, 8, H/8, W/8)."""
        with torch.autocast(device_type=maps[0].device.type, enabled=False):
            return self.mask_head(maps)

    def masks(self, features: Tensor, queries: Tensor, points: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Mask logits (n, H/4, W/4) of n queries of one picture.

        Args:
            features: (8, H/8, W/8); queries: (n, C); points: (n, 2) in 0..1 of ``image_size``, (height, width).
        """
        with torch.autocast(device_type=features.device.type, enabled=False):
            scale = points.new_tensor([image_size[1], image_size[0]])
            return dynamic_masks(features, self.controller(queries), points * scale)

    def embeds(self, queries: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        with torch.autocast(device_type=queries.device.type, enabled=False):
            return self.reid_embed_head(queries)
