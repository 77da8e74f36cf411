"""Gradient clipping as a step of its own between backward and the update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

CLIP_TYPES = ("full_model", "norm", "value")


class GradientClipper:
    """Clips the gradients of a list of parameters in place.

    Args:
        clip_type: "full_model" bounds the norm over all parameters together (what the released models use),
            "norm" that of each parameter, "value" each number.
        clip_value: the bound.
        norm_type: p of the norm; not used by "value".
    """

    def __init__(self, *, clip_type: str, clip_value: float, norm_type: float = 2.0) -> None:
        if clip_type not in CLIP_TYPES:
            raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip_type!r} is not one of {', '.join(CLIP_TYPES)}")
        if not clip_value > 0:
            raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be greater than 0, found {clip_value}")
        self.clip_type = clip_type
        self.clip_value = clip_value
        self.norm_type = norm_type

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clip, and return the norm of all gradients together as it was before (scalar)."""
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        if self.clip_type == "full_model":
            return clip_grad_norm_(parameters, self.clip_value, norm_type=self.norm_type)
        norm = gradient_norm(parameters)
        if self.clip_type == "value":
            clip_grad_value_(parameters, self.clip_value)
        else:
            for parameter in parameters:
                clip_grad_norm_(parameter, self.clip_value, norm_type=self.norm_type)
        return norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients together (scalar); nothing is changed."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
