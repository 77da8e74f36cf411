"""Which learning rate and which weight decay a parameter gets.

The rules are those of the released Mask2Former family: a learning-rate multiplier for the backbone, no decay for
normalisation layers, embeddings and Swin's position tables. Biases, and embeddings that are plain parameters
(``level_embed`` of the pixel decoder), do decay.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
UNDECAYED_NAMES = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    backbone_multiplier: float = 1.0,
    weight_decay_norm: float = 0.0,
    weight_decay_embed: float = 0.0,
    bias_lr_factor: float = 1.0,
    weight_decay_bias: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, one for each distinct pair (learning rate, weight decay).

    Few groups let the optimizer update many tensors at once. Groups and the parameters in them are in the order in
    which the model names them, so that the state of an optimizer fits the same model built again.

    Args:
        backbone_multiplier: factor on ``base_lr`` where "backbone" is in the name of the module.
        weight_decay_bias: decay of biases outside normalisation layers; None means ``weight_decay``.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay``. Frozen parameters are left out, shared ones occur once.

    Raises:
        ValueError: the model has nothing to train.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr = base_lr * (backbone_multiplier if "backbone" in module_name else 1.0)
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
