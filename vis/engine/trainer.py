"""The trainer of every method: detectron2's loop and hooks, with exact resuming and errors that say what happened."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import hooks as d2_hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vis.checkpoint import build_class_map, load_weights, read_checkpoint, remove_temporary_files
from vis.config import CfgNode
from vis.data.loaders import build_test_loader, build_train_loader
from vis.engine.hooks import CheckpointHook, EvaluationHook, MetricPrinter
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
from vis.evaluation import build_evaluator, inference_on_dataset
from vis.modeling import build_model
from vis.solver import build_gradient_clipper, build_lr_scheduler, build_optimizer
from vis.solver.clipping import gradient_norm
from vis.structures import ClipSample

logger = logging.getLogger(__name__)

LOG_PERIOD = 20
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Trainer(TrainerBase):
    """Trains ``build_model(cfg)`` on ``build_train_loader(cfg)``.

        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()

    A run that is stopped at any moment and resumed ends with the weights of one that was not stopped: bitwise on the
    CPU with the same number of threads and processes, whatever the number of loader workers. On CUDA some kernels add
    in no fixed order; ``SOLVER.DETERMINISTIC`` asks for others where torch has them.

    Raises:
        ValueError: a name or number in the configuration is not usable.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.cfg = cfg
        self.folder = Path(cfg.OUTPUT_DIR)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.module = build_model(cfg)
        self.module.train()
        self.device = next(self.module.parameters()).device
        self.optimizer = build_optimizer(cfg, self.module)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.clipper = build_gradient_clipper(cfg)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.dtype, self.scaler = _mixed_precision(cfg, self.device)
        self.model = _distributed(self.module, self.device)
        self.results: OrderedDict[str, Any] = OrderedDict()
        self._resumed_random: list[dict[str, Any]] | None = None
        self._loader: Iterator[list[ClipSample]] = iter(())
        self._first: list[ClipSample] | None = None
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
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.start_iter = state["iteration"]
        self._resumed_random = state["random"]
        logger.info("Resumed from %s: %d of %d iterations are done", path, self.start_iter, self.max_iter)
        self._compare_config(state)
        if self.start_iter >= self.max_iter:
            logger.warning("nothing is left to train: raise SOLVER.MAX_ITER (%d) to train longer", self.max_iter)
        if comm.is_main_process():
            drop_metrics_from(self.folder / METRICS, self.start_iter)

    def _compare_config(self, state: dict[str, Any]) -> None:
        if state["world_size"] != comm.get_world_size():
            logger.warning(
                "the checkpoint is of %d processes, now there are %d: other batches and random numbers follow",
                *(state["world_size"], comm.get_world_size()),
            )
            self._resumed_random = None
        changes = (
            config_changes(state["config"], self._config) if state["config_hash"] != config_hash(self._config) else []
        )
        harmless = (
            "OUTPUT_DIR",
            "MODEL.WEIGHTS:",
            "DATALOADER.NUM_WORKERS",
            "TEST.",
            "SOLVER.CHECKPOINT_",
            "DATASETS.TEST",
        )
        for change in changes:
            level = logging.INFO if change.startswith(harmless) else logging.WARNING
            logger.log(level, "config differs from that of the checkpoint: %s", change)

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
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter = self.max_iter
                self._loader = iter(())  # ends the workers before the last evaluation
            finally:
                self.after_train()
        return self.results

    def _prepare(self) -> None:
        if comm.is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in remove_temporary_files(self.folder):
                logger.info("removed %s, which a killed process left half-written", stale)
        for name in self.cfg.DATASETS.TEST if comm.is_main_process() else ():
            _check_test_set(self.cfg, name)
        if self.start_iter < self.max_iter:
            self._loader = build_train_loader(self.cfg, start_iter=self.start_iter)
            self._first = next(self._loader)
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
            d2_hooks.IterationTimer(),
            d2_hooks.LRScheduler(self.optimizer, self.scheduler),
            checkpoints,
        ]
        if self.cfg.DATASETS.TEST:
            hooks.append(EvaluationHook(period=self.cfg.TEST.EVAL_PERIOD, evaluate=self._evaluate))
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

    def _evaluate(self) -> OrderedDict[str, Any]:
        self.results = evaluate(self.cfg, self.module)
        return self.results

    def run_step(self) -> None:
        """One iteration: batch, losses, gradients, clipping, update."""
        tell = getattr(self.module, "set_iteration", None)
        if tell is not None:  # a method whose losses change in the course of a training, which may be a resumed one
            tell(self.iter)
        start = time.perf_counter()
        batch = self._first if self._first is not None else next(self._loader)
        self._first = None
        data_time = time.perf_counter() - start

        with self._autocast():
            losses = self._losses(batch)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        scaler = self.scaler
        (total if scaler is None else scaler.scale(total)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters) if self.clipper is None else self.clipper(self.parameters)
        self._record(losses, norm, data_time, batch)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    def _losses(self, batch: list[ClipSample]) -> dict[str, Tensor]:
        try:
            return self.model(batch)
        except FloatingPointError as error:  # of a matcher, which does not know where the training is
            raise FloatingPointError(
                f"at iteration {self.iter}, videos of the batch {_videos(batch)}: {error}"
            ) from error

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast("cuda", dtype=self.dtype)

    def _record(self, losses: dict[str, Tensor], norm: Tensor, data_time: float, batch: list[ClipSample]) -> None:
        """Check the numbers of this step before the update, in one transfer from the device, and store them."""
        names = list(losses)
        numbers = torch.stack(
            [*(loss.detach().float() for loss in losses.values()), norm.detach().float().to(self.device)]
        )
        values = dict(zip([*names, "grad_norm"], numbers.tolist(), strict=True))
        gradient = values.pop("grad_norm")
        # Overflow of a gradient is what a scaler is there for: it leaves the step out and lowers the scale.
        if not all(map(math.isfinite, values.values())) or (self.scaler is None and not math.isfinite(gradient)):
            self._fail(values, gradient, batch)
        if comm.get_world_size() > 1:
            reduced = comm.reduce_dict({name: numbers[i] for i, name in enumerate(names)})
            values = {name: float(value) for name, value in reduced.items()}
        self.storage.put_scalar("data_time", data_time)
        self.storage.put_scalar("total_loss", sum(values.values()))
        self.storage.put_scalars(**values)
        self.storage.put_scalar("grad_norm", gradient)
        if self.scaler is not None:
            self.storage.put_scalar("[metric]grad_scaler", self.scaler.get_scale(), smoothing_hint=False)

    def _fail(self, values: dict[str, float], gradient: float, batch: list[ClipSample]) -> None:
        last = last_checkpoint(self.folder)
        what = "a gradient" if all(map(math.isfinite, values.values())) else "the loss"
        raise FloatingPointError(
            f"{what} is not finite at iteration {self.iter}: "
            + ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            + f", gradient norm {gradient:.6g}; videos of the batch: {_videos(batch)}. "
            + (f"The last checkpoint before is {last}. " if last is not None else "No checkpoint was written before. ")
            + "A lower SOLVER.BASE_LR, SOLVER.CLIP_GRADIENTS, or SOLVER.AMP.DTYPE bfloat16 may help."
        )

    def checkpoint_state(self) -> dict[str, Any]:
        """What is needed to continue after this iteration exactly; call it in every process."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            # Batches are a function of the iteration, so this is the position of the sampler too.
            "iteration": self.iter + 1,
            "random": comm.gather(random_state()),
            "world_size": comm.get_world_size(),
            "config": self._config,
            "config_hash": config_hash(self._config),
        }


def _videos(batch: list[ClipSample]) -> str:
    return ", ".join(f"{sample.get('video_id')} (frames {sample.get('frame_ids')})" for sample in batch)


def evaluate(cfg: CfgNode, model: nn.Module) -> OrderedDict[str, Any]:
    """Run ``model`` over every data set of ``DATASETS.TEST``; results go to ``OUTPUT_DIR/inference``.

    An evaluation of the same weights that was stopped is continued (``TEST.RESUME``).

    Returns:
        For one data set its results, for several ``{data set: results}``; in the main process.
    """
    names = list(cfg.DATASETS.TEST)
    results: OrderedDict[str, Any] = OrderedDict()
    for name in names:
        folder = Path(cfg.OUTPUT_DIR) / "inference" / (name if len(names) > 1 else "")
        loader = build_test_loader(cfg, name)
        found = inference_on_dataset(model, loader, build_evaluator(cfg, name, folder, model=model))
        results[name] = found or OrderedDict()
    return results[names[0]] if len(names) == 1 else results


def evaluate_only(cfg: CfgNode, *, resume: bool = False) -> OrderedDict[str, Any]:
    """Load ``MODEL.WEIGHTS`` strictly and evaluate; no training data are needed.

    Args:
        resume: take the last checkpoint of ``OUTPUT_DIR`` instead, where there is one.

    Raises:
        ValueError: there is nothing to load or nothing to evaluate on, or the weights are not of this model.
        FileNotFoundError: the weights or the data set are not there.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name the data sets to evaluate on")
    weights: str | Path | None = last_checkpoint(cfg.OUTPUT_DIR) if resume else None
    if weights is not None and cfg.MODEL.WEIGHTS:
        logger.warning("--resume evaluates %s; MODEL.WEIGHTS %s is NOT used", weights, cfg.MODEL.WEIGHTS)
    weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            "nothing to evaluate: set MODEL.WEIGHTS to a file, or use --resume with the OUTPUT_DIR of a training"
        )
    model = build_model(cfg)
    load_weights(model, weights, training=False)
    model.eval()
    return evaluate(cfg, model)


def _check_test_set(cfg: CfgNode, name: str) -> None:
    """Find out before the training, not after it, that there is nothing to evaluate on."""
    try:
        build_test_loader(cfg, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error} (DATASETS.TEST "()" trains without evaluation)') from error


def _mixed_precision(cfg: CfgNode, device: torch.device) -> tuple[torch.dtype | None, torch.amp.GradScaler | None]:
    amp = cfg.SOLVER.AMP
    if not amp.ENABLED:
        return None, None
    if amp.DTYPE not in _DTYPES:
        raise ValueError(f"SOLVER.AMP.DTYPE {amp.DTYPE!r} is not one of {', '.join(_DTYPES)}")
    if device.type != "cuda":
        logger.warning("SOLVER.AMP.ENABLED: mixed precision applies to CUDA only; this run on %s uses float32", device)
        return None, None
    dtype = _DTYPES[amp.DTYPE]
    logger.info("mixed precision: %s%s", amp.DTYPE, " with a loss scaler" if dtype is torch.float16 else "")
    return dtype, torch.amp.GradScaler("cuda") if dtype is torch.float16 else None


def _distributed(model: nn.Module, device: torch.device) -> nn.Module:
    if comm.get_world_size() == 1:
        return model
    # Each process keeps its own statistics of the batches; the option was renamed, and the old name warns.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    option: dict[str, Any] = {name: False}
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **option)
