"""The trainer of every method: detectron2's loop and hooks, with exact resuming and errors that say what happened."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from detectron2.engine import hooks as d2_hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter

from vis.checkpoint import build_class_map, load_weights, read_checkpoint, remove_temporary_files
from vis.config import CfgNode
from vis.data.layout import batch_layout, log_layout
from vis.data.loaders import build_train_loader
from vis.engine.best_checkpoint import build_best_checkpoint
from vis.engine.data_parallel import data_parallel, synchronized_norms
from vis.engine.ema import PART as EMA_PART
from vis.engine.ema import build_average
from vis.engine.evaluation import check_test_set, evaluate, evaluate_only
from vis.engine.hooks import CheckpointHook, EvaluationHook, MetricPrinter
from vis.engine.nonfinite import build_sentinel
from vis.engine.precision import compile_parts, mixed_precision
from vis.engine.preemption import PreemptionHook
from vis.engine.state import (
    LAST,
    METRICS,
    config_changes,
    config_hash,
    drop_metrics_from,
    last_checkpoint,
    plain_config,
    random_state,
    set_earlier_run_aside,
    set_random_state,
)
from vis.engine.step import StopAtNonFinite, TrainingStep, normalizer_is_exact
from vis.modeling import build_model
from vis.solver import build_gradient_clipper, build_lr_scheduler, build_optimizer
from vis.structures import ClipSample

__all__ = ["Trainer", "evaluate", "evaluate_only"]

logger = logging.getLogger(__name__)

LOG_PERIOD = 20


class Stateful(Protocol):
    """Something whose state belongs into checkpoints; ``state_dict`` gives tensors and plain containers only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Trainer(TrainerBase):
    """Trains ``build_model(cfg)`` on ``build_train_loader(cfg)``.

        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()

    A run that is stopped at any moment and resumed ends with the weights of one that was not stopped: bitwise on the
    CPU with the same number of threads and processes, whatever the number of loader workers. With another number of
    processes it goes on with the same batches and random numbers, and the weights are the same up to the order of sums.
    On CUDA some kernels add in no fixed order; ``SOLVER.DETERMINISTIC`` asks for others where torch has them.

    Raises:
        ValueError: a name or number in the configuration is not usable.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.cfg = cfg
        self.folder = Path(cfg.OUTPUT_DIR)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.layout = batch_layout(cfg)
        module = build_model(cfg)
        self.device = next(module.parameters()).device
        self.module = synchronized_norms(cfg, module, self.device)
        self.module.train()
        self.optimizer = build_optimizer(cfg, self.module)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        compile_parts(cfg, self.module)
        self.model = data_parallel(cfg, self.module, self.device)
        dtype, scaler = mixed_precision(cfg, self.device)
        self.step = TrainingStep(
            module=self.module,
            model=self.model,
            optimizer=self.optimizer,
            clipper=build_gradient_clipper(cfg),
            dtype=dtype,
            scaler=scaler,
            sentinel=StopAtNonFinite(self.folder),
            layout=self.layout,
            seed=max(cfg.SEED, 0),
            exact=normalizer_is_exact(cfg),
            all_used=not (cfg.SOLVER.DDP.FIND_UNUSED_PARAMETERS or cfg.SOLVER.DDP.STATIC_GRAPH),
        )
        self.sentinel = self.step.sentinel = build_sentinel(cfg, self.step)
        # What else belongs into checkpoints, by name. A part that is not in the checkpoint that is resumed starts anew.
        self.stateful: dict[str, Stateful] = {"nonfinite": self.sentinel}
        self.average = build_average(cfg, self.module)
        if self.average is not None:
            self.stateful[EMA_PART] = self.average
        # Called after every evaluation in every process, with the results (empty outside the main process).
        self.after_evaluation: list[Callable[[OrderedDict[str, Any]], None]] = []
        self.best = build_best_checkpoint(cfg, self.module)
        if self.best is not None:
            self.after_evaluation.append(self.best)
        self.results: OrderedDict[str, Any] = OrderedDict()
        self.stop_reason = ""
        self._resumed_random: list[dict[str, Any]] | None = None
        self._loader: Iterator[list[ClipSample]] = iter(())
        self._first: list[list[ClipSample]] | None = None
        self._config = plain_config(cfg)

    def resume_or_load(self, resume: bool = False) -> None:
        """Continue from ``OUTPUT_DIR/last_checkpoint``, or start at iteration 0 from ``MODEL.WEIGHTS``.

        The log says which of the two it was.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged, or not of this model.
        """
        path = last_checkpoint(self.folder) if resume else None
        if len(found := set(comm.all_gather(path))) > 1:
            raise ValueError(f"the processes see different checkpoints ({found}): OUTPUT_DIR must be a shared folder")
        weights = self.cfg.MODEL.WEIGHTS
        if path is not None:
            if weights:
                logger.warning("--resume continues from %s; MODEL.WEIGHTS %s is NOT used", path, weights)
            self._resume(path)
            return
        if resume:
            logger.warning("--resume: no %s in %s, so training starts at iteration 0", LAST, self.folder)
        self.start_iter = 0
        if comm.is_main_process():
            set_earlier_run_aside(self.folder)
        if weights:
            allowed = tuple(self.cfg.MODEL.WEIGHTS_ALLOW_MISSING)
            load_weights(self.module, weights, allow_missing=allowed, class_map=build_class_map(self.cfg))
        else:
            logger.info("MODEL.WEIGHTS is empty: training starts from initial weights")

    def _resume(self, path: Path) -> None:
        state = read_checkpoint(path)
        if (
            not isinstance(state, dict)
            or not {"model", "optimizer", "scheduler", "iteration", "random"} <= state.keys()
        ):
            raise ValueError(
                f"{path} is not a checkpoint of a training here (weights alone go into MODEL.WEIGHTS, without --resume)"
            )
        try:
            self.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is of another model than this config describes: {error}") from error
        self.scheduler.load_state_dict(state["scheduler"])
        if self.step.scaler is not None and state["scaler"] is not None:
            self.step.scaler.load_state_dict(state["scaler"])
        for name, part in self.stateful.items():
            if name in state.get("parts", {}):
                part.load_state_dict(state["parts"][name])
            else:
                logger.warning("%s has no state of %s, which starts anew", path, name)
        self.start_iter = state["iteration"]
        self._resumed_random = state["random"]
        logger.info("Resumed from %s: %d of %d iterations are done", path, self.start_iter, self.max_iter)
        self._compare_config(state)
        if self.start_iter >= self.max_iter:
            logger.warning("nothing is left to train: raise SOLVER.MAX_ITER (%d) to train longer", self.max_iter)
        if comm.is_main_process():
            drop_metrics_from(self.folder / METRICS, self.start_iter)

    def _compare_config(self, state: dict[str, Any]) -> None:
        reference = state.get("reference", state["world_size"])
        if (state["world_size"], reference) != (comm.get_world_size(), self.layout.reference):
            self._other_layout(state["world_size"], reference)
        changes = (
            config_changes(state["config"], self._config) if state["config_hash"] != config_hash(self._config) else []
        )
        harmless = (
            "OUTPUT_DIR",
            "MODEL.WEIGHTS:",
            "DATALOADER.NUM_WORKERS",
            "TEST.",
            "SOLVER.CHECKPOINT_",
            "SOLVER.BEST_CHECKPOINT.",
            "SOLVER.NONFINITE.",
            "DATASETS.TEST",
        )
        for change in changes:
            level = logging.INFO if change.startswith(harmless) else logging.WARNING
            logger.log(level, "config differs from that of the checkpoint: %s", change)

    def _other_layout(self, before: int, reference: int) -> None:
        """The batches of a run stay those of the number of processes that it began with, if they can."""
        now = comm.get_world_size()
        if before != now:
            self._resumed_random = None  # what a step draws does not depend on it
        self.layout = self.step.layout = batch_layout(self.cfg, reference=reference)
        if self.layout.reference == reference:
            logger.warning("the checkpoint is of %d processes, now there are %d: the same batches follow", before, now)
        else:
            logger.warning(
                "the checkpoint is of %d processes, now there are %d, and SOLVER.REFERENCE_WORLD_SIZE is %d instead of "
                "%d: other batches follow",
                *(before, now, self.cfg.SOLVER.REFERENCE_WORLD_SIZE, reference),
            )

    def train(self) -> OrderedDict[str, Any]:  # type: ignore[override]
        """Run from ``start_iter`` to ``SOLVER.MAX_ITER`` and return the results of the last evaluation.

        Raises:
            FloatingPointError: the loss or, without a loss scaler, a gradient is not finite.
            OSError: a checkpoint cannot be written; those before are intact.
        """
        self._prepare()
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    if self.stop_reason:
                        logger.info("Training ends after %d iterations: %s", iteration, self.stop_reason)
                        break
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
                else:
                    self.iter = self.max_iter
                self._loader = iter(())  # ends the workers before the last evaluation
            finally:
                self.after_train()
        return self.results

    def stop(self, reason: str) -> None:
        """End the training after this iteration and keep it as ``model_final.pth``; every process must call it alike.

        For ``after_evaluation``: no evaluation follows.
        """
        self.stop_reason = reason

    def _prepare(self) -> None:
        if comm.is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in remove_temporary_files(self.folder):
                logger.info("removed %s, which a killed process left half-written", stale)
        for name in self.cfg.DATASETS.TEST if comm.is_main_process() else ():
            check_test_set(self.cfg, name)
        if self.start_iter < self.max_iter:
            log_layout(self.cfg, self.layout)
            self._loader = build_train_loader(self.cfg, start_iter=self.start_iter, layout=self.layout)
            self._first = self._batches()
        # Only now: building the loader and its first batch must not count, whether this is a start or a continuation.
        if self._resumed_random is not None:
            set_random_state(self._resumed_random[comm.get_rank()])
        else:
            seed_all_rng(max(self.cfg.SEED, 0) + self.start_iter + comm.get_rank())
        self.register_hooks(self._build_hooks())
        logger.info("Starting training from iteration %d", self.start_iter)

    def _build_hooks(self) -> list[d2_hooks.HookBase]:
        solver = self.cfg.SOLVER
        checkpoints = CheckpointHook(
            get_state=self.checkpoint_state,
            folder=self.folder,
            period=solver.CHECKPOINT_PERIOD,
            keep=solver.CHECKPOINT_KEEP,
        )
        hooks: list[d2_hooks.HookBase] = [
            self.sentinel,
            d2_hooks.IterationTimer(),
            d2_hooks.LRScheduler(self.optimizer, self.scheduler),
            *([] if self.average is None else [self.average]),
            checkpoints,
            PreemptionHook(save=checkpoints.save_now, device=self.device, every=max(10 // self.layout.steps, 1)),
        ]
        if self.cfg.DATASETS.TEST:
            hooks.append(EvaluationHook(period=self.cfg.TEST.EVAL_PERIOD, evaluate=self.evaluate_now))
        if self.best is not None:
            hooks.append(self.best)
        if comm.is_main_process():
            hooks.append(d2_hooks.PeriodicWriter(self._writers(), period=LOG_PERIOD))
        return hooks

    def _writers(self) -> list[EventWriter]:
        writers: list[EventWriter] = [MetricPrinter(max_iter=self.max_iter, cuda=self.device.type == "cuda")]
        writers.append(JSONWriter(str(self.folder / METRICS)))
        if importlib.util.find_spec("tensorboard") is None:
            logger.warning("tensorboard is not installed: curves go to %s only", METRICS)
        else:
            writers.append(TensorboardXWriter(str(self.folder), purge_step=self.start_iter or None))
        return writers

    def evaluate_now(self) -> OrderedDict[str, Any]:
        """Evaluate the weights, or their average (``SOLVER.EMA``), and tell ``after_evaluation``."""
        average = self.average if self.cfg.SOLVER.EMA.EVALUATE else None
        with nullcontext() if average is None else average.applied():
            self.results = evaluate(self.cfg, self.module)
            for call in self.after_evaluation:
                call(self.results)
        return self.results

    def run_step(self) -> None:
        """One iteration: batch, losses, gradients, clipping, update."""
        start = time.perf_counter()
        batches = self._first if self._first is not None else self._batches()
        self._first = None
        self.storage.put_scalar("data_time", time.perf_counter() - start)
        self.step(self.iter, batches)

    def _batches(self) -> list[list[ClipSample]]:
        return [next(self._loader) for _ in range(self.layout.steps)]

    def checkpoint_state(self) -> dict[str, Any]:
        """What is needed to continue after this iteration exactly; call it in every process."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.step.scaler is None else self.step.scaler.state_dict(),
            "parts": {name: part.state_dict() for name, part in self.stateful.items()},
            # Batches are a function of the iteration, so this is the position of the sampler too.
            "iteration": self.iter + 1,
            "random": comm.gather(random_state()),
            "world_size": comm.get_world_size(),
            "reference": self.layout.reference,
            "config": self._config,
            "config_hash": config_hash(self._config),
        }
