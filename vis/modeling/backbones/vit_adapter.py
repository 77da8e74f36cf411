"""DINOv2 with the slim ViT adapter of DVIS++ (Zhang et al., 2023, after ViT-Adapter, Chen et al., ICLR 2023).

A small convolutional branch makes tokens at 1/8, 1/16 and 1/32. After each quarter of the ViT's blocks they look at the
ViT's features by deformable attention. Nothing flows from the branch into the ViT, which therefore can stay frozen:
it then runs without gradients and keeps nothing for the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vis.config import closest, declare
from vis.layers.linear import Linear
from vis.layers.ms_deform_attn import MSDeformAttn
from vis.modeling.backbones.dinov2 import NORM_EPS, DinoVisionTransformer

logger = logging.getLogger(__name__)

Grids = tuple[tuple[int, int], ...]

_STAGES = 4
_FEATURES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

#: MODEL.VIT_ADAPTER.NAME -> the ViT; the adapter attends with as many heads.
SIZES: dict[str, dict[str, int]] = {
    "vits": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vitb": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vitl": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.VIT_ADAPTER = node = CfgNode()
    # Size of the ViT: vits, vitb or vitl.
    node.NAME = "vitl"
    # Keep the ViT as it is loaded; only the adapter is trained.
    node.FREEZE_VIT = True
    # Of a frozen ViT, train the blocks of these quarters (0 to 3) nevertheless. As in the release, a quarter learns
    # from its own features alone: the frozen blocks after it pass no gradient back.
    node.FINETUNE = False
    node.FINETUNE_INDEXES = [0]
    # Recompute in the backward pass instead of keeping activations: the adapter's attention; the ViT's blocks, where
    # they are trained.
    node.WITH_CP = False
    node.WITH_CP_VIT = False
    # Named by released files: DINOv2's own weights for the ViT alone. Here all weights come with MODEL.WEIGHTS, which
    # takes such a file too, so that what is given here is not read (a line in the log says so).
    node.VIT_WEIGHT = ""


def batch_norm(channels: int) -> nn.Module:
    """Batch normalisation over the batches of all processes on GPUs, over one's own elsewhere; the same names.

    Torch can synchronise on GPUs only, and refuses to distribute a model that would on CPUs.
    """
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    synchronised = group and "nccl" in torch.distributed.get_backend()
    return nn.SyncBatchNorm(channels) if synchronised else nn.BatchNorm2d(channels)


class SpatialPriorModule(nn.Module):
    """Convolutions that see edges at four scales."""

    def __init__(self, *, embed_dim: int, in_channels: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_relu(in_channels, width, stride=2),
            *_conv_norm_relu(width, width),
            *_conv_norm_relu(width, width),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        widths = [width, 2 * width, 4 * width, 4 * width]
        for i in range(1, 4):
            self.add_module(f"conv{i + 1}", nn.Sequential(*_conv_norm_relu(widths[i - 1], widths[i], stride=2)))
        for i, channels in enumerate(widths, start=1):
            self.add_module(f"fc{i}", Conv2d(channels, embed_dim, kernel_size=1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> maps (N, C, h, w) at 1/4, 1/8, 1/16 and 1/32."""
        maps = [self.stem(images)]
        for i in (2, 3, 4):
            maps.append(self.get_submodule(f"conv{i}")(maps[-1]))
        return [self.get_submodule(f"fc{i}")(x) for i, x in enumerate(maps, start=1)]


def _conv_norm_relu(in_channels: int, out_channels: int, *, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return conv, batch_norm(out_channels), nn.ReLU(inplace=True)


class DWConv(nn.Module):
    """One depthwise 3x3 convolution for the maps of all scales."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        """(N, S, C) tokens of the grids, one after the other -> the same."""
        return torch.cat([self.dwconv(one).flatten(2).transpose(1, 2) for one in _maps(x, grids)], dim=1)


class ConvFFN(nn.Module):
    """A feed-forward network that also looks at neighbouring cells."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dim, hidden_dim)
        self.dwconv = DWConv(hidden_dim)
        self.fc2 = Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        """(N, S, C) -> (N, S, C)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), grids)))


class Extractor(nn.Module):
    """The adapter's tokens look at the ViT's features, then pass through a feed-forward network."""

    def __init__(self, *, embed_dim: int, num_heads: int, num_points: int = 4, ffn_ratio: float = 0.25) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attn = MSDeformAttn(embed_dim=embed_dim, num_levels=1, num_heads=num_heads, num_points=num_points)
        self.ffn_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.ffn = ConvFFN(embed_dim=embed_dim, hidden_dim=int(embed_dim * ffn_ratio))

    def forward(self, c: Tensor, patches: Tensor, reference_points: Tensor, grids: Grids) -> Tensor:
        """Tokens (N, S, C) of the adapter's ``grids`` and patches (N, h*w, C) of the middle one -> (N, S, C)."""
        attended = self.attn(self.query_norm(c), reference_points, self.feat_norm(patches), grids[1:2], [0])
        c = c + attended
        return c + self.ffn(self.ffn_norm(c), grids)


class Interaction(nn.Module):
    """What the adapter does after one quarter of the ViT; the last quarter is looked at three times."""

    def __init__(self, *, embed_dim: int, num_heads: int, num_extra: int) -> None:
        super().__init__()
        self.extractor = Extractor(embed_dim=embed_dim, num_heads=num_heads)
        if num_extra:
            self.extra_extractors = nn.ModuleList(
                Extractor(embed_dim=embed_dim, num_heads=num_heads) for _ in range(num_extra)
            )


@BACKBONE_REGISTRY.register()
class D2VitAdapterDinoV2(Backbone):
    """ViT, spatial prior and interactions; every output has the ViT's number of channels."""

    @configurable
    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        pretrain_grid: int = 37,
        in_channels: int = 3,
        freeze_vit: bool = True,
        trained_stages: Sequence[int] = (),
        checkpoint_extractors: bool = False,
        checkpoint_vit: bool = False,
        vit_weight: str = "",
    ) -> None:
        """Args:
        embed_dim, depth, num_heads: of the ViT; its blocks are run in four equal stages.
        pretrain_grid: patches along a side of the square of the pre-training.
        trained_stages: stages of a frozen ViT that are trained nevertheless.
        checkpoint_extractors, checkpoint_vit: recompute them in the backward pass.
        vit_weight: file of weights of the ViT alone, kept for whoever loads weights; not read here.
        """
        super().__init__()
        if depth % _STAGES:
            raise ValueError(f"a ViT of {depth} blocks cannot be cut into {_STAGES} equal stages")
        wrong = [index for index in trained_stages if not 0 <= index < _STAGES]
        if wrong:
            raise ValueError(f"MODEL.VIT_ADAPTER.FINETUNE_INDEXES names {wrong}; the stages are 0 to {_STAGES - 1}")
        self.embed_dim, self.vit_weight = embed_dim, vit_weight
        self.checkpoint_extractors, self.checkpoint_vit = checkpoint_extractors, checkpoint_vit
        self.level_embed = nn.Parameter(torch.randn(3, embed_dim))
        self.spm = SpatialPriorModule(embed_dim=embed_dim, in_channels=in_channels)
        self.interactions = nn.ModuleList(
            Interaction(embed_dim=embed_dim, num_heads=num_heads, num_extra=2 * (i == _STAGES - 1))
            for i in range(_STAGES)
        )
        self.up = nn.ConvTranspose2d(embed_dim, embed_dim, kernel_size=2, stride=2)
        for i in range(1, 5):
            self.add_module(f"norm{i}", batch_norm(embed_dim))
        _initialise(self)
        self.vit_module = DinoVisionTransformer(
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, pretrain_grid=pretrain_grid, in_channels=in_channels
        )
        self._frozen = freeze_vit
        self._trained = [not freeze_vit or i in trained_stages for i in range(_STAGES)]
        if freeze_vit:
            self.vit_module.requires_grad_(False)
            for i in trained_stages:
                self._stage(i).requires_grad_(True)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.VIT_ADAPTER
        if node.NAME not in SIZES:
            hint = closest(node.NAME, SIZES)
            raise ValueError(f"MODEL.VIT_ADAPTER.NAME is {node.NAME!r}, expected {', '.join(SIZES)}.{hint}")
        if node.VIT_WEIGHT:
            logger.warning(
                "MODEL.VIT_ADAPTER.VIT_WEIGHT %s is not read: the ViT's weights are those in MODEL.WEIGHTS; to start "
                "from DINOv2 alone, name the file there",
                node.VIT_WEIGHT,
            )
        return {
            **SIZES[node.NAME],
            "in_channels": input_shape.channels,
            "freeze_vit": node.FREEZE_VIT,
            "trained_stages": list(node.FINETUNE_INDEXES) if node.FINETUNE else [],
            "checkpoint_extractors": node.WITH_CP,
            "checkpoint_vit": node.WITH_CP_VIT,
            "vit_weight": node.VIT_WEIGHT,
        }

    def train(self, mode: bool = True) -> D2VitAdapterDinoV2:
        """As usual, except that a frozen ViT stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.vit_module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> res2..res5, (N, C, H/4, W/4) to (N, C, H/32, W/32).

        Raises:
            ValueError: H or W is no multiple of 32.
        """
        height, width = int(images.shape[-2]), int(images.shape[-1])
        if height % 32 or width % 32:
            raise ValueError(f"frames are {height}x{width}, expected multiples of {self.size_divisibility}")
        grids: Grids = tuple((height // stride, width // stride) for stride in (8, 16, 32))
        c1, *priors = self.spm(images)
        c = torch.cat(
            [x.flatten(2).transpose(1, 2) + embed for x, embed in zip(priors, self.level_embed, strict=True)], dim=1
        )  # (N, S, C), S = all cells of the grids
        points = _cell_centres(grids, c.device)
        with self._gradients(not self._frozen):
            tokens = self.vit_module.embed(images)
        features = []
        for i, interaction in enumerate(self.interactions):
            tokens = self._run_stage(i, tokens)
            patches = tokens[:, 1:]
            for extractor in (module for module in interaction.modules() if isinstance(module, Extractor)):
                c = self._recomputed(self.checkpoint_extractors, extractor, c, patches, points, grids)
            features.append(_maps(patches, grids[1:2])[0])
        return self._merge(c1, _maps(c, grids), features)

    def _run_stage(self, index: int, tokens: Tensor) -> Tensor:
        trained = self._trained[index]
        with self._gradients(trained):
            for block in self._stage(index):
                tokens = self._recomputed(self.checkpoint_vit and trained, block, tokens)
        return tokens

    def _stage(self, index: int) -> nn.ModuleList:
        size = len(self.vit_module.blocks) // _STAGES
        return self.vit_module.blocks[index * size : (index + 1) * size]

    def _recomputed(self, wanted: bool, function: nn.Module, *args: Any) -> Tensor:
        if wanted and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return function(*args)

    @staticmethod
    def _gradients(wanted: bool) -> AbstractContextManager[Any]:
        return torch.set_grad_enabled(wanted and torch.is_grad_enabled())

    def _merge(self, c1: Tensor, maps: Sequence[Tensor], features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Adds the ViT's features after each stage to the adapter's maps of 1/4 to 1/32 and normalises."""
        out = {}
        finest: Tensor = self.up(maps[0])
        levels = [finest.add_(c1), *maps]
        for i, (name, x, feature) in enumerate(zip(_FEATURES, levels, features, strict=True), start=1):
            if feature.shape == x.shape:
                total = x + feature
            else:
                # In place: maps of 1/4 are the largest that there are.
                total = F.interpolate(feature, size=x.shape[-2:], mode="bilinear", align_corners=False).add_(x)
            out[name] = self.get_submodule(f"norm{i}")(total)
        return out

    @property
    def size_divisibility(self) -> int:
        """Frames are padded to a multiple of this."""
        return 32

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        return {name: ShapeSpec(channels=self.embed_dim, stride=stride) for name, stride in _FEATURES.items()}


def _maps(tokens: Tensor, grids: Grids) -> list[Tensor]:
    """(N, S, C) tokens of the grids, one after the other -> a map (N, C, h, w) of each."""
    split = tokens.split([h * w for h, w in grids], dim=1)
    return [x.transpose(1, 2).unflatten(2, grid) for x, grid in zip(split, grids, strict=True)]


def _cell_centres(grids: Grids, device: torch.device) -> Tensor:
    """(1, S, 1, 2): the centre (x, y) in 0..1 of every cell of every grid."""
    points = torch.empty(sum(h * w for h, w in grids), 2, device=device)
    ends = accumulate(h * w for h, w in grids)
    for end, (h, w) in zip(ends, grids, strict=True):
        cells = points[end - h * w : end].view(h, w, 2)
        cells[..., 0] = ((torch.arange(w, device=device) + 0.5) / w).expand(h, w)
        cells[..., 1] = ((torch.arange(h, device=device) + 0.5) / h)[:, None].expand(h, w)
    return points[None, :, None]


def _initialise(module: nn.Module) -> None:
    """Initial weights of the adapter; those of deformable attention and of norms are set by these themselves."""
    for name, child in module.named_modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
            fan_out = child.kernel_size[0] * child.kernel_size[1] * child.out_channels // child.groups
            nn.init.normal_(child.weight, std=(2.0 / fan_out) ** 0.5)
        elif isinstance(child, nn.Linear) and ".attn." not in name:
            nn.init.trunc_normal_(child.weight, std=0.02)
        else:
            continue
        if child.bias is not None:
            nn.init.zeros_(child.bias)
