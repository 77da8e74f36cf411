"""A model of a few hundred numbers and a data set of a few pictures: what the trainer needs to be tested in seconds.

A config names this module in ``IMPORTS``; ``write_data`` makes the data set that it registers from yaml. Run as a
program it is a server of processes: for each line of json it forks one that trains, kills it where asked, and prints
how it ended.

The model draws from every random generator in each step, so a random state that is not restored shows in the weights.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.env import seed_all_rng
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
        self.sleep = cfg.MODEL.STUB.SLEEP
        self.steps = 0
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3))
        self.query_feat = nn.Embedding(1, width)
        self.class_embed = nn.Linear(width, 3)

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        """Losses in training; one meaningless track in evaluation, which draws random numbers too."""
        if not self.training:
            torch.rand(7), np.random.rand(), random.random()
            return [self._predict(sample) for sample in batch]
        time.sleep(self.sleep)
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


def run(config: str, opts: list[str], die_at: int = -1, resume: bool = True) -> None:
    """Train, and kill this process at the ``die_at``-th step of writing files (-1: never)."""
    from vis.checkpoint import atomic
    from vis.engine import load_cfg
    from vis.engine.trainer import Trainer

    torch.set_num_threads(1)
    if die_at >= 0:
        _die_at(die_at, atomic)
    cfg = load_cfg(config, opts)
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()


def _die_at(count: int, atomic: Any) -> None:
    """Every file that is written atomically is four steps: the first write, flush, renaming, flush of the folder.

    A death in the first write leaves half of it in the file.
    """
    seen = 0

    def step(function: Any) -> Any:
        def counted(*args: Any) -> Any:
            nonlocal seen
            first = not hasattr(args[0], "tell") or args[0].tell() == 0
            seen += first
            if first and seen > count:
                if len(args) == 2 and hasattr(args[0], "tell"):
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return counted

    atomic._Recording.write = step(atomic._Recording.write)
    os.fsync = step(os.fsync)
    os.replace = step(os.replace)


def serve() -> None:
    """Fork a training per line ``{"config", "opts", "die_at", "kill_after"}``; print its exit code (-9: killed).

    A fork of a process that has imported everything starts at once, and waiting for the process itself, not for the
    pipes it shares with the loader's workers, tells at once that it is dead.
    """
    import vis.engine.trainer  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            os.dup2(2, 1)
            run(job["config"], job["opts"], job["die_at"])
            sys.stderr.flush()
            os._exit(0)
        end = time.monotonic() + (job["kill_after"] or 60)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                end = float("inf")
            time.sleep(0.005)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


if __name__ == "__main__":
    sys.modules["training_stub"] = sys.modules["__main__"]  # what configs import
    serve()
