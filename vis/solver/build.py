"""Optimizers by name, and the keys of the solver."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from vis.config import CfgNode, closest, declare
from vis.solver.clipping import GradientClipper
from vis.solver.param_groups import parameter_groups

OPTIMIZERS = ("ADAMW", "SGD")


@declare
def add_config(cfg: CfgNode) -> None:
    """Keys beside those of detectron2, with the defaults of the released family."""
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    # WarmupPolyLR: the exponent, and a floor as a fraction of the base rate (0 for none).
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0
    # "float16" scales the loss and is for CUDA only, "bfloat16" has the range not to need it.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # How many of the periodic checkpoints stay on disk, counted from the newest; 0 keeps all.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # Ask torch for deterministic algorithms where it has them (slower on CUDA; a CPU run repeats itself anyway).
    cfg.SOLVER.DETERMINISTIC = False


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """The optimizer named by ``SOLVER.OPTIMIZER`` over the parameter groups of ``model``.

    Raises:
        ValueError: the name is not known or a rate is not a positive number.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        hint = closest(solver.OPTIMIZER, OPTIMIZERS)
        raise ValueError(f"SOLVER.OPTIMIZER {solver.OPTIMIZER!r} is not one of {', '.join(OPTIMIZERS)}.{hint}")
    if not solver.BASE_LR > 0:
        raise ValueError(f"SOLVER.BASE_LR must be greater than 0, found {solver.BASE_LR}")
    groups = parameter_groups(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        backbone_decay_multiplier=solver.BACKBONE_DECAY_MULTIPLIER,
        backbone_also=solver.BACKBONE_ALSO,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.OPTIMIZER == "SGD":
        return SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, foreach=True)
    # The fused update takes a quarter of the time of the unfused one on a CPU; torch has it for these devices.
    fused = all(_can_fuse(parameter) for group in groups for parameter in group["params"])
    return AdamW(groups, lr=solver.BASE_LR, fused=fused)


def _can_fuse(parameter: torch.Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper | None:
    """The clipper that ``SOLVER.CLIP_GRADIENTS`` describes, None where it is switched off."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return None
    return GradientClipper(clip_type=clip.CLIP_TYPE, clip_value=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
