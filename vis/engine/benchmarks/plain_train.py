"""A training step of ours beside the straightforward one: the same weights, clips and random points, in the same run.

What is swapped is that of :mod:`~vis.engine.benchmarks.plain` and, of the losses of single frames and of VITA, what
:mod:`~vis.engine.benchmarks.plain_losses` and :mod:`~vis.engine.benchmarks.plain_vita` say. IAI goes through a clip
frame by frame on the straightforward side. Other losses (CTVIS, DVIS, IDOL) are the same code on both sides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vis.engine.benchmarks.common import MIB, ROOT, Settings, in_subprocess, peak_bytes, spread, summary, synchronize
from vis.engine.benchmarks.plain import plain
from vis.engine.benchmarks.plain_losses import PlainSetCriterion
from vis.engine.benchmarks.plain_vita import PlainVitaCriterion, PlainVitaModule
from vis.engine.benchmarks.train import CLIPS, INSTANCES, Training
from vis.modeling.criterions.set_criterion import SetCriterion
from vis.modeling.criterions.vita import VitaCriterion
from vis.modeling.meta_arch.iai import IAI
from vis.modeling.segmenter import FrameNormalizer
from vis.modeling.transformer_decoders.vita import VitaModule

#: What the command line takes where nothing else is said: the losses of whole clips are where the two differ most.
DEFAULTS: dict[str, Any] = {"config_file": str(ROOT / "configs" / "vita" / "ytvis19_r50.yaml"), "frames": (5,)}
_SIDES = ("ours", "plain")
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    SetCriterion: PlainSetCriterion,
    VitaCriterion: PlainVitaCriterion,
    VitaModule: PlainVitaModule,
}


@contextmanager
def plain_training(model: nn.Module, swapped: dict[type[nn.Module], type[nn.Module]] = _PLAIN) -> Iterator[None]:
    """While it is open, ``model`` is trained the straightforward way."""
    with plain(model, swapped):
        if not isinstance(model, IAI):
            yield
            return
        before, model.sequential = model.sequential, True
        try:
            yield
        finally:
            model.sequential = before


def _side(name: str, model: nn.Module) -> AbstractContextManager[None]:
    return plain_training(model) if name == "plain" else nullcontext()


def measure_train_against_plain(settings: Settings) -> dict[str, Any]:
    """Steps of both in turn, so that what else happens on the machine meets both; first, how far they are apart.

    Peak memory is that of two steps in a process of its own for each side; on a GPU, of the steps that are timed.
    """
    cuda = settings.device.startswith("cuda")
    training = Training(settings)
    result: dict[str, Any] = {"apart": compare(training), "clips": CLIPS, "instances_per_clip": INSTANCES}
    result["frames_per_clip"] = settings.frames[0]
    wall: dict[str, list[float]] = {name: [] for name in _SIDES}
    cpu: dict[str, list[float]] = {name: [] for name in _SIDES}
    peak = dict.fromkeys(_SIDES, 0.0)
    for index in range(settings.warmup + settings.repeats):
        for name in _SIDES:
            torch.manual_seed(index)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            with _side(name, training.model):
                synchronize(settings.device)
                start, start_cpu = time.perf_counter(), time.process_time()
                training.step()
                synchronize(settings.device)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
            peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / MIB if cuda else 0.0)
    del training
    for name in _SIDES:
        seconds = {**summary(wall[name][settings.warmup :]), "cpu": statistics.median(cpu[name][settings.warmup :])}
        own = peak[name] if cuda else in_subprocess(f"plain_train:peak_of_{name}", settings)["peak_mib"]
        result[name] = {"seconds_per_step": seconds, "peak_mib": own}
    ours, other = result["ours"], result["plain"]
    result["times"] = {
        "total": other["seconds_per_step"]["median"] / ours["seconds_per_step"]["median"],
        "cpu": other["seconds_per_step"]["cpu"] / ours["seconds_per_step"]["cpu"],
        "peak": other["peak_mib"] / ours["peak_mib"],
    }
    return result


def peak_of_ours(settings: Settings) -> dict[str, Any]:
    """Peak memory of this process after two steps of ours: in the second one gradients and optimizer are there too."""
    return _peak(settings, "ours")


def peak_of_plain(settings: Settings) -> dict[str, Any]:
    """The same of two straightforward steps."""
    return _peak(settings, "plain")


def _peak(settings: Settings, name: str) -> dict[str, Any]:
    training = Training(settings)
    with _side(name, training.model):
        for _ in range(2):
            training.step()
    return {"peak_mib": peak_bytes() / MIB}


def compare(training: Training) -> dict[str, Any]:
    """How far losses and gradients of the two are apart, on the weights as they are.

    Both start from the same seed and draw the same points. What is left is rounding, and what rounding decides: whether
    a mask logit next to zero opens a cell to a query, which of two points is the more uncertain one. Frames have the
    same layout here: with another, convolutions round otherwise, and which of some equal pixels gets the gradient of
    max pooling is anybody's guess. So is the gradient of deformable attention's offsets, which begin at whole cells.
    Dropout inside of attention, where a model has it, draws otherwise on each side.

    Returns:
        ``loss``: largest difference of a loss over it, ``name`` of that loss; ``gradient``: norm of the difference of
        all gradients over their norm.

    Raises:
        ValueError: the two do not have the same losses.
    """
    found: list[tuple[dict[str, float], Tensor]] = []
    same_layout = {**_PLAIN, FrameNormalizer: FrameNormalizer}
    for name in _SIDES:
        torch.manual_seed(0)
        if isinstance(training.model, IAI):
            training.model.set_iteration(0)  # from which identities are drawn
        with plain_training(training.model, same_layout) if name == "plain" else nullcontext():
            losses = {key: float(loss.detach()) for key, loss in training.backward().items()}
        gradients = [parameter.grad for parameter in training.parameters if parameter.grad is not None]
        found.append((losses, torch.cat([gradient.flatten() for gradient in gradients])))
    (ours, gradient), (other, theirs) = found
    if set(ours) != set(other) or len(gradient) != len(theirs):
        raise ValueError(f"losses differ: {sorted(ours)} and {sorted(other)}")
    apart = {key: abs(ours[key] - other[key]) / max(abs(other[key]), 1e-6) for key in ours}
    worst = max(apart, key=lambda key: apart[key])
    difference = float((gradient - theirs).norm() / theirs.norm())
    return {"loss": apart[worst], "name": worst, "losses": len(apart), "gradient": difference}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    text = [
        f"{name:<6} {spread(result[name]['seconds_per_step'], 's per step')}; peak {result[name]['peak_mib']:.0f} MiB"
        for name in _SIDES
    ]
    times, apart = result["times"], result["apart"]
    return [
        *text,
        f"the straightforward step takes {times['total']:.2f} times as long, {times['cpu']:.2f} times the processor "
        f"time, {times['peak']:.2f} times the memory ({result['clips']} clips of {result['frames_per_clip']} frame(s) "
        f"with {result['instances_per_clip']} instances)",
        f"the {apart['losses']} losses differ by at most {apart['loss']:.1e} of their value ({apart['name']}), the "
        f"gradient by {apart['gradient']:.1e} of its norm; both drew the same points",
    ]
