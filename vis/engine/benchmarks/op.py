"""Multi-scale deformable attention alone, forward and backward, at the shapes of the pixel decoder's encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vis.engine.benchmarks.common import Settings, repeat, spread
from vis.layers.ms_deform_attn import ms_deform_attn

HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32)
#: Padded network inputs (height, width): 360p and 720p video.
SIZES = ((384, 640), (736, 1280))
#: What can be measured here, by name.
BACKENDS: dict[str, Callable[..., Tensor]] = {"pytorch": ms_deform_attn}


def measure_op(settings: Settings) -> dict[str, Any]:
    """One frame's encoder layer, fp32, for every backend and size."""
    rows = []
    for name, backend in BACKENDS.items():
        for size in SIZES:
            arguments, leaves = encoder_inputs(size, settings.device)
            with torch.no_grad():
                forward = repeat(settings, partial(backend, *arguments), scale=1e3)
            both = repeat(settings, partial(_forward_backward, backend, arguments, leaves), scale=1e3)
            rows.append(
                {
                    "backend": name,
                    "input": list(size),
                    "tokens": arguments[0].shape[1],
                    "forward": forward,
                    "forward_backward": both,
                }
            )
    return {"rows": rows, "heads": HEADS, "channels": CHANNELS, "points": POINTS, "strides": list(STRIDES)}


def encoder_inputs(size: tuple[int, int], device: str) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments of the op for one image of ``size``, and those of them that get gradients."""
    shapes = [(size[0] // stride, size[1] // stride) for stride in STRIDES]
    counts = [h * w for h, w in shapes]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    tokens, levels = sum(counts), len(shapes)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, tokens, HEADS, CHANNELS, generator=generator)
    locations = torch.rand(1, tokens, HEADS, levels, POINTS, 2, generator=generator)
    logits = torch.randn(1, tokens, HEADS, levels * POINTS, generator=generator)
    weights = logits.softmax(-1).view(1, tokens, HEADS, levels, POINTS)
    leaves = [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]
    return (leaves[0], shapes, starts, leaves[1], leaves[2]), leaves


def _forward_backward(backend: Callable[..., Tensor], arguments: tuple[Any, ...], leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
    output = backend(*arguments)
    output.backward(torch.ones_like(output))


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    return [
        f"{row['backend']:<10} {row['input'][0]}x{row['input'][1]} ({row['tokens']} tokens): "
        f"forward {spread(row['forward'], 'ms', 1)}, forward and backward {spread(row['forward_backward'], 'ms', 1)}"
        for row in result["rows"]
    ]
