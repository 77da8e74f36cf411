"""Tiny models of every method, a training step and an evaluation of each, for comparisons of formats and devices."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import layouts
import torch
from torch import Tensor

from vis.engine import load_cfg
from vis.engine.benchmarks.common import MovingFrames, Settings, video
from vis.engine.benchmarks.plain_idol import enliven
from vis.engine.benchmarks.train import labelled_clip
from vis.engine.precision import autocast
from vis.modeling import build_model
from vis.structures import VideoPrediction

#: Beside layouts.METHODS.
_MORE = {
    "iai_mask_rcnn": ["configs/demo/iai_mask_rcnn_synthetic.yaml", "INPUT.SAMPLING_FRAME_NUM", "2"],
    "condinst_track": ["configs/demo/condinst_track_synthetic.yaml"],
}
METHODS = {**layouts.METHODS, **_MORE}
# Every region and anchor is drawn, or a draw that a rounding changed would be another training.
_ALL_DRAWN = ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", "4096", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4096"]
SIZE = (64, 96)
CLASSES = 6


@dataclass(frozen=True)
class Step:
    """Losses of a training step and the gradients, None where a parameter has none."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    @property
    def total(self) -> float:
        """The sum of the losses."""
        return float(sum(self.losses.values()))

    @property
    def gradient(self) -> Tensor:
        """All gradients in one vector, in float64 on the CPU."""
        return torch.cat([x.double().cpu().flatten() for x in self.gradients.values() if x is not None])


def build(method: str, *more: str) -> tuple[Any, int]:
    """A model on the CPU, always with the same weights, and the number of frames of its clips."""
    config, *options = METHODS[method]
    options += ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(CLASSES)]
    cfg = load_cfg(str(layouts.ROOT / config), [*options, *_ALL_DRAWN, *more])
    torch.manual_seed(1)
    model = build_model(cfg)
    return model, cfg.INPUT.SAMPLING_FRAME_NUM


def step(model: Any, frames: int, device: str = "cpu", dtype: torch.dtype | None = None) -> Step:
    """Forward and backward of two clips by a copy of the model on the device, under autocast to ``dtype``."""
    model = copy.deepcopy(model).to(device).train()
    clips = [labelled_clip(Settings(input_size=SIZE, frames=(frames,)), seed) for seed in range(2)]
    torch.manual_seed(2)
    with autocast(dtype, torch.device(device)):
        losses = model(clips)
    torch.stack([loss.float() for loss in losses.values()]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Step({name: loss.detach() for name, loss in losses.items()}, gradients)


def evaluated(model: Any, device: str, length: int = 5) -> VideoPrediction:
    """The result of a short video, by a copy of the model on the device."""
    model = copy.deepcopy(model).to(device).eval()
    settings = Settings(input_size=SIZE, output_size=(72, 108))
    with torch.no_grad():
        (prediction,) = model([video(settings, length)])
    return prediction


def enliven_idol(model: Any) -> None:
    """Spread the scores and embeddings of an IDOL with initial weights, or it finds nothing to track."""
    enliven(model.eval(), MovingFrames(length=1, size=SIZE)[0])
