"""What happens around the steps of a training: checkpoints, evaluation, the lines of the log."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.hooks import EvalHook
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from vis.checkpoint import save_atomic
from vis.engine.state import (
    FINAL,
    checkpoint_name,
    iteration_of,
    periodic_checkpoints,
    random_state_kept,
    set_last_checkpoint,
)

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Writes ``model_0000099.pth`` every ``period`` iterations and ``model_final.pth`` after the last one.

    A file is complete before ``last_checkpoint`` names it, and older ones go (``keep``) only after that.

    Args:
        get_state: gives what to save; called by every rank, since random states are gathered.
        keep: how many periodic checkpoints stay; 0 keeps all. Those of another run in the folder, with a later
            iteration than this run started from, are not touched.
    """

    def __init__(self, *, get_state: Callable[[], dict[str, Any]], folder: Path, period: int, keep: int = 0) -> None:
        if period < 1:
            raise ValueError(f"SOLVER.CHECKPOINT_PERIOD must be at least 1, found {period}")
        if keep < 0:
            raise ValueError(f"SOLVER.CHECKPOINT_KEEP must be 0 (keep all) or more, found {keep}")
        self.get_state = get_state
        self.folder = folder
        self.period = period
        self.keep = keep
        self.written: list[Path] = []

    def before_train(self) -> None:
        """Count the checkpoints of the run that is continued as ours."""
        before = self.trainer.start_iter
        self.written = [path for path in periodic_checkpoints(self.folder) if iteration_of(path) < before]

    def after_step(self) -> None:
        """Save where it is time to."""
        done = self.trainer.iter + 1
        final = done >= self.trainer.max_iter
        if not final and done % self.period:
            return
        state = self.get_state()
        if not comm.is_main_process():
            return
        if done % self.period == 0:
            self._save_periodic(state)
        if final:
            self._save(state, self.folder / FINAL)
        self._forget()

    def save_now(self) -> None:
        """Save after this step whatever the period, for a training that has to end here; not what is saved already."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            return
        state = self.get_state()
        if comm.is_main_process():
            self._save_periodic(state)
            self._forget()

    def _save_periodic(self, state: dict[str, Any]) -> None:
        path = self.folder / checkpoint_name(self.trainer.iter)
        self._save(state, path)
        self.written = [*(item for item in self.written if item != path), path]

    def after_train(self) -> None:
        """Keep as the final one what a training ends with that was told to stop."""
        if self.trainer.stop_reason and self.trainer.iter < self.trainer.max_iter:
            state = self.get_state()
            if comm.is_main_process():
                self._save(state, self.folder / FINAL)

    def _save(self, state: dict[str, Any], path: Path) -> None:
        save_atomic(state, path)
        set_last_checkpoint(path)
        logger.info("Saved checkpoint to %s", path)

    def _forget(self) -> None:
        if not self.keep:
            return
        for path in self.written[: -self.keep]:
            path.unlink(missing_ok=True)
        self.written = self.written[-self.keep :]


class EvaluationHook(EvalHook):
    """Evaluates every ``period`` iterations and after the last one, without a trace in the training itself.

    Random numbers that the evaluation draws are not missing in the training, so a run that is resumed between a
    checkpoint and the evaluation of the same iteration continues exactly.

    Args:
        period: 0 evaluates only after the last iteration.
        evaluate: returns a nested dict of numbers.
    """

    def __init__(self, *, period: int, evaluate: Callable[[], dict[str, Any]]) -> None:
        def without_trace() -> dict[str, Any]:
            with random_state_kept():
                return evaluate()

        super().__init__(period, without_trace)

    def after_train(self) -> None:
        """Evaluate the finished training; one that failed, in its last iteration too, is not evaluated."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class MetricPrinter(EventWriter):
    """The line of detectron2's log, in its format and under the name of its logger, since tools search for it.

    ``max_mem`` is the peak of CUDA memory where the training runs on CUDA, otherwise that of the process (without the
    workers of the loader).
    """

    def __init__(self, *, max_iter: int, cuda: bool, window: int = 20) -> None:
        self.logger = logging.getLogger("detectron2.utils.events")
        self.max_iter = max_iter
        self.cuda = cuda
        self.window = window

    def write(self) -> None:
        """Log one line; nothing after the last iteration."""
        storage = get_event_storage()
        if storage.iter >= self.max_iter:
            return
        seconds = _history(storage, "time")
        parts = [f"iter: {storage.iter}", *self._losses(storage)]
        if seconds is not None:
            left = seconds.median(1000) * (self.max_iter - storage.iter - 1)
            storage.put_scalar("eta_seconds", left, smoothing_hint=False)
            parts.insert(0, f"eta: {datetime.timedelta(seconds=int(left))}")
            parts += [f"time: {seconds.global_avg():.4f}", f"last_time: {seconds.latest():.4f}"]
        data = _history(storage, "data_time")
        if data is not None:
            parts += [f"data_time: {data.avg(self.window):.4f}", f"last_data_time: {data.latest():.4f}"]
        rate = _history(storage, "lr")
        parts += [
            f"lr: {rate.latest():.5g}" if rate is not None else "lr: N/A",
            f"max_mem: {peak_memory(self.cuda):.0f}M",
        ]
        self.logger.info(" %s", "  ".join(parts))

    def _losses(self, storage: EventStorage) -> list[str]:
        histories = storage.histories().items()
        return [
            f"{name}: {history.median(storage.count_samples(name, self.window)):.4g}"
            for mark in ("loss", "[metric]")
            for name, history in histories
            if mark in name
        ]


def _history(storage: EventStorage, name: str) -> Any:
    return storage.histories().get(name)


def peak_memory(cuda: bool) -> float:
    """Peak memory in MiB: of the CUDA device, else the resident set of this process; nan where the system hides it."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    if importlib.util.find_spec("resource") is None:  # Windows
        return float("nan")
    resource = importlib.import_module("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
