"""DVIS (Zhang et al., ICCV 2023) and DVIS++ (Zhang et al., 2023): names are ours, but for early offline files."""

from __future__ import annotations

from vis.checkpoint.sources.mask2former import EARLIER
from vis.checkpoint.sources.source import Names, Renames, Source, register, renames

_NAMES: Renames = (*EARLIER, *renames((r"^offline_tracker\.", "refiner.")))


def _is_dvis(names: Names) -> bool:
    return names.any(r"sem_seg_head\.predictor\.", r"tracker\.transformer_")


def _is_plus(names: Names) -> bool:
    return _is_dvis(names) and names.any(r"tracker\.(ref_proj|mask_feature_proj)\.")


def _mode(names: Names) -> str:
    return "offline" if names.any(r"(refiner|offline_tracker)\.") else "online"


register(
    Source(
        name="dvisplus",
        title="DVIS++",
        recognise=_is_plus,
        stage=lambda names: f"dvisplus_{_mode(names)}",
        to_ours=_NAMES,
    ),
    Source(
        name="dvis",
        title="DVIS",
        recognise=_is_dvis,
        stage=lambda names: f"dvis_{_mode(names)}",
        to_ours=_NAMES,
    ),
)
