"""ImageNet Swin Transformers (Liu et al., ICCV 2021): the authors' files, their conversions for detectron2, and timm's.

The names are those of detectron2's Swin. The authors' model reduces the resolution at the end of a stage, timm's since
1.0 at the beginning of the next.
"""

from __future__ import annotations

import re

from vis.checkpoint.sources.source import Names, Source, always, register, renames

# The classification head and its norm; masks of the shifted windows, which depend on the image's size.
_DROP = re.compile(r"^(head|norm)\.|\.attn_mask$")
# What a classifier has not: the norms of the feature maps. Indices of relative positions are constants.
_MAY_MISS = re.compile(r"^norm\d\.")
_TABLE = r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table$"


def _is_swin(names: Names) -> bool:
    return names.any(_TABLE, r"patch_embed\.proj\.")


def _is_timm(names: Names) -> bool:
    return _is_swin(names) and names.any(r"layers\.3\.downsample\.") and not names.any(r"layers\.0\.downsample\.")


register(
    Source(
        name="timm_swin",
        title="a Swin Transformer of timm",
        recognise=_is_timm,
        stage=always("backbone"),
        backbone=True,
        to_ours=renames(*((rf"^layers\.{i + 1}\.downsample\.", f"layers.{i}.downsample.") for i in range(3))),
        to_released=renames(*((rf"^layers\.{i}\.downsample\.", f"layers.{i + 1}.downsample.") for i in (2, 1, 0))),
        drop=_DROP,
        may_miss=_MAY_MISS,
    ),
    Source(
        name="swin",
        title="a Swin Transformer of its authors",
        recognise=_is_swin,
        stage=always("backbone"),
        backbone=True,
        drop=_DROP,
        may_miss=_MAY_MISS,
    ),
)
