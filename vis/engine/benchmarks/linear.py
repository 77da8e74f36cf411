"""The linear layer of ``vis.layers.linear`` beside torch's own, at the sizes of the pixel decoder and the decoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.engine.benchmarks.common import Settings
from vis.layers.linear import linear

#: (rows, inputs, outputs): both halves of the encoder's feed-forward network for two frames of 240x416, a projection
#: of one frame of 192x320, and the decoder's feed-forward network for 100 queries.
SIZES = ((4368, 256, 1024), (4368, 1024, 256), (1260, 256, 256), (100, 256, 2048))


def measure_linear(settings: Settings) -> dict[str, Any]:
    """Best processor time, in ms, of forward and of forward with backward."""
    if settings.device != "cpu":
        raise ValueError("on other devices than the CPU both are the same function: use --device cpu")
    torch.set_num_threads(settings.threads)
    return {"rows": [_measure(size, settings) for size in SIZES]}


def _measure(size: tuple[int, int, int], settings: Settings) -> dict[str, Any]:
    rows, inputs, outputs = size
    leaves = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    trained = [x.clone().requires_grad_() for x in leaves]
    gradient = torch.randn(rows, outputs)

    def both(function: Callable[..., Tensor]) -> dict[str, float]:
        return {
            "forward": _best(lambda: function(*leaves), settings),
            "forward_backward": _best(lambda: function(*trained).backward(gradient), settings),
        }

    return {"size": list(size), "torch": both(F.linear), "vis": both(linear)}


def _best(work: Callable[[], Any], settings: Settings) -> float:
    times = []
    for _ in range(settings.warmup + settings.repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[settings.warmup :]) * 1e3


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    text = []
    for row in result["rows"]:
        parts = []
        for kind, words in (("forward", "forward"), ("forward_backward", "forward + backward")):
            ours, theirs = row["vis"][kind], row["torch"][kind]
            parts.append(f"{words} {ours:.2f} ms, torch {theirs:.2f} ms ({theirs / ours:.2f}x)")
        text.append(" x ".join(map(str, row["size"])) + ": " + "; ".join(parts))
    return text
