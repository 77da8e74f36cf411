"""The function: checks what it is given, then calls the backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vis.layers.ms_deform_attn import backends, reference, triton_kernels

SpatialShapes = Sequence[tuple[int, int]] | Tensor

VALUE_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape_pairs(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """The L level sizes (h, w) as Python integers.

    Raises:
        ValueError: a tensor on an accelerator was given; reading it would stall the device at every call.
    """
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.device.type != "cpu":
            raise ValueError(
                f"spatial_shapes lies on {spatial_shapes.device}; pass Python ints or a CPU tensor, so that no call "
                "waits for the device"
            )
        spatial_shapes = spatial_shapes.tolist()
    return [(int(h), int(w)) for h, w in spatial_shapes]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Sequence[int] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum of bilinear samples of ``value``, weighted by attention, over the levels and points of each query and head.

    Args:
        value: (N, S, M, D) features of all levels, S = sum of h*w, M heads of D channels.
        spatial_shapes: the L level sizes (h, w), as ints or a CPU tensor (L, 2).
        level_start_index: (L,) first row of each level in S, as ints or a CPU tensor. A tensor on an accelerator is not
            read, which would stall the device: the levels are then taken to follow one another, as they always do.
        sampling_locations: (N, Lq, M, L, P, 2) as (x, y), 0..1 over the level; outside of it the value is zero.
        attention_weights: (N, Lq, M, L, P).

    Returns:
        (N, Lq, M*D) in the dtype of ``value``.

    Positions and sums are computed in float32, or in float64 where ``value`` is float64. Under autocast nothing is
    different: ``value`` keeps its dtype, and locations that autocast made half-precision are refused.

    Raises:
        ValueError: sizes, types or devices do not fit one another; locations in half precision, which errs by more than
            a pixel; the backend that is asked for is not there.
    """
    shapes = shape_pairs(spatial_shapes)
    if isinstance(level_start_index, Tensor) and level_start_index.device.type != "cpu":
        starts = [0, *accumulate(h * w for h, w in shapes)][: len(level_start_index)]
    else:
        starts = [int(start) for start in level_start_index]
    _check_sizes(value, shapes, starts, sampling_locations, attention_weights)
    sampling_locations, attention_weights = _converted(value, sampling_locations, attention_weights)
    if torch.onnx.is_in_onnx_export():
        return reference.by_grid_sample(value, shapes, starts, sampling_locations, attention_weights)
    run = RUN[backends.choose(value.device.type)]
    return run(value, shapes, starts, sampling_locations, attention_weights)


def position_dtype(dtype: torch.dtype) -> torch.dtype:
    """What positions beside values of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _converted(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and weights in the types that the kernels take."""
    if value.dtype not in VALUE_TYPES:
        raise ValueError(f"value is {value.dtype}, expected one of {', '.join(map(str, VALUE_TYPES))}")
    if locations.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"sampling_locations are {locations.dtype}, expected float32 (or float64): half precision errs by more "
            "than a pixel; under autocast, call .float() on reference points and offsets before adding them"
        )
    if weights.dtype not in VALUE_TYPES:
        raise ValueError(f"attention_weights are {weights.dtype}, expected {value.dtype} or float32")
    if not value.device == locations.device == weights.device:
        raise ValueError(
            f"value lies on {value.device}, sampling_locations on {locations.device} and attention_weights on "
            f"{weights.device}, expected one device"
        )
    position = position_dtype(value.dtype)
    if weights.dtype not in (value.dtype, position):
        weights = weights.to(position)
    return locations.to(position), weights


def _check_sizes(
    value: Tensor, shapes: list[tuple[int, int]], starts: list[int], locations: Tensor, weights: Tensor
) -> None:
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(
            f"value is {tuple(value.shape)} and sampling_locations {tuple(locations.shape)}, "
            "expected (N, S, M, D) and (N, Lq, M, L, P, 2)"
        )
    total = sum(h * w for h, w in shapes)
    if total != value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} rows, but the levels {shapes} need {total}")
    if len(starts) != len(shapes) or any(
        not 0 <= start <= total - h * w for start, (h, w) in zip(starts, shapes, strict=False)
    ):
        raise ValueError(f"level_start_index is {starts}, which does not place the levels {shapes} in {total} rows")
    expected = (value.shape[0], locations.shape[1], value.shape[2], len(shapes), locations.shape[4], 2)
    if tuple(locations.shape) != expected:
        raise ValueError(f"sampling_locations is {tuple(locations.shape)}, expected (N, Lq, M, L, P, 2) = {expected}")
    if tuple(weights.shape) != expected[:-1]:
        raise ValueError(f"attention_weights is {tuple(weights.shape)}, expected (N, Lq, M, L, P) = {expected[:-1]}")


def _compiled(value: Tensor, shapes: list[tuple[int, int]], starts: list[int], *rest: Tensor) -> Tensor:
    return torch.ops.vis.ms_deform_attn(value, _flat(shapes), starts, *rest)


def _triton(value: Tensor, shapes: list[tuple[int, int]], starts: list[int], *rest: Tensor) -> Tensor:
    return triton_kernels.triton_ms_deform_attn(value, _flat(shapes), starts, *rest)


def _flat(shapes: list[tuple[int, int]]) -> list[int]:
    return [size for pair in shapes for size in pair]


#: What runs, by the name of the backend.
RUN: dict[str, Callable[..., Tensor]] = {"compiled": _compiled, "triton": _triton, "torch": reference.gathered}
