"""DINOv2 ViTs (Oquab et al., TMLR 2024): the authors' files and timm's. Names are those of ``vit_module`` in ours."""

from __future__ import annotations

import re

from torch import Tensor

from vis.checkpoint.sources.source import Names, Source, always, register, renames


def _fit_patches(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    """Kernels of 14 x 14 pixels for a model with patches of 16 x 16."""
    if name.endswith("patch_embed.proj.weight") and tensor.dim() == 4 and tuple(tensor.shape[:2]) == wanted[:2]:
        from vis.modeling.backbones.dinov2 import resize_patch_kernel

        return resize_patch_kernel(tensor, wanted[-1])
    return None


def _registers(names: Names) -> str | None:
    if names.any(r"(reg_token|register_tokens)$"):
        return (
            "it is a DINOv2 with registers; the backbone here is the one without (dinov2_vitl14_pretrain.pth, or "
            "timm's vit_large_patch14_dinov2)"
        )
    return None


register(
    Source(
        name="dinov2",
        title="a DINOv2 ViT (its authors' or timm's)",
        recognise=lambda names: names.any(r"cls_token$", r"patch_embed\.proj\.", r"blocks\.0\.(0\.)?ls1\.gamma$"),
        stage=always("backbone"),
        backbone=True,
        # blocks.<chunk>.<number>.: blocks saved in chunks keep their overall number
        to_ours=renames((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")),
        drop=re.compile(r"^head\."),
        may_miss=re.compile(r"^mask_token$"),  # only DINOv2's own training uses it
        adapt=_fit_patches,
        refuse=_registers,
    )
)
