"""Which learning rate and which weight decay a parameter gets.

The rules are those of the released Mask2Former family: a learning-rate multiplier for the backbone, no decay for
normalisation layers, embeddings and Swin's position tables. Biases, and embeddings that are plain parameters
(``level_embed`` of the pixel decoder), do decay. Of a backbone inside a feature pyramid (``backbone.bottom_up`` beside
``backbone.fpn_*``) the pyramid counts as a head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from vis.config import CfgNode, declare

logger = logging.getLogger(__name__)

NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
UNDECAYED_NAMES = ("relative_position_bias_table", "absolute_pos_embed")


@declare
def add_config(cfg: CfgNode) -> None:
    """Keys of the backbone's group; SOLVER.BACKBONE_MULTIPLIER is its factor on the learning rate."""
    # Factor on the weight decay of the backbone (IAI: 0.9).
    cfg.SOLVER.BACKBONE_DECAY_MULTIPLIER = 1.0
    # Modules that are treated like the backbone, by the beginning of their names.
    cfg.SOLVER.BACKBONE_ALSO = []


def backbone_modules(model: nn.Module, also: Sequence[str] = ()) -> set[str]:
    """Names of the modules of the backbone: "backbone" is in them; with a pyramid around it, its ``bottom_up`` alone.

    Args:
        also: beginnings of the names of modules to add.

    Raises:
        ValueError: a name in ``also`` is of no module.
    """
    names = [name for name, _ in model.named_modules()]
    unknown = [name for name in also if name not in names]
    if unknown:
        raise ValueError(f"SOLVER.BACKBONE_ALSO names {unknown}, which {type(model).__name__} does not have")
    pyramids = tuple(name.removesuffix("bottom_up") for name in names if name.endswith("backbone.bottom_up"))
    inside = tuple(f"{name}bottom_up" for name in pyramids)
    chosen = {
        name for name in names if "backbone" in name and (name.startswith(inside) or not name.startswith(pyramids))
    }
    return chosen | {name for name in names if any(name == each or name.startswith(f"{each}.") for each in also)}


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    backbone_multiplier: float = 1.0,
    backbone_decay_multiplier: float = 1.0,
    backbone_also: Sequence[str] = (),
    weight_decay_norm: float = 0.0,
    weight_decay_embed: float = 0.0,
    bias_lr_factor: float = 1.0,
    weight_decay_bias: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, one for each distinct pair (learning rate, weight decay).

    Few groups let the optimizer update many tensors at once. Groups and the parameters in them are in the order in
    which the model names them, so that the state of an optimizer fits the same model built again.

    Args:
        backbone_multiplier: factor on ``base_lr`` in the backbone (:func:`backbone_modules`).
        backbone_decay_multiplier: factor on the weight decay there, whichever it is.
        backbone_also: beginnings of the names of modules that are treated like the backbone.
        weight_decay_bias: decay of biases outside normalisation layers; None means ``weight_decay``.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay``. Frozen parameters are left out, shared ones occur once.

    Raises:
        ValueError: the model has nothing to train, or no module of a name in ``backbone_also``.
    """
    backbone = backbone_modules(model, backbone_also)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr = base_lr * (backbone_multiplier if module_name in backbone else 1.0)
            decay = weight_decay
            if name == "bias":
                lr *= bias_lr_factor
                decay = weight_decay if weight_decay_bias is None else weight_decay_bias
            if any(fragment in name for fragment in UNDECAYED_NAMES):
                decay = 0.0
            elif isinstance(module, NORM_LAYERS):
                decay = weight_decay_norm
            elif isinstance(module, nn.Embedding):
                decay = weight_decay_embed
            decay *= backbone_decay_multiplier if module_name in backbone else 1.0
            group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no parameter to train: every one of them is frozen")
    for group in groups.values():
        numbers = sum(parameter.numel() for parameter in group["params"])
        logger.info(
            "optimizer: %d tensors, %.2f M numbers, lr %g, weight decay %g",
            *(len(group["params"]), numbers / 1e6, group["lr"], group["weight_decay"]),
        )
    frozen = [parameter.numel() for parameter in model.parameters() if not parameter.requires_grad]
    if frozen:
        numbers = sum(frozen) / 1e6
        logger.info("optimizer: %d tensors, %.2f M numbers are frozen: not updated, no state", len(frozen), numbers)
    return list(groups.values())
