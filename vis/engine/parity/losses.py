"""Training losses of a recording against those of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances
from detectron2.utils.env import seed_all_rng
from torch import nn

from vis.engine.parity.common import Array, Check, clip_sample, existing, read_npz
from vis.structures import ClipSample

#: Recordings are of this iteration, past the first half of a training, in which DVIS matches by the stage before.
ITERATION = 100_000
#: A mean loss lies within this many recorded standard deviations, or within this part of the recorded mean.
LOSS_DEVIATIONS = 5.0
LOSS_SHARE = 0.01


def read_losses(path: str | Path) -> dict[str, Any]:
    """``{"frames", "seeds", "loss": {name: [mean, deviation]}}`` of a ``.train.json`` file."""
    file = existing(path, "losses")
    recorded = json.loads(file.read_text(encoding="utf-8"))
    if not {"frames", "seeds", "loss"} <= set(recorded):
        raise ValueError(f"{file} needs frames, seeds and loss, found {sorted(recorded)}")
    return recorded


def check_losses(model: nn.Module, path: str | Path) -> list[Check]:
    """Mean losses over the recorded number of seeds on the clip in ``M.train.npz`` beside ``M.train.json``."""
    recorded = read_losses(path)
    file = Path(path)
    clip = read_npz(file.with_name(file.name.removesuffix(".json") + ".npz"), "input", "gt_masks", "gt_masks_shape")
    frames = len(clip["input"])
    if frames != int(recorded["frames"]):
        return [Check(str(path), False, f"says {recorded['frames']} frames, its clip has {frames}")]
    active = list(_active_dropout(model))
    if active:
        return [Check("dropout and drop path", False, f"must be 0 for recorded losses: {', '.join(active[:5])}")]
    ours = _mean_losses(model, labelled_sample(clip), int(recorded["seeds"]))
    expected: dict[str, tuple[float, float]] = recorded["loss"]
    checks = [_check_loss(name, ours[name], *expected[name]) for name in expected if name in ours]
    checks += [
        Check(name, False, f"the model gives no such loss; it gives {', '.join(sorted(ours))}")
        for name in expected
        if name not in ours
    ]
    checks += [Check(name, False, "a loss that the release does not have") for name in ours if name not in expected]
    return checks


def _mean_losses(model: nn.Module, sample: ClipSample, seeds: int) -> dict[str, float]:
    model.train()
    tell = getattr(model, "set_iteration", None)
    if tell is not None:
        tell(ITERATION)
    totals: dict[str, list[float]] = {}
    for seed in range(seeds):
        seed_all_rng(seed)
        with torch.no_grad():
            losses = model([sample])
        for name, value in losses.items():
            totals.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in totals.items()}


def _check_loss(name: str, found: float, mean: float, deviation: float) -> Check:
    allowed = max(LOSS_DEVIATIONS * deviation, LOSS_SHARE * abs(mean))
    difference = abs(found - mean)
    detail = f"{found:.6f}, recorded {mean:.6f} +- {deviation:.6f}, off by {difference:.6f}, allowed {allowed:.6f}"
    return Check(name, bool(difference <= allowed), detail)


def _active_dropout(model: nn.Module) -> Iterator[str]:
    """Modules that would drop something in training mode."""
    for name, module in model.named_modules():
        rates = [getattr(module, attribute, 0.0) for attribute in ("drop_prob", "dropout")]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            yield name


def labelled_sample(clip: Mapping[str, Array]) -> ClipSample:
    """The recorded clip with its instances: the same N slots in every frame, id -1 where one is absent."""
    shape = tuple(int(size) for size in clip["gt_masks_shape"])
    bits = np.unpackbits(clip["gt_masks"])[: int(np.prod(shape))]
    masks = torch.from_numpy(bits.reshape(shape).astype(bool))
    classes, ids = torch.from_numpy(clip["gt_classes"]).long(), torch.from_numpy(clip["gt_ids"]).long()
    instances = []
    for frame in range(shape[1]):
        frame_masks = BitMasks(masks[:, frame])
        instances.append(
            Instances(
                (shape[2], shape[3]),
                gt_classes=classes,
                gt_ids=ids[:, frame],
                gt_masks=frame_masks,
                gt_boxes=frame_masks.get_bounding_boxes(),
            )
        )
    sample = clip_sample(clip["input"])
    sample["instances"] = instances
    return sample
