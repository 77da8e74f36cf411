"""How much memory a training step takes, from two small steps.

What a forward pass keeps for the backward pass is counted while it runs (torch tells of every tensor that is saved), on
synthetic clips of two sizes. It grows with the number of pixels, so a line through the two gives it at any size. To it
come weights, gradients and the optimizer's moments, which are known. Not counted: what a kernel needs while it runs,
fragments, and the CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vis.config import CfgNode
from vis.engine.benchmarks.common import Settings
from vis.engine.benchmarks.train import labelled_clip
from vis.structures import ClipSample

#: (height, width) of the two steps.
SIZES = ((96, 160), (192, 320))
_STRIDE = 32
_ASPECT = 16 / 9


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step.

    Attributes:
        state: weights, gradients, moments of the optimizer.
        fixed, per_pixel: what one clip keeps for the backward pass: ``fixed + per_pixel * height * width``.
        size: (height, width) of the largest frames of the training; frames: of a clip.
    """

    state: int
    fixed: float
    per_pixel: float
    size: tuple[int, int]
    frames: int

    def activations(self, clips: int = 1, size: tuple[int, int] | None = None) -> float:
        """What ``clips`` clips keep for the backward pass."""
        height, width = padded(size or self.size)
        return clips * (self.fixed + self.per_pixel * height * width)

    def total(self, clips: int = 1) -> float:
        """State and activations."""
        return self.state + self.activations(clips)


def estimate(
    cfg: CfgNode, model: nn.Module, *, context: Callable[[], AbstractContextManager[Any]], extra_copies: int = 0
) -> Estimate:
    """Run two small steps of ``model`` and extrapolate; its buffers change, its parameters do not.

    Args:
        context: what a forward pass runs in.
        extra_copies: of the trained parameters (an average of the weights is one).
    """
    frames = max(cfg.INPUT.SAMPLING_FRAME_NUM, 1)
    kept = [saved_bytes(model, clips(cfg, model, size, frames), context=context) for size in SIZES]
    pixels = [height * width for height, width in SIZES]
    slope = (kept[1] - kept[0]) / (pixels[1] - pixels[0])
    moments = 2 if cfg.SOLVER.OPTIMIZER == "ADAMW" else 1
    state = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Estimate(
        state=state + (1 + moments + extra_copies) * trained,
        fixed=kept[0] - slope * pixels[0],
        per_pixel=slope,
        size=largest_size(cfg),
        frames=frames,
    )


def largest_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) of the largest frames that the training sees, if they are 16:9, padded."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    short = max(sizes) if isinstance(sizes, Sequence) else sizes
    wide = min(round(short * _ASPECT), cfg.INPUT.MAX_SIZE_TRAIN)
    short = min(short, round(wide / _ASPECT))
    return padded((short, wide))


def padded(size: tuple[int, int]) -> tuple[int, int]:
    """As the models pad frames."""
    height, width = (-(-side // _STRIDE) * _STRIDE for side in size)
    return height, width


def clips(cfg: CfgNode, model: nn.Module, size: tuple[int, int], frames: int) -> list[ClipSample]:
    """One labelled clip of this size on the model's classes."""
    sample = labelled_clip(Settings(input_size=size, frames=(frames,)), seed=0)
    for instances in sample["instances"]:
        instances.gt_classes = instances.gt_classes % cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return [sample]


def saved_bytes(
    model: nn.Module, batch: list[ClipSample], *, context: Callable[[], AbstractContextManager[Any]]
) -> int:
    """Bytes that a forward pass keeps for the backward pass, each piece of memory once, without the parameters."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), context():
        losses = model(batch)  # the graph keeps what was saved, so no piece of memory is used twice
    total = sum(found.values())
    del losses
    return total
