"""Multi-scale deformable attention in Triton: the ops ``vis::ms_deform_attn_triton`` and its backward.

For machines with an NVIDIA GPU that lack the CUDA toolkit; Triton still needs a C compiler there, once. Importing this
module imports no Triton. The first call does, and compiles the kernels for the dtypes and the numbers of channels,
levels and points that it meets. Sizes of levels are arguments: new ones compile nothing, no call waits for the device.

With ``TRITON_INTERPRET=1`` in the environment before Triton is first imported the kernels run in Triton's interpreter
on CPU tensors, far too slow for anything but tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_OLDEST = (3, 3)  # kernels take tuples as arguments since then
_SCHEMA = "Tensor value, SymInt[] spatial_shapes, SymInt[] level_start_index, Tensor locations, Tensor attention"


def available() -> tuple[bool, str]:
    """Whether CUDA tensors can go through Triton here (CPU tensors, where Triton's interpreter is on), and why (not).

    Asks Triton for its driver, which it builds with the C compiler at its first use on a machine.
    """
    try:
        import triton
        from triton.runtime import driver
    except ImportError as error:
        return False, f"Triton cannot be imported: {error}"
    version = f"Triton {triton.__version__}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return False, f"{version} is older than {'.'.join(map(str, _OLDEST))}"
    if _interpreted():
        return True, f"{version} in its interpreter (TRITON_INTERPRET is set): CPU tensors, slow"
    if not torch.cuda.is_available():
        return False, f"{version} is here, but no CUDA device is"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (7, 0):
        return False, f"the GPU has compute capability {capability[0]}.{capability[1]}, {version} needs 7.0"
    try:
        driver.active.get_current_target()
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        return False, f"{version} cannot build its driver (it needs a C compiler: gcc, clang or CC): {error}"
    return True, f"{version} on {torch.cuda.get_device_name()}"


def _interpreted() -> bool:
    from triton import JITFunction

    from vis.layers.ms_deform_attn import triton_source

    return not isinstance(triton_source.forward_kernel, JITFunction)


def triton_ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], level_start_index: Sequence[int], locations: Tensor, attention: Tensor
) -> Tensor:
    """The differentiable op. Its gradients cannot be differentiated again.

    Args:
        value: (N, S, M, D) in float16, bfloat16, float32 or float64, on a CUDA device.
        spatial_shapes: h0, w0, h1, w1, ... of the L levels.
        level_start_index: first row of each level in S.
        locations: (N, Lq, M, L, P, 2) as (x, y); float64 with float64 values, otherwise float32.
        attention: (N, Lq, M, L, P) in any floating dtype.

    Returns:
        (N, Lq, M*D) in the dtype of ``value``, accumulated in the dtype of ``locations``.

    Raises:
        ValueError: sizes, dtypes or devices do not fit.
        RuntimeError: Triton is not installed, or (backward) deterministic algorithms are demanded: the gradient of
            ``value`` is added up with atomics, in an order that varies.
    """
    if not _INSTALLED:
        raise RuntimeError("Triton is not installed: choose another backend of ms_deform_attn, or `pip install triton`")
    return torch.ops.vis.ms_deform_attn_triton(value, spatial_shapes, level_start_index, locations, attention)


def call(
    value: Tensor, shapes: Sequence[tuple[int, int]], starts: Sequence[int], locations: Tensor, attention: Tensor
) -> Tensor:
    """:func:`triton_ms_deform_attn` for level sizes in pairs."""
    return triton_ms_deform_attn(value, [size for pair in shapes for size in pair], starts, locations, attention)


def triton_forward(
    value: Tensor, spatial_shapes: Sequence[int], level_start_index: Sequence[int], locations: Tensor, attention: Tensor
) -> Tensor:
    """(N, Lq, M*D); see :func:`triton_ms_deform_attn`, which is what to call: this one is not differentiable."""
    _check(value, spatial_shapes, level_start_index, locations, attention)
    n, queries, heads, channels = *locations.shape[:3], value.shape[3]
    out = value.new_empty(n, queries, heads * channels)
    arguments = [x.contiguous() for x in (value, locations, attention)]
    _launch("forward_kernel", [*arguments, out], value, spatial_shapes, level_start_index, locations)
    return out


def triton_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start_index: Sequence[int],
    locations: Tensor,
    attention: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``locations`` and ``attention`` for ``grad`` (N, Lq, M*D), in the dtypes of these."""
    _check(value, spatial_shapes, level_start_index, locations, attention)
    expected = (*locations.shape[:2], value.shape[2] * value.shape[3])
    if tuple(grad.shape) != expected or grad.device != value.device:
        raise ValueError(f"grad is {tuple(grad.shape)} on {grad.device}, expected {expected} on {value.device}")
    _alert_not_deterministic()
    # Halves are not added up as halves: thousands of samples meet in a cell, and their atomics are loops on sm_80.
    grad_value = torch.zeros(value.shape, dtype=locations.dtype, device=value.device)
    grad_locations, grad_attention = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (locations, attention)
    )
    arguments = [x.contiguous() for x in (grad, value, locations, attention)]
    arguments += [grad_value, grad_locations, grad_attention]
    _launch("backward_kernel", arguments, value, spatial_shapes, level_start_index, locations)
    return grad_value.to(value.dtype), grad_locations, grad_attention


def _launch(
    kernel: str, tensors: list[Tensor], value: Tensor, shapes: Sequence[int], starts: Sequence[int], locations: Tensor
) -> None:
    from vis.layers.ms_deform_attn import triton_source

    _, rows, heads, channels = value.shape
    n, queries, _, levels, points, _ = locations.shape
    options = launch_options(
        backward=kernel == "backward_kernel",
        itemsize=value.element_size(),
        channels=channels,
        levels=levels,
        points=points,
        image_size=rows * heads * channels,
    )
    tiles = -(-queries // options["BLOCK_Q"])
    per_level = zip(shapes[::2], shapes[1::2], starts, strict=True)
    sizes = (rows, queries, heads, tiles, *(int(size) for level in per_level for size in level))
    if n * tiles * heads == 0 or channels == 0:
        return
    # Triton launches on the current device and its current stream.
    with torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext():
        grid = (n * tiles * heads,)
        getattr(triton_source, kernel)[grid](*tensors, tuple(map(triton_source.encoded, sizes)), **options)


def launch_options(
    *, backward: bool, itemsize: int, channels: int, levels: int, points: int, image_size: int
) -> dict[str, Any]:
    """What a kernel is compiled for, by the sizes that stay the same through a model.

    Args:
        itemsize: bytes of an element of the values.
        image_size: elements of one image's values.
    """
    block_d = 1 << max(channels - 1, 0).bit_length()
    # A thread of the forward kernel reads 16 bytes of a row at once. One of the backward kernel adds 4 floats at once,
    # the widest atomic, and reads as much; its single warp moves vectors of queries between layouts by shuffles, where
    # more would need shared memory and two barriers, three times a point.
    warps, width = (1 if block_d <= 256 else 4, 4) if backward else (4, 16 // itemsize)
    return {
        "D": channels,
        "L": levels,
        "P": points,
        "BLOCK_Q": min(max(32 * warps * width // block_d, 1), 32 * warps),
        "BLOCK_D": block_d,
        "UNROLL": min(points, 2),  # 8 loads under way for each thread; with 16 few warps fit the registers of sm_90
        "WIDE": image_size >= 2**31,
        "num_warps": warps,
    }


def _check(value: Tensor, shapes: Sequence[int], starts: Sequence[int], locations: Tensor, attention: Tensor) -> None:
    """Everything that a kernel would answer with a read outside of its tensors."""
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(f"value has {value.dim()} dimensions and locations {locations.dim()}, expected 4 and 6")
    n, rows, heads, _ = value.shape
    expected = (n, locations.shape[1], heads, len(starts), locations.shape[4], 2)
    if tuple(locations.shape) != expected or tuple(attention.shape) != expected[:-1]:
        raise ValueError(
            f"locations is {tuple(locations.shape)} and attention {tuple(attention.shape)}, "
            f"expected {expected} and {expected[:-1]}"
        )
    ends = [start + h * w for h, w, start in zip(shapes[::2], shapes[1::2], starts, strict=False)]
    if len(shapes) != 2 * len(starts) or min([*shapes, *starts, 0]) < 0 or max([*ends, 0]) > rows:
        raise ValueError(f"levels {list(shapes)} that begin at {list(starts)} do not fit into {rows} rows")
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    if not value.is_floating_point() or not attention.is_floating_point() or locations.dtype != wide:
        raise ValueError(
            f"value is {value.dtype}, locations {locations.dtype} and attention {attention.dtype}: value and attention "
            f"must be floating, and locations {wide} for this value"
        )
    if {value.device, locations.device, attention.device} != {value.device}:
        raise ValueError(
            f"value is on {value.device}, locations on {locations.device} and attention on {attention.device}"
        )
    if not value.is_cuda and not (value.device.type == "cpu" and _interpreted()):
        raise ValueError(f"value is on {value.device}, but the Triton kernels need a CUDA device")


def _alert_not_deterministic() -> None:
    """As torch's own kernels do under :func:`torch.use_deterministic_algorithms`."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = "the backward of vis::ms_deform_attn_triton adds with atomics and is not deterministic"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"{message}; use the backend torch, or torch.use_deterministic_algorithms(False)")
    warnings.warn(message, stacklevel=3)


def _fake_forward(
    value: Tensor, shapes: Sequence[int], starts: Sequence[int], locations: Tensor, attention: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad: Tensor, value: Tensor, shapes: Sequence[int], starts: Sequence[int], locations: Tensor, attention: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, locations, attention))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, ctx.starts, locations, attention = inputs
    ctx.save_for_backward(value, locations, attention)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, attention = ctx.saved_tensors
    grads = torch.ops.vis.ms_deform_attn_triton_backward(grad, value, ctx.shapes, ctx.starts, locations, attention)
    return grads[0], None, None, grads[1], grads[2]


def _register() -> None:
    forward = torch.library.custom_op(
        "vis::ms_deform_attn_triton", triton_forward, mutates_args=(), schema=f"({_SCHEMA}) -> Tensor"
    )
    forward.register_fake(_fake_forward)
    forward.register_autograd(_differentiate, setup_context=_save)
    backward = torch.library.custom_op(
        "vis::ms_deform_attn_triton_backward",
        triton_backward,
        mutates_args=(),
        schema=f"(Tensor grad, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    )
    backward.register_fake(_fake_backward)


_INSTALLED = importlib.util.find_spec("triton") is not None
if _INSTALLED:
    _register()
