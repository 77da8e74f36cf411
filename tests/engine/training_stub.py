"""A model of a few hundred numbers and a data set of a few pictures: what the trainer needs to be tested in seconds.

A config names this file in ``IMPORTS``; ``write_data`` makes the data set that it registers from yaml.

The model draws from every random generator in each step, so a random state that is not restored shows in the weights.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image
from torch import nn

from vis.config import CfgNode, declare
from vis.structures import VideoPrediction

HEIGHT, WIDTH, FRAMES, VIDEOS = 32, 48, 3, 5


@declare
def add_config(cfg: CfgNode) -> None:
    """How the stub misbehaves."""
    cfg.MODEL.STUB = CfgNode({"NAN_AT": -1, "SLEEP": 0.0, "WIDTH": 5})


@META_ARCH_REGISTRY.register()
class TrainingStub(nn.Module):
    """Predicts the mean colour of a clip, badly."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        width = cfg.MODEL.STUB.WIDTH
        self.nan_at = cfg.MODEL.STUB.NAN_AT
        self.steps = 0
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3))
        self.query_feat = nn.Embedding(1, width)
        self.class_embed = nn.Linear(width, 3)

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        """Losses in training; one meaningless track in evaluation, which draws random numbers too."""
        if not self.training:
            torch.rand(7), np.random.rand(), random.random()
            return [self._predict(sample) for sample in batch]
        pictures = torch.stack([sample["image"][0] for sample in batch]).float() / 255
        features = self.backbone(pictures).mean((2, 3)) + self.query_feat.weight
        target = pictures.mean((2, 3)) + 0.1 * (random.random() + np.random.rand())
        loss = (self.class_embed(features) - target).square().mean()
        if self.steps == self.nan_at:
            loss = loss * float("nan")
        self.steps += 1
        return {"loss_colour": loss, "loss_size": 0.01 * features.square().mean()}

    def _predict(self, sample: dict[str, Any]) -> VideoPrediction:
        return VideoPrediction(
            scores=torch.tensor([0.5]),
            labels=torch.tensor([0]),
            track_ids=torch.tensor([0]),
            masks=[[None] * sample["length"]],
            height=sample["height"],
            width=sample["width"],
            length=sample["length"],
            video_id=sample["video_id"],
        )


def write_data(folder: Path) -> None:
    """A few videos of noise with a box in each, the same bytes every time: two json files and the frames."""
    generator = np.random.default_rng(3)
    videos, annotations = [], []
    for video in range(VIDEOS):
        names = [f"{video}_{frame}.png" for frame in range(FRAMES)]
        for name in names:
            Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / name)
        videos.append({"id": video + 11, "height": HEIGHT, "width": WIDTH, "length": FRAMES, "file_names": names})
        annotations.append(
            {
                "id": video + 1,
                "video_id": video + 11,
                "category_id": 1,
                "iscrowd": 0,
                "height": HEIGHT,
                "width": WIDTH,
                "segmentations": [[[4.0, 5.0, 24.0, 5.0, 24.0, 19.0, 4.0, 19.0]]] * FRAMES,
                "bboxes": [[4.0, 5.0, 20.0, 14.0]] * FRAMES,
                "areas": [280.0] * FRAMES,
            }
        )
    content = {"videos": videos, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(json.dumps({**content, "annotations": annotations}))
    (folder / "test.json").write_text(json.dumps(content))
