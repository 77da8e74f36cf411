"""DINOv2's Vision Transformer (Oquab et al., TMLR 2024) as the ViT adapter runs it: patches of 16 instead of 14 pixels.

The blocks are timm's, whose parameters carry the names of the published weights.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vis.layers.linear import Linear

#: Of every layer norm, in the adapter too.
NORM_EPS = 1e-6


class DinoVisionTransformer(nn.Module):
    """Tokens and blocks; who runs the blocks is the caller's business.

    ``mask_token`` and ``norm`` are in the published weights but not in the computation: they are never trained, since a
    parameter without a gradient would stall data-parallel training.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        pretrain_grid: int = 37,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
    ) -> None:
        """Args: ``pretrain_grid``: patches along a side of the square that position embeddings were trained for."""
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=NORM_EPS)
        self.embed_dim, self.patch_size = embed_dim, patch_size
        self.patch_embed = PatchEmbed(None, patch_size=patch_size, in_chans=in_channels, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + pretrain_grid**2, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                init_values=1e-5,
                norm_layer=norm_layer,  # type: ignore[arg-type]  # a partial class
            )
            for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim).requires_grad_(False)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear  # the same layer, faster on CPUs
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), multiples of the patch size -> the class token and those of the patches, (N, 1 + h*w, C)."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), self.patch_embed(images)], dim=1)
        return tokens + interpolate_positions(self.pos_embed, grid).to(tokens.dtype)


def interpolate_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, 1 + n*n, C) of a square grid for a grid of (h, w): (1, 1 + h*w, C) float32.

    Bicubic at the scale (h + 0.1) / n, which shifts the samples a little against resizing to (h, w): the published
    models were trained so. The grid of the pre-training is given back as it is.
    """
    height, width = grid
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (height, width) == (side, side):
        return pos_embed
    of_class, of_patches = pos_embed.float().split([1, side * side], dim=1)
    of_patches = F.interpolate(
        of_patches.unflatten(1, (side, side)).permute(0, 3, 1, 2),
        scale_factor=((height + 0.1) / side, (width + 0.1) / side),
        mode="bicubic",
    )
    return torch.cat([of_class, of_patches.flatten(2).transpose(1, 2)], dim=1)


def resize_patch_kernel(weight: Tensor, size: int) -> Tensor:
    """The kernel (C, 3, k, k) of a patch embedding for patches of ``size`` pixels: (C, 3, size, size), the same dtype.

    Bilinear with the corners aligned and not normalised again (a flat kernel's sum grows with the area), as the
    published models with the adapter were made from DINOv2's weights.

    Raises:
        ValueError: not such a kernel.
    """
    if weight.dim() != 4 or weight.shape[-1] != weight.shape[-2] or size < 1:
        raise ValueError(
            f"cannot resize a kernel of shape {tuple(weight.shape)} to {size} pixels, expected (C, 3, k, k)"
        )
    if weight.shape[-1] == size:
        return weight
    resized = F.interpolate(weight.float(), size=(size, size), mode="bilinear", align_corners=True)
    return resized.to(weight.dtype)
