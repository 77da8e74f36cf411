"""Inference of our model and of the same in plain PyTorch, in turn, so that what else the machine does meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vis.engine.benchmarks.common import Settings, build, spread, summary, synchronize, video
from vis.engine.benchmarks.inference import NETWORK, ModuleClock
from vis.engine.benchmarks.plain import plain
from vis.engine.benchmarks.plain_idol import PlainIDOL, disagreement
from vis.modeling.meta_arch.idol import IDOL
from vis.structures import VideoPrediction

#: What is timed: name -> what turns the model into it.
Sides = dict[str, Callable[[], AbstractContextManager[None]]]


def sides_of(model: nn.Module) -> Sides:
    """``ours`` and ``plain``; of IDOL also ``all masks``: our network, and the rest as released."""
    if isinstance(model, IDOL):
        return {
            "ours": nullcontext,
            "all masks": partial(_decoding, model),
            "plain": partial(plain, model, {IDOL: PlainIDOL}),
        }
    return {"ours": nullcontext, "plain": partial(plain, model)}


@contextmanager
def _decoding(model: IDOL) -> Iterator[None]:
    try:
        model.__class__ = PlainIDOL
        yield
    finally:
        model.__class__ = IDOL


def measure_against_plain(settings: Settings) -> dict[str, Any]:
    """Seconds per frame of all sides, and how far their predictions are apart."""
    _, model = build(settings)
    sample, frames = video(settings, settings.frames[0]), settings.frames[0]
    sides = sides_of(model)
    clock = ModuleClock(model, NETWORK, settings.device)
    seconds: dict[str, dict[str, list[float]]] = {name: {"total": [], "network": [], "cpu": []} for name in sides}
    predictions: dict[str, VideoPrediction] = {}
    with torch.no_grad():
        for index in range(settings.warmup + settings.repeats):
            for name, side in sides.items():
                with side():
                    clock.seconds = 0.0
                    synchronize(settings.device)
                    start, start_cpu = time.perf_counter(), time.process_time()
                    (predictions[name],) = model([sample])
                    synchronize(settings.device)
                    figures = (time.perf_counter() - start, clock.seconds, time.process_time() - start_cpu)
                if index >= settings.warmup:
                    for key, value in zip(seconds[name], figures, strict=True):
                        seconds[name][key].append(value / frames)
        apart = _logits_apart(model, list(sample["image"])[: min(frames, 2)], sides["plain"])
    result: dict[str, Any] = {"frames": frames, "logits_apart": apart}
    for name, lists in seconds.items():
        result[name] = {
            "seconds_per_frame": {**summary(lists["total"]), "cpu": statistics.median(lists["cpu"])},
            "network": summary(lists["network"]),
        }
    result["times"] = _times(result["ours"], result["plain"])
    if "all masks" in sides:
        result["times_all_masks"] = _times(result["ours"], result["all masks"])
        result["disagreement"] = {
            name: disagreement(predictions["ours"], other) for name, other in predictions.items() if name != "ours"
        }
    return result


def _times(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {
        "network": other["network"]["median"] / ours["network"]["median"],
        "total": other["seconds_per_frame"]["median"] / ours["seconds_per_frame"]["median"],
        "cpu": other["seconds_per_frame"]["cpu"] / ours["seconds_per_frame"]["cpu"],
    }


def _logits_apart(model: Any, frames: list[Tensor], side: Callable[[], AbstractContextManager[None]]) -> float:
    """Largest difference of class logits over the largest logit.

    Rounding, unless a mask logit next to zero opens a cell to a query on one side only.
    """
    found = []
    for context in (nullcontext(), side()):
        with context:
            found.append(_class_logits(model, model.normalizer(frames), frames).float())
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


def _class_logits(model: Any, images: Tensor, frames: list[Tensor]) -> Tensor:
    if isinstance(model, IDOL):
        sizes = [(int(frame.shape[-2]), int(frame.shape[-1])) for frame in frames]
        return model.detr.detr.class_logits(model.detr(images, sizes).layers[-1], -1)
    return model.sem_seg_head(model.backbone(images))["pred_logits"]


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    text = []
    for name in ("ours", "all masks", "plain"):
        if name in result:
            total, network = result[name]["seconds_per_frame"], result[name]["network"]["median"]
            text.append(f"{name:<9} {spread(total, 's per frame')}, network {network:.3f}")
    times = result["times"]
    text.append(
        f"plain PyTorch takes {times['total']:.2f} times as long, {times['cpu']:.2f} times the processor time, the "
        f"network {times['network']:.2f} times as long (video of {result['frames']} frames)"
    )
    if "times_all_masks" in result:
        times = result["times_all_masks"]
        text.append(
            f"with our network, all masks and selecting afterwards take {times['total']:.2f} times as long, "
            f"{times['cpu']:.2f} times the processor time"
        )
    for name, apart in result.get("disagreement", {}).items():
        text.append(
            f"results of {name}: {apart['in_both']} in both of {apart['results'][0]} and {apart['results'][1]}, scores "
            f"differ by up to {apart['scores_apart']:.1e}, masks in {apart['pixels_apart']} of {apart['pixels']} pixels"
        )
    return [*text, f"class logits differ by {result['logits_apart']:.1e} of the largest"]
