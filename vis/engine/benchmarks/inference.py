"""Seconds per frame of inference on one video, from frames in memory to encoded masks at the original size."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from vis.engine.benchmarks.common import Settings, build, repeat, spread, synchronize, video
from vis.structures import VideoPrediction
from vis.structures.rle import decode, encode_masks

#: Modules whose time is told apart, where a model has them.
NETWORK, _TRACKER = ("backbone", "sem_seg_head", "detr"), ("tracker",)


class ModuleClock:
    """Adds up the seconds spent in some submodules."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], device: str) -> None:
        self.seconds = 0.0
        self._device, self._start = device, 0.0
        for name in names:
            module = getattr(model, name, None)
            if isinstance(module, nn.Module):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        synchronize(self._device)
        self._start = time.perf_counter()

    def _end(self, *_: Any) -> None:
        synchronize(self._device)
        self.seconds += time.perf_counter() - self._start


def measure_inference(settings: Settings) -> dict[str, Any]:
    """Whole forward passes, and where their time goes.

    ``network`` is backbone, pixel decoder and decoder; ``tracker`` what follows in track order; ``rle`` encoding the
    reported masks once more on its own; ``masks`` the rest: mask logits and resizing to the original size.
    """
    _, model = build(settings)
    frames = settings.frames[0]
    sample = video(settings, frames)
    clocks = {
        "network": ModuleClock(model, NETWORK, settings.device),
        "tracker": ModuleClock(model, _TRACKER, settings.device),
    }
    parts: dict[str, list[float]] = {name: [] for name in clocks}
    predictions: list[VideoPrediction] = []

    def run() -> None:
        for clock in clocks.values():
            clock.seconds = 0.0
        predictions[:] = model([sample])
        for name, clock in clocks.items():
            parts[name].append(clock.seconds)

    with torch.no_grad():
        total = repeat(settings, run, scale=1 / frames)
    split = {name: float(np.median(values[settings.warmup :])) / frames for name, values in parts.items()}
    split["rle"] = _encoding_seconds(predictions[0]) / frames
    split["masks"] = max(total["median"] - sum(split.values()), 0.0)
    return {
        "seconds_per_frame": total,
        "split": split,
        "frames": frames,
        "tracks": len(predictions[0]),
        "masks": sum(rle is not None for track in predictions[0].masks for rle in track),
        "rle_kib_per_frame": encoded_bytes(predictions[0]) / 1024 / frames,
    }


def encoded_bytes(prediction: VideoPrediction) -> int:
    """Characters in the RLEs of a result."""
    return sum(len(rle["counts"]) for track in prediction.masks for rle in track if rle is not None)


def _encoding_seconds(prediction: VideoPrediction) -> float:
    """Time to encode each frame's distinct reported masks again (tracks of one query share theirs)."""
    tracks = dict(zip(prediction.track_ids.tolist(), prediction.masks, strict=True))
    seconds = 0.0
    for frame in range(prediction.length):
        rles = [masks[frame] for masks in tracks.values() if masks[frame] is not None]
        if not rles:
            continue
        columns = torch.from_numpy(np.stack([decode(rle).T for rle in rles]))
        start = time.perf_counter()
        encode_masks(columns)
        seconds += time.perf_counter() - start
    return seconds


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words; columns add up from left to right."""
    split = result["split"]
    network = split["network"]
    tracked = network + split["tracker"]
    masks = tracked + split["masks"]
    return [
        f"{spread(result['seconds_per_frame'], 's per frame')}, video of {result['frames']} frames",
        f"network {network:.3f} | + tracker {tracked:.3f} | + masks at original size {masks:.3f} "
        f"| + RLE {masks + split['rle']:.3f}   (s per frame, medians)",
        f"{result['tracks']} tracks, {result['masks']} masks, {result['rle_kib_per_frame']:.1f} KiB of RLE per frame",
    ]
