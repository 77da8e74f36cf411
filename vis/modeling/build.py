"""``build_model``: the meta-architecture that a configuration names, on its device."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from vis.config import declare
from vis.layers.ms_deform_attn import set_backend
from vis.modeling.heads.build import refuse_unused
from vis.modeling.registry import lookup

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    # auto: the first of compiled, triton and torch that is there; VIS_MS_DEFORM_ATTN in the environment comes first.
    cfg.MODEL.MS_DEFORM_ATTN_BACKEND = "auto"


def build_model(cfg: CfgNode) -> nn.Module:
    """Build ``cfg.MODEL.META_ARCHITECTURE`` with initial weights on ``cfg.MODEL.DEVICE`` ("auto": CUDA if present).

    Raises:
        ValueError: a name in the configuration is not known, or the device or the backend is not there.
    """
    device = resolve_device(cfg.MODEL.DEVICE)
    set_backend(cfg.MODEL.MS_DEFORM_ATTN_BACKEND, device.type)
    architecture = lookup(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
    refuse_unused(cfg, architecture)
    model = architecture(cfg)
    logger.info("%s on %s, %.1f M parameters", type(model).__name__, device, _millions(model))
    return model.to(device)


def resolve_device(name: str) -> torch.device:
    """The device that ``MODEL.DEVICE`` asks for; "auto" is CUDA where there is a device, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {name!r}, expected cpu, cuda, cuda:0 ... or auto") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"{count} CUDA device{'s' * (count > 1)}" if count else "no CUDA device"
            raise ValueError(f"MODEL.DEVICE is {name!r}, but this machine has {there}; use MODEL.DEVICE cpu (or auto)")
    return device


def _millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
