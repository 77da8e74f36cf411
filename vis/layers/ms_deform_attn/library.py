"""The op ``vis::ms_deform_attn``: its library ``vis/_C.so``, its fake kernel and its gradient.

Without the library the op is declared all the same, without kernels, so that nothing else depends on the build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[2] / "_C.so"
_INPUTS = (
    "Tensor value, int[] spatial_shapes, int[] level_start_index, Tensor sampling_locations, Tensor attention_weights"
)
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_declared: list[torch.library.Library] = []  # what it declares goes when it is collected


def problem(device_type: str) -> str:
    """Why the op has no compiled kernel for a kind of device; "" where it has one."""
    if _PROBLEM:
        return _PROBLEM
    key = _KEYS.get(device_type)
    if key and torch._C._dispatch_has_kernel_for_dispatch_key("vis::ms_deform_attn", key):
        return ""
    hint = "; VIS_BUILD_CUDA=1 builds them where nvcc is" if device_type == "cuda" else ""
    return f"vis._C has no kernels for {device_type}{hint}"


def _load() -> str:
    """Loads the library, or declares the op without it; returns why it cannot be used ("" if it can)."""
    reason = (
        f"vis._C is not built ({LIBRARY} is made by `pip install --no-build-isolation -e .` where a C++ compiler is)"
    )
    if LIBRARY.is_file():
        try:
            torch.ops.load_library(LIBRARY)
        except OSError as error:  # built for another torch or machine
            reason = f"{LIBRARY} does not load, build it again: {error}"
        else:
            built, here = torch.ops.vis.built_with(), torch.__version__.partition("+")[0]
            return "" if built == here else f"{LIBRARY} was built with torch {built}, this is {here}: build it again"
    _declare()
    return reason


def _declare() -> None:
    declared = torch.library.Library("vis", "FRAGMENT")
    declared.define(f"ms_deform_attn({_INPUTS}) -> Tensor")
    declared.define(f"ms_deform_attn_backward(Tensor grad_output, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
    _declared.append(declared)


def _fake(value: Tensor, shapes: list[int], starts: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad: Tensor, value: Tensor, shapes: list[int], starts: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, ctx.starts, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)  # nothing else: the backward pass sets the samples up again


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    of_value, of_locations, of_weights = torch.ops.vis.ms_deform_attn_backward(
        grad, value, ctx.shapes, ctx.starts, locations, weights
    )
    return of_value, None, None, of_locations, of_weights


_PROBLEM = _load()
torch.library.register_fake("vis::ms_deform_attn", _fake)
torch.library.register_fake("vis::ms_deform_attn_backward", _fake_backward)
torch.library.register_autograd("vis::ms_deform_attn", _differentiate, setup_context=_save)
