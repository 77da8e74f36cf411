"""The weights of the best evaluation, and the end of a training that gets no better."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from torch import nn

from vis.checkpoint import save_weights, write_text_atomic
from vis.config import CfgNode, closest, declare
from vis.engine.state import random_state_kept

logger = logging.getLogger(__name__)

BEST = "model_best.pth"
HISTORY = "best_checkpoint.json"
MODES = ("max", "min")


@declare
def add_config(cfg: CfgNode) -> None:
    """Keeping the best weights, and stopping early."""
    node = cfg.SOLVER.BEST_CHECKPOINT = CfgNode()
    # model_best.pth: the weights of the best evaluation (of those every TEST.EVAL_PERIOD iterations and the last).
    node.ENABLED = False
    # As in metrics.json; with several data sets in DATASETS.TEST "<data set>/segm/AP".
    node.METRIC = "segm/AP"
    node.MODE = "max"
    # The training ends after so many evaluations without an improvement; 0: it does not.
    node.PATIENCE = 0
    # What counts as an improvement there has to be greater than this.
    node.MIN_DELTA = 0.0


class Progress(NamedTuple):
    """What a history of evaluations comes to."""

    iteration: int
    value: float
    since: int


def progress(history: list[tuple[int, float]], *, mode: str, min_delta: float = 0.0) -> Progress:
    """The best evaluation (the first of equals), and how many came after the last improvement.

    Args:
        history: (iterations done, value); a value that is not a number is never an improvement.
    """
    sign = 1.0 if mode == "max" else -1.0
    best, reference, since = (0, math.nan), math.nan, 0
    for iteration, value in history:
        gain, step = sign * (value - best[1]), sign * (value - reference)
        if gain > 0 or (math.isnan(best[1]) and not math.isnan(value)):
            best = (iteration, value)
        if step > min_delta or (math.isnan(reference) and not math.isnan(value)):
            reference, since = value, 0
        else:
            since += 1
    return Progress(*best, since)


class BestCheckpoint(HookBase):
    """Called after every evaluation, in every process; a hook of the trainer too.

    The values of all evaluations are in ``best_checkpoint.json``, so that a training that is resumed knows of those
    that came after the checkpoint of the same iteration; one that is missing there is made up for.

    Args:
        module: the model, with the weights that were evaluated when this is called.
        folder: OUTPUT_DIR.
        metric, mode, patience, min_delta: ``SOLVER.BEST_CHECKPOINT``.
        period: ``TEST.EVAL_PERIOD``.

    Raises:
        ValueError: a number or name is not usable.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        folder: Path,
        metric: str,
        mode: str = "max",
        patience: int = 0,
        min_delta: float = 0.0,
        period: int = 0,
    ) -> None:
        key = "SOLVER.BEST_CHECKPOINT"
        if mode not in MODES:
            raise ValueError(f"{key}.MODE {mode!r} is not one of {', '.join(MODES)}.{closest(mode, MODES)}")
        if not metric:
            raise ValueError(f'{key}.METRIC is empty: name a metric of the evaluation, like "segm/AP"')
        if patience < 0 or min_delta < 0:
            raise ValueError(f"{key}: PATIENCE {patience} and MIN_DELTA {min_delta} must be 0 or more")
        if patience and period < 1:
            raise ValueError(
                f"{key}.PATIENCE {patience} counts evaluations, and TEST.EVAL_PERIOD is {period}: there is only the "
                "one after the training. Set TEST.EVAL_PERIOD to a number of iterations"
            )
        self.module, self.folder = module, folder
        self.metric, self.mode, self.patience, self.min_delta = metric, mode, patience, min_delta
        self.period = period
        self.history: list[tuple[int, float]] = []  # in the main process

    def before_train(self) -> None:
        """Know what was before; stop at once where the training had stopped, evaluate where that is missing."""
        start, end = self.trainer.start_iter, self.trainer.max_iter
        if comm.is_main_process():
            self.history = self._read(start) if start else self._begin()
        known = [iteration for iteration, _ in self.history]
        missing = bool(0 < start < end and self.period and start % self.period == 0 and start not in known)
        if comm.all_gather(missing)[0]:
            logger.info("the evaluation after %d iterations is missing in %s: it is made now", start, HISTORY)
            with random_state_kept():
                self.trainer.iter = start - 1
                self.trainer.evaluate_now()
        else:
            self._stop_if_due(start)
        if not self.trainer.stop_reason:
            self.trainer.iter = start

    def __call__(self, results: Mapping[str, Any]) -> None:
        """Keep the weights where they are the best so far, stop where there were none for long."""
        done = min(self.trainer.iter + 1, self.trainer.max_iter)
        if comm.is_main_process():
            self._note(done, results)
        self._stop_if_due(done)

    def _note(self, done: int, results: Mapping[str, Any]) -> None:
        value = self._value(results)
        if value is None:
            return
        before = progress(self.history, mode=self.mode)
        self.history = [*(item for item in self.history if item[0] != done), (done, value)]
        now = progress(self.history, mode=self.mode, min_delta=self.min_delta)
        if now.iteration == done:
            was = "" if math.isnan(before.value) else f" (before: {before.value:.5g} at {before.iteration})"
            save_weights(
                self.module.state_dict(), self.folder / BEST, iteration=done, metric=self.metric, value=float(value)
            )
            logger.info("%s %.5g is the best so far%s: saved to %s", self.metric, value, was, self.folder / BEST)
        else:
            logger.info("%s %.5g; the best is %.5g at iteration %d", self.metric, value, now.value, now.iteration)
        self._write()

    def _value(self, results: Mapping[str, Any]) -> float | None:
        found: Any = results
        for part in self.metric.split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, (int, float)):
            if math.isnan(found):
                logger.warning("SOLVER.BEST_CHECKPOINT.METRIC %s is nan: it counts as no improvement", self.metric)
            return float(found)
        names = _names(results)
        there = f"there are {', '.join(names[:12])}.{closest(self.metric, names)}" if names else "there is no metric"
        logger.warning("SOLVER.BEST_CHECKPOINT.METRIC %r is not in the results: %s", self.metric, there)
        return None

    def _stop_if_due(self, done: int) -> None:
        """Every process comes to the same, that of the main process."""
        now = progress(self.history, mode=self.mode, min_delta=self.min_delta)
        due = bool(self.patience and now.since >= self.patience and done < self.trainer.max_iter and done)
        due, now = comm.all_gather((due, now))[0]
        if due:
            self.trainer.iter = done - 1
            self.trainer.stop(
                f"{now.since} evaluations without an improvement of {self.metric} (SOLVER.BEST_CHECKPOINT.PATIENCE "
                f"{self.patience}); the best is {now[1]:.5g} after {now[0]} iterations"
            )

    def _begin(self) -> list[tuple[int, float]]:
        if (self.folder / BEST).is_file():
            logger.warning("%s is of an earlier run: the first evaluation replaces it", self.folder / BEST)
        self.history = []
        self._write()
        return self.history

    def _read(self, start: int) -> list[tuple[int, float]]:
        """Evaluations up to where the training continues; those after it will be made again."""
        path = self.folder / HISTORY
        if not path.is_file():
            logger.warning("%s is not there: what was the best before iteration %d is not known", path, start)
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            history = [(int(iteration), float(value)) for iteration, value in content["history"]]
            metric, mode = content["metric"], content["mode"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete it to begin a new record") from error
        if (metric, mode) != (self.metric, self.mode):
            logger.warning(
                "%s is of %s (%s), now %s (%s) counts: a new record begins", path, metric, mode, self.metric, self.mode
            )
            return []
        return [item for item in history if item[0] <= start]

    def _write(self) -> None:
        best = progress(self.history, mode=self.mode, min_delta=self.min_delta)
        content: dict[str, Any] = {"metric": self.metric, "mode": self.mode, "history": self.history}
        if self.history:
            content["best"] = {"iteration": best.iteration, "value": best.value, "file": BEST}
        write_text_atomic(json.dumps(content, indent=1) + "\n", self.folder / HISTORY)


def _names(results: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in results.items():
        names += _names(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return names


def build_best_checkpoint(cfg: CfgNode, module: nn.Module) -> BestCheckpoint | None:
    """The one that ``SOLVER.BEST_CHECKPOINT`` describes, None where it is switched off.

    Raises:
        ValueError: see :class:`BestCheckpoint`, or there is nothing to evaluate on.
    """
    node = cfg.SOLVER.BEST_CHECKPOINT
    if not node.ENABLED:
        if node.PATIENCE:
            raise ValueError("SOLVER.BEST_CHECKPOINT.PATIENCE is set, and SOLVER.BEST_CHECKPOINT.ENABLED is not")
        return None
    if not cfg.DATASETS.TEST:
        raise ValueError("SOLVER.BEST_CHECKPOINT.ENABLED needs data sets in DATASETS.TEST to evaluate on")
    return BestCheckpoint(
        module,
        folder=Path(cfg.OUTPUT_DIR),
        metric=node.METRIC,
        mode=node.MODE,
        patience=node.PATIENCE,
        min_delta=node.MIN_DELTA,
        period=cfg.TEST.EVAL_PERIOD,
    )
