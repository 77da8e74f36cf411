"""Seconds and peak memory of a training step."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor, nn

from vis.engine.benchmarks.common import (
    MIB,
    MovingFrames,
    Settings,
    build,
    in_subprocess,
    peak_bytes,
    repeat,
    spread,
)
from vis.solver import build_gradient_clipper, build_optimizer
from vis.structures import ClipSample

CLIPS, INSTANCES = 2, 6


class Training:
    """A model, its optimizer, and the clips that it is trained on again and again."""

    def __init__(self, settings: Settings) -> None:
        cfg, self.model = build(settings)
        self.model.train()
        self.optimizer = build_optimizer(cfg, self.model)
        self._clip = build_gradient_clipper(cfg)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._samples = [labelled_clip(settings, seed) for seed in range(CLIPS)]

    def backward(self) -> dict[str, Tensor]:
        """The losses, whose gradients the parameters have then."""
        losses: dict[str, Tensor] = self.model(self._samples)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        return losses

    def step(self) -> None:
        """Forward, backward, clipping, optimizer."""
        self.backward()
        if self._clip is not None:
            self._clip(self.parameters)
        self.optimizer.step()


def measure_train(settings: Settings) -> dict[str, Any]:
    """Forward, backward, clipping and optimizer step, in a process of its own."""
    return in_subprocess("train:run_once", settings)


def run_once(settings: Settings) -> dict[str, Any]:
    """Steps on the same two clips in this process.

    ``peak_mib`` counts everything; ``state_mib`` is what stays between steps: weights, gradients, optimizer. From the
    second step on both are there while activations are, so one step of warm-up belongs to a measurement of memory.
    """
    training = Training(settings)
    cuda = settings.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = repeat(settings, training.step)
    return {
        "seconds_per_step": seconds,
        "peak_mib": peak_bytes() / MIB,
        "state_mib": _state_bytes(training.model, training.optimizer) / MIB,
        "device_peak_mib": torch.cuda.max_memory_allocated() / MIB if cuda else None,
        "clips": CLIPS,
        "frames_per_clip": settings.frames[0],
        "instances_per_clip": INSTANCES,
    }


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters and buffers, their gradients and the optimizer's tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [x.grad for x in model.parameters() if x.grad is not None]
    tensors += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def labelled_clip(settings: Settings, seed: int) -> ClipSample:
    """Frames of the moving texture with six rectangles that drift apart, one instance each."""
    height, width = settings.input_size
    length = settings.frames[0]
    frames = MovingFrames(length=length, size=settings.input_size, seed=seed)
    instances = []
    for frame in range(length):
        masks = torch.zeros(INSTANCES, height, width, dtype=torch.bool)
        for index in range(INSTANCES):
            top = (index // 3) * height // 2 + 3 * seed + frame
            left = (index % 3) * width // 3 + 5 * seed + frame
            masks[index, top : top + height // 3, left : left + width // 4] = True
        bits = BitMasks(masks)
        annotated = Instances((height, width))
        annotated.gt_classes = torch.arange(INSTANCES)
        annotated.gt_ids = torch.arange(INSTANCES)
        annotated.gt_masks = bits
        annotated.gt_boxes = bits.get_bounding_boxes()
        instances.append(annotated)
    return ClipSample(
        image=list(frames),
        instances=instances,
        height=height,
        width=width,
        video_id=seed,
        frame_ids=list(range(length)),
        length=length,
        file_names=[],
    )


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    per_second = 1 / result["seconds_per_step"]["median"]
    device = f", device {result['device_peak_mib']:.0f} MiB" if result["device_peak_mib"] is not None else ""
    return [
        f"{spread(result['seconds_per_step'], 's per step')}, {per_second:.3g} per second; {result['clips']} clips "
        f"of {result['frames_per_clip']} frame(s) with {result['instances_per_clip']} instances",
        f"peak {result['peak_mib']:.0f} MiB{device}, {result['state_mib']:.0f} of it weights, gradients, optimizer",
    ]
