"""The model of a configuration, and two steps of its training, without a file left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from detectron2.utils.events import EventStorage

from vis.config import CfgNode
from vis.data.layout import batch_layout
from vis.data.loaders import build_train_loader
from vis.engine.benchmarks.common import resident_bytes
from vis.engine.doctor.findings import BAD, Finding, bad, good, note
from vis.engine.doctor.memory import estimate
from vis.engine.doctor.setting import GIB, check_disk, check_weights, checkpoint_bytes
from vis.engine.state import random_state_kept
from vis.engine.trainer import Trainer


def check_training(cfg: CfgNode, *, steps: int, processes: int = 1, download: bool = False) -> Iterator[Finding]:
    """Build what a training needs; then disk, weights, memory, and ``steps`` steps on the data.

    Args:
        cfg: frozen, with an OUTPUT_DIR that is not written to.
        processes: that will train; here there is one.
    """
    with random_state_kept():
        torch.manual_seed(0)
        try:
            trainer = Trainer(cfg)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            yield bad("model", str(error).splitlines()[0])
            return
        parameters = sum(p.numel() for p in trainer.module.parameters())
        trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
        name = cfg.MODEL.META_ARCHITECTURE
        yield good("model", f"{name}, {parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained")
        yield check_disk(cfg, checkpoint_bytes(trainer.module, cfg.SOLVER.OPTIMIZER))
        weights = check_weights(cfg, trainer.module, download=download)
        yield weights
        yield _memory(cfg, trainer, processes)
        if steps and weights.level == BAD:
            yield note("dry steps", "are left out before the weights are right")
        elif steps:
            yield _steps(cfg, trainer, steps)


def _memory(cfg: CfgNode, trainer: Trainer, processes: int) -> Finding:
    what = "memory"
    try:
        layout = batch_layout(cfg, world_size=processes)
    except ValueError as error:
        return bad(what, str(error))
    clips = layout.per_part
    try:
        found = estimate(
            *(cfg, trainer.module),
            context=lambda: trainer.step.part(0, 0, 1),
            extra_copies=int(trainer.average is not None),
        )
    except (RuntimeError, ValueError, KeyError, IndexError, FloatingPointError) as error:  # broken weights, other clips
        return note(what, f"no estimate: a small step failed ({str(error).splitlines()[0]})")
    height, width = found.size
    text = (
        f"about {found.total(clips) / GIB:.2f} GiB per process: {found.state / GIB:.2f} for weights, gradients and "
        f"optimizer, {found.activations(clips) / GIB:.2f} for {clips} clips of {found.frames} frames of "
        f"{height}x{width}\n({layout}; from what two small steps keep, without workspace of kernels and CUDA context)"
    )
    if trainer.device.type != "cuda":
        return good(what, text)
    total = torch.cuda.get_device_properties(trainer.device).total_memory
    if found.total(clips) > 0.9 * total:
        return bad(
            what,
            f"{text}\nthis GPU has {total / GIB:.1f} GiB",
            "SOLVER.ACCUMULATE_STEPS N holds a part of the clips at once; a smaller INPUT.MIN_SIZE_TRAIN, SOLVER.AMP",
        )
    return good(what, text)


def _steps(cfg: CfgNode, trainer: Trainer, steps: int) -> Finding:
    what, cuda = "dry steps", trainer.device.type == "cuda"
    start = time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    losses: list[float] = []
    try:
        loader = build_train_loader(cfg, layout=trainer.layout)
        with EventStorage() as storage:
            for iteration in range(steps):
                trainer.sentinel.before_step()
                trainer.step(iteration, [next(loader) for _ in range(trainer.layout.steps)])
                losses.append(storage.history("total_loss").latest())
                storage.step()
    except FileNotFoundError as error:
        return bad(what, str(error).splitlines()[0], "a data set is missing: see above")
    except FloatingPointError as error:
        return bad(what, str(error), "with these weights and data the training would stop at once")
    except torch.OutOfMemoryError as error:
        return bad(what, str(error).splitlines()[0], "see the estimate of the memory above")
    except (ValueError, RuntimeError, OSError) as error:
        return bad(what, f"{type(error).__name__}: {error}", "train_net.py --debug shows where it comes from")
    finally:
        trainer.sentinel.after_train()
    memory = torch.cuda.max_memory_allocated(trainer.device) if cuda else resident_bytes()
    return good(
        what,
        f"{steps} iterations of {cfg.SOLVER.IMS_PER_BATCH} clips in {time.perf_counter() - start:.1f} s, total loss "
        f"{', '.join(f'{loss:.4g}' for loss in losses)}; {memory / GIB:.2f} GiB in use",
    )
