"""Dense head of FCOS (Tian et al., ICCV 2019) as CondInst has it, with a branch for identities (IAI, ECCV 2022).

Every location of the pyramid predicts classes, a box, its centerness, the parameters of a mask and, where they are
asked for, an identity and an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 32
# Classes and identities begin at this probability.
_PRIOR = 0.01


@dataclass
class FCOSOutputs:
    """What the locations of N frames predict; a list has a map of each level, fine to coarse.

    Attributes:
        logits: (N, K, h, w) of classes; boxes: (N, 4, h, w) distances to left, top, right and bottom in pixels;
        centerness: (N, 1, h, w) logits; params: (N, P, h, w) of masks.
        ids: (N, I, h, w) logits of identities, empty without; embeds: (N, E, h, w), empty without.
    """

    logits: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    centerness: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    embeds: list[Tensor] = field(default_factory=list)


def rows(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, C, h_l, w_l) of the levels -> (N, L, C), L = all locations, level after level, row after row."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


@dataclass
class Locations:
    """The L locations of a pyramid, level after level.

    Attributes:
        points: (L, 2) x, y in pixels; strides: (L,) of each location's level; levels: (L,) int64.
    """

    points: Tensor
    strides: Tensor
    levels: Tensor


def locations_of(maps: Sequence[Tensor], strides: Sequence[int]) -> Locations:
    """Locations of maps (..., h_l, w_l), see :func:`grid_locations`."""
    return grid_locations([x.shape[-2:] for x in maps], strides, maps[0].device)


def grid_locations(sizes: Sequence[tuple[int, ...]], strides: Sequence[int], device: torch.device | str) -> Locations:
    """Locations of levels of these sizes (h, w): cell i of a level is at pixel ``i * stride + stride // 2``."""
    points, counts = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        ys = torch.arange(height, device=device, dtype=torch.float32) * stride + stride // 2
        xs = torch.arange(width, device=device, dtype=torch.float32) * stride + stride // 2
        points.append(torch.stack([xs.repeat(height), ys.repeat_interleave(width)], dim=1))
        counts.append(height * width)
    repeats = torch.tensor(counts, device=device)
    levels = torch.arange(len(counts), device=device).repeat_interleave(repeats, output_size=sum(counts))
    return Locations(torch.cat(points), torch.tensor(strides, device=device, dtype=torch.float32)[levels], levels)


class Scale(nn.Module):
    """A learnt factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.scale


class FCOSHead(nn.Module):
    """Towers and predictors, shared by the levels; names are those of AdelaiDet (tower: conv, norm, ReLU, conv ...)."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_params: int,
        num_convs: int = 4,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        num_ids: int = 0,
        id_convs: int = 1,
        embed_dim: int = 0,
        embed_convs: int = 4,
    ) -> None:
        """Args:
        num_params: channels of the controller, on the tower of the boxes.
        num_convs: depth of the towers of classes and boxes.
        num_ids: channels of the id branch, which reads the pyramid itself; 0: none.
        id_convs: hidden convolutions of the id branch.
        embed_dim: channels of an embedding tower, 0: none; embed_convs: its depth.
        """
        super().__init__()
        if in_channels % _GROUPS:
            raise ValueError(f"the pyramid has {in_channels} channels, expected a multiple of {_GROUPS}")
        self.strides, self.num_ids = tuple(strides), num_ids
        self.cls_tower = _tower(in_channels, num_convs)
        self.bbox_tower = _tower(in_channels, num_convs)
        self.cls_logits = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.ctrness = nn.Conv2d(in_channels, 1, 3, padding=1)
        self.controller = nn.Conv2d(in_channels, num_params, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in self.strides)
        predictors = [self.cls_logits]
        if num_ids:
            self.id_tower = _tower(in_channels, id_convs)
            self.id_logits = nn.Conv2d(in_channels, num_ids, 3, padding=1)
            predictors.append(self.id_logits)
        if embed_dim:
            self.embed_tower = _tower(in_channels, embed_convs)
            self.embed_pred = nn.Conv2d(in_channels, embed_dim, 1)
        self.has_embeds = embed_dim > 0
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for predictor in predictors:
            nn.init.constant_(predictor.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]  # there is one

    def forward(self, pyramid: Sequence[Tensor]) -> FCOSOutputs:
        """Maps (N, C, h_l, w_l), fine to coarse."""
        out = FCOSOutputs()
        for x, scale, stride in zip(pyramid, self.scales, self.strides, strict=True):
            boxes = self.bbox_tower(x)
            out.logits.append(self.cls_logits(self.cls_tower(x)))
            # In float32: distances in pixels are too long for the steps of half precision.
            out.boxes.append(F.relu(scale(self.bbox_pred(boxes).float())) * stride)
            out.centerness.append(self.ctrness(boxes))
            out.params.append(self.controller(boxes))
            if self.num_ids:
                out.ids.append(self.id_logits(self.id_tower(x)))
            if self.has_embeds:
                out.embeds.append(self.embed_pred(self.embed_tower(x)))
        return out


def _tower(channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(_GROUPS, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
