"""Training as it runs: loader, steps, data-parallel layout, in several ways side by side.

Each variant is a few keys over the configuration, and a process of its own, so that its peak of memory is its own. The
data are the synthetic set, so that no other is needed; frames have the size that the settings name.
"""

from __future__ import annotations

import logging
import tempfile
import time
from typing import Any

import torch
from detectron2.utils.events import EventStorage

from vis.config import CfgNode
from vis.data.loaders import build_train_loader
from vis.data.synthetic import generate
from vis.engine.benchmarks.common import (
    MIB,
    Settings,
    in_subprocess,
    peak_bytes,
    resident_bytes,
    spread,
    summary,
    synchronize,
)
from vis.engine.benchmarks.data import PRESET, datasets_under
from vis.engine.config import load_cfg
from vis.engine.trainer import Trainer

logger = logging.getLogger(__name__)

_FLOAT32, _AT_ONCE = ("SOLVER.AMP.ENABLED", "False"), ("SOLVER.ACCUMULATE_STEPS", "1")
#: name -> keys that are set; "plain" is what the others are compared with.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (*_FLOAT32, *_AT_ONCE),
    "fp16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16", *_AT_ONCE),
    "bf16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16", *_AT_ONCE),
    "accumulate": (*_FLOAT32, "SOLVER.ACCUMULATE_STEPS", "2"),
    "checkpoint": (*_FLOAT32, *_AT_ONCE),
    "compile": (*_FLOAT32, *_AT_ONCE),
}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Without layers that could be computed again, but for those of a backbone.
_DETECTORS = ("IAI", "ImageDetector", "MaskTrackRCNN")
#: What "checkpoint" switches on, where the configuration's parts have it: layers are computed again in backward.
_CHECKPOINT_KEYS = (
    "MODEL.SWIN.USE_CHECKPOINT",
    "MODEL.VIT_ADAPTER.WITH_CP",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_CHECKPOINT",
    "MODEL.IDOL.ENC_CHECKPOINT",
)
#: Clips of an iteration, unless KEY VALUE pairs say otherwise.
CLIPS = 2


def measure_variants(settings: Settings) -> dict[str, Any]:
    """Every variant in a process of its own, one after the other.

    Raises:
        ValueError: no such variant.
    """
    unknown = [name for name in settings.variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"unknown variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    results = {}
    for name in settings.variants:
        changed = Settings(**{**vars(settings), "variants": (name,)})
        results[name] = in_subprocess("train_variants:run_variant", changed)
    return {"variants": results}


def run_variant(settings: Settings) -> dict[str, Any]:
    """The first of ``settings.variants`` in this process.

    ``seconds`` of an iteration contain ``data_seconds``, the wait for the loader. Where the variant does not exist on
    this device, ``reason`` says why and there are no figures.
    """
    (name,) = settings.variants
    with tempfile.TemporaryDirectory(prefix="vis_benchmark_") as root, datasets_under(root):
        generate(PRESET, root, num_videos={"train": 8, "val": 1})
        cfg = _configuration(settings, name, root)
        before = resident_bytes()
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        if name in _HALF and trainer.step.dtype is not _HALF[name]:
            wanted = str(_HALF[name]).removeprefix("torch.")
            return {"reason": f"training runs in float32 on {trainer.device}: no {wanted} there"}
        if name == "checkpoint" and not any(_value(cfg, key) for key in _CHECKPOINT_KEYS):
            return {"reason": "no part of this configuration can be computed again in backward"}
        return {**_run(settings, cfg, trainer), "before_mib": before / MIB}


def _run(settings: Settings, cfg: CfgNode, trainer: Trainer) -> dict[str, Any]:
    seconds, waits, losses = [], [], []
    loader = build_train_loader(cfg, layout=trainer.layout)
    cuda = trainer.device.type == "cuda"
    with EventStorage() as storage:
        for iteration in range(settings.warmup + settings.repeats):
            if cuda and iteration == settings.warmup:
                torch.cuda.reset_peak_memory_stats()
            synchronize(settings.device)
            start = time.perf_counter()
            trainer.sentinel.before_step()
            batches = [next(loader) for _ in range(trainer.layout.steps)]
            waited = time.perf_counter() - start
            trainer.step(iteration, batches)
            synchronize(settings.device)
            if iteration >= settings.warmup:
                seconds.append(time.perf_counter() - start)
                waits.append(waited)
            losses.append(storage.history("total_loss").latest())
            storage.step()
    trainer.sentinel.after_train()
    return {
        "iterations_per_second": summary([1 / second for second in seconds]),
        "seconds": summary(seconds),
        "data_seconds": summary(waits),
        "peak_mib": peak_bytes() / MIB,
        "device_peak_mib": torch.cuda.max_memory_allocated() / MIB if cuda else None,
        "losses": losses,
        "clips": cfg.SOLVER.IMS_PER_BATCH,
        "steps": trainer.layout.steps,
        "frames_per_clip": cfg.INPUT.SAMPLING_FRAME_NUM,
        "workers": cfg.DATALOADER.NUM_WORKERS,
        "dtype": str(trainer.step.dtype or torch.float32).removeprefix("torch."),
    }


def _configuration(settings: Settings, name: str, root: str) -> CfgNode:
    short, wide = min(settings.input_size), max(settings.input_size)
    options = ["DATASETS.TRAIN", f"('{PRESET}_train',)", "DATASETS.TEST", "()", "OUTPUT_DIR", root]
    options += [
        "DATASETS.DATASET_RATIO",
        "[]",
        "INPUT.MIN_SIZE_TRAIN",
        f"({short},)",
        "INPUT.MAX_SIZE_TRAIN",
        str(wide),
    ]
    options += ["INPUT.CROP.ENABLED", "False", "MODEL.WEIGHTS", "", "MODEL.DEVICE", settings.device]
    options += ["SOLVER.IMS_PER_BATCH", str(CLIPS), "INPUT.SAMPLING_FRAME_NUM", str(settings.frames[0])]
    options += VARIANTS[name]
    if name == "checkpoint":
        cfg = load_cfg(settings.config_file)
        options += [word for key in _CHECKPOINT_KEYS if _used(cfg, key) for word in (key, "True")]
    if name == "compile":
        options += ["SOLVER.COMPILE.PARTS", f"['{_backbone(load_cfg(settings.config_file))}']"]
    return load_cfg(settings.config_file, [*options, *settings.opts])


def _used(cfg: CfgNode, key: str) -> bool:
    """Whether the configuration has the part that the key belongs to."""
    for part, name in (("MODEL.SWIN.", "swin"), ("MODEL.VIT_ADAPTER.", "vit")):
        if key.startswith(part):
            return name in cfg.MODEL.BACKBONE.NAME.lower()
    if cfg.MODEL.META_ARCHITECTURE in _DETECTORS:
        return False
    return (cfg.MODEL.META_ARCHITECTURE == "IDOL") == key.startswith("MODEL.IDOL.")


def _backbone(cfg: CfgNode) -> str:
    """What "compile" makes one program of: the backbone, by the name that a model has it under."""
    if cfg.MODEL.META_ARCHITECTURE in _DETECTORS:
        return "image_model.backbone.bottom_up"
    return "detr.detr.backbone.0.backbone" if cfg.MODEL.META_ARCHITECTURE == "IDOL" else "backbone"


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words, a line for each variant."""
    texts = []
    for name, figures in result["variants"].items():
        if "reason" in figures:
            texts.append(f"{name:<11} not measured: {figures['reason']}")
            continue
        device = figures["device_peak_mib"]
        before = f", {figures['before_mib']:.0f} of it before the model" if device is None else " of the device"
        peak = figures["peak_mib"] if device is None else device
        share = 100 * figures["data_seconds"]["median"] / figures["seconds"]["median"]
        texts.append(
            f"{name:<11} {spread(figures['iterations_per_second'], 'iterations per second')}, {figures['clips']} clips "
            f"in {figures['steps']} step(s), {figures['dtype']}; {share:.0f} % of the time waits for data "
            f"({figures['workers']} workers); peak {peak:.0f} MiB{before}"
        )
    return texts
