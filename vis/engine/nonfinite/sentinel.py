"""Watches a training for numbers that are not finite: keeps what is needed to see them again, and skips or stops."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from vis.config import CfgNode, declare
from vis.engine.nonfinite.dump import StepRecord, folder_of, report_text, summary, write_record, write_shared
from vis.engine.nonfinite.locate import Trace, trace_step
from vis.engine.state import plain_config, random_state, set_random_state
from vis.engine.step import StepNumbers, StopAtNonFinite, TrainingStep
from vis.modeling.matchers.finite import CostProblem, problems_wait

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    """What a training does about numbers that are not finite."""
    node = cfg.SOLVER.NONFINITE = CfgNode()
    # So many steps in a row may be left out (no update of the weights, the schedule goes on); 0 stops at the first.
    node.SKIP = 0
    # And so many altogether.
    node.SKIP_TOTAL = 100
    # So many of them are kept in OUTPUT_DIR/nonfinite, each with the weights; 0 keeps none and looks for no cause.
    node.DUMPS = 3


class BufferKeeper:
    """The buffers of a module as they were: running statistics take in what a forward pass sees.

    Copies only those that changed since the last time. torch counts changes, but not those that batch normalisation
    makes, whose statistics are copied always.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._statistics = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, part in module.named_modules()
            if isinstance(part, _NormBase)
            for name, _ in part.named_buffers(recurse=False)
        }
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}

    def _changed(self, name: str, buffer: Tensor) -> bool:
        own, version, _ = self._kept.get(name, (None, 0, None))
        return name in self._statistics or own is not buffer or version != buffer._version

    def keep(self) -> None:
        """Remember the buffers as they are now."""
        for name, buffer in self.module.named_buffers():
            if self._changed(name, buffer):
                self._kept[name] = (buffer, buffer._version, buffer.detach().clone())

    def kept(self) -> dict[str, Tensor]:
        """Name -> buffer as it was."""
        return {name: copy for name, (_, _, copy) in self._kept.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what changed since."""
        for name, buffer in self.module.named_buffers():
            if self._changed(name, buffer):
                buffer.copy_(self._kept[name][2])


class NonFiniteSentinel(HookBase):
    """Decides on every step whether it can be used, in all processes alike; a hook of the trainer too.

    A step cannot be used where a loss, a matching cost or, without a loss scaler, a gradient of any process is not
    finite. An overflow of gradients is what a scaler is there for; only where it has gone below a scale of 1 can it not
    help any more. Such a step is run again under observation, and written to ``OUTPUT_DIR/nonfinite/iter_<iteration>``
    (:mod:`vis.engine.nonfinite.dump`). Then it is left out, with the buffers as they were, or the training ends.

    Args:
        step: what is watched.
        folder: OUTPUT_DIR.
        config: yaml text of the configuration.
        skip, skip_total, dumps: ``SOLVER.NONFINITE``.
    """

    def __init__(
        self, *, step: TrainingStep, folder: Path, config: str, skip: int = 0, skip_total: int = 100, dumps: int = 3
    ) -> None:
        if min(skip, skip_total, dumps) < 0:
            raise ValueError(
                f"SOLVER.NONFINITE: SKIP {skip}, SKIP_TOTAL {skip_total} and DUMPS {dumps} must be 0 or more"
            )
        self.step, self.folder, self.config = step, folder, config
        self.skip, self.skip_total, self.dumps = skip, skip_total, dumps
        self.in_a_row = self.total = self.dumped = 0
        self._stop = StopAtNonFinite(folder)
        self._buffers = BufferKeeper(step.module)
        self._random: dict[str, Any] = {}
        self._problems: list[CostProblem] = []
        self._waiting = ExitStack()

    # As a hook: between these two calls matchers note their problems instead of raising them.

    def before_step(self) -> None:
        """Keep what running the step again needs."""
        self._waiting.close()
        self._random = random_state()
        self._buffers.keep()
        self._problems = self._waiting.enter_context(problems_wait())

    def after_train(self) -> None:
        """Problems are errors again, however the training ended."""
        self._waiting.close()

    def state_dict(self) -> dict[str, int]:
        """What was left out so far."""
        return {"in_a_row": self.in_a_row, "total": self.total, "dumped": self.dumped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue to count."""
        self.in_a_row, self.total, self.dumped = (state[name] for name in ("in_a_row", "total", "dumped"))

    def examine(self, numbers: StepNumbers) -> bool:
        """Whether the step can be used.

        Raises:
            FloatingPointError: it cannot, and no more steps may be left out.
        """
        self._waiting.close()
        left = numbers.error is not None
        reason = self._reason(numbers)
        if left and comm.get_world_size() > 1:
            # Not a matcher's: this process left the forward pass, and the others wait for it there.
            raise FloatingPointError(f"process {comm.get_rank()}: {reason}") from numbers.error
        if not _anywhere(bool(reason), self.step.device):
            self.in_a_row = 0
            return True
        records = self._keep(numbers, reason)
        self._buffers.restore()
        self.in_a_row += 1
        self.total += 1
        text = _message(records)
        text += self._where(numbers.iteration)
        if self.in_a_row > self.skip or self.total > self.skip_total:
            raise FloatingPointError(text + self._limit()) from numbers.error
        logger.warning(
            "%s Step %d is left out: no update (%d in a row of SOLVER.NONFINITE.SKIP %d, %d of SKIP_TOTAL %d)",
            *(text, numbers.iteration, self.in_a_row, self.skip, self.total, self.skip_total),
        )
        return False

    def _reason(self, numbers: StepNumbers) -> str:
        """What is wrong with the step in this process, "" if nothing is."""
        if self._problems and numbers.error is None:
            numbers.error = FloatingPointError(self._problems[0].message)
        if not numbers.finite():
            try:
                self._stop.examine(numbers)
            except FloatingPointError as error:
                return str(error)
        scaler = self.step.scaler
        if scaler is not None and not _finite(numbers.grad_norm) and scaler.get_scale() < 1:
            return (
                f"gradients are not finite at iteration {numbers.iteration} although the loss scaler has gone down to "
                f"{scaler.get_scale():g}: no scale helps; videos of the batch: {numbers.videos()}. SOLVER.AMP.DTYPE "
                "bfloat16 has the range that float16 lacks"
            )
        return ""

    def _keep(self, numbers: StepNumbers, reason: str) -> list[dict[str, Any]]:
        """Run the step again and write it down; gives a summary of every process to all of them."""
        scaler = self.step.scaler
        record = StepRecord(
            iteration=numbers.iteration,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            batches=list(numbers.batches),
            random=self._random,
            streams=[
                self.step.streams(numbers.iteration, index, len(batch)) for index, batch in enumerate(numbers.batches)
            ],
            buffers=self._buffers.kept(),
            losses=numbers.losses,
            grad_norm=numbers.grad_norm,
            scale=1.0 if scaler is None else scaler.get_scale(),
            dtype="" if self.step.dtype is None else str(self.step.dtype).removeprefix("torch."),
            device=str(self.step.device),
            reason=reason,
        )
        wanted = self.dumped < self.dumps
        if wanted:
            record.trace = self._again(record)
        records = comm.all_gather(summary(record))
        if wanted:
            self.dumped += 1
            self._write(record, records)
        return records

    def _again(self, record: StepRecord) -> Trace:
        after = random_state()
        self.step.optimizer.zero_grad(set_to_none=True)  # makes room
        self._buffers.restore()
        set_random_state(self._random)
        parts = enumerate(record.batches)

        def context() -> AbstractContextManager[None]:
            index, batch = next(parts)
            return self.step.part(record.iteration, index, len(batch))

        try:
            return trace_step(self.step.module, record.batches, context=context, scale=record.scale)
        finally:
            set_random_state(after)

    def _write(self, record: StepRecord, records: list[dict[str, Any]]) -> None:
        """A dump that cannot be written is said, and hides nothing."""
        folder = folder_of(self.folder, record.iteration)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if comm.is_main_process():
                parameters = {name: value.detach().cpu() for name, value in self.step.module.named_parameters()}
                report = report_text(_message(records), records, folder)
                write_shared(folder, config=self.config, parameters=parameters, report=report)
            write_record(record, folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of a file or a tensor
            logger.error("the step of iteration %d could not be kept in %s: %s", record.iteration, folder, error)

    def _where(self, iteration: int) -> str:
        folder = folder_of(self.folder, iteration)
        if folder.is_dir() and any(folder.glob("rank_*.pth")):
            return f" What was found is in {folder} (python tools/replay_nonfinite.py shows it again)."
        return f" Nothing was kept of it: SOLVER.NONFINITE.DUMPS is {self.dumps}." if self.dumped >= self.dumps else ""

    def _limit(self) -> str:
        if not self.skip:
            return " SOLVER.NONFINITE.SKIP N leaves out up to N such steps in a row."
        return (
            f" {self.in_a_row} steps in a row and {self.total} altogether were not finite; SOLVER.NONFINITE.SKIP "
            f"{self.skip} and SKIP_TOTAL {self.skip_total} are the limits."
        )


def _finite(number: float) -> bool:
    return abs(number) < float("inf")


def _anywhere(here: bool, device: torch.device) -> bool:
    """Whether it holds in any process: one small exchange per step, none in a job of one process."""
    if comm.get_world_size() == 1:
        return here
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _message(records: list[dict[str, Any]]) -> str:
    """The error of each process that has one, and the first place where numbers were not finite."""
    several = len(records) > 1
    parts = []
    for record in records:
        if not record["reason"]:
            continue
        first = f" First of all: {record['findings'][0]}." if record["findings"] else ""
        parts.append((f"process {record['rank']}: " if several else "") + record["reason"] + first)
    return " ".join(parts)


def build_sentinel(cfg: CfgNode, step: TrainingStep) -> NonFiniteSentinel:
    """The one that ``SOLVER.NONFINITE`` describes."""
    node = cfg.SOLVER.NONFINITE
    return NonFiniteSentinel(
        step=step,
        folder=Path(cfg.OUTPUT_DIR),
        config=plain_config(cfg),
        skip=node.SKIP,
        skip_total=node.SKIP_TOTAL,
        dumps=node.DUMPS,
    )
