"""One step of the optimisation: losses, gradients, clipping, update, and what the log is told of it.

A step is one iteration: an update from the parts of a batch that this process computes one after the other, and those
of the other processes (:class:`~vis.data.layout.BatchLayout`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vis.config import CfgNode, declare
from vis.data.layout import BatchLayout
from vis.engine.data_parallel import check_gradients, statistics_kept
from vis.engine.precision import autocast
from vis.engine.state import last_checkpoint
from vis.layers.effective_batch import NORMALIZERS, EffectiveBatch
from vis.layers.item_streams import part_streams
from vis.solver import GradientClipper
from vis.solver.clipping import gradient_norm
from vis.structures import ClipSample

__all__ = ["Sentinel", "StepNumbers", "StopAtNonFinite", "TrainingStep"]

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    # "released": what a method's authors divide by counts of one process is divided by those of one part of a batch.
    # "effective_batch": by means over the whole batch, so that the size of the parts does not matter.
    cfg.SOLVER.NORMALIZER = "released"


def normalizer_is_exact(cfg: CfgNode) -> bool:
    """Whether ``SOLVER.NORMALIZER`` is "effective_batch".

    Raises:
        ValueError: it is not one of the two.
    """
    name = cfg.SOLVER.NORMALIZER
    if name not in NORMALIZERS:
        raise ValueError(f"SOLVER.NORMALIZER is {name!r}, expected one of {', '.join(NORMALIZERS)}")
    return name == "effective_batch"


@dataclass
class StepNumbers:
    """What a step came to in this process, before its update.

    Args:
        losses: the numbers of the losses by name, means over the parts of this process; empty where ``error`` ended the
            forward pass.
        grad_norm: norm of all gradients before clipping; equal in all processes, since gradients are.
        batches: the clips of this process, part after part.
        scaled: a loss scaler watches the gradients: an overflow of theirs is its business.
        error: what a matcher found not to be finite.
    """

    iteration: int
    losses: dict[str, float]
    grad_norm: float
    batches: Sequence[list[ClipSample]]
    scaled: bool
    error: FloatingPointError | None = None

    @property
    def batch(self) -> list[ClipSample]:
        """The clips of all parts."""
        return [sample for batch in self.batches for sample in batch]

    def finite(self) -> bool:
        """Whether an update can be made of it, as far as this process knows."""
        if self.error is not None or not all(map(math.isfinite, self.losses.values())):
            return False
        return self.scaled or math.isfinite(self.grad_norm)

    def videos(self) -> str:
        """The clips of the batch, for messages."""
        return ", ".join(f"{sample.get('video_id')} (frames {sample.get('frame_ids')})" for sample in self.batch)


class Sentinel(Protocol):
    """Asked in every step of every process whether its numbers can be used."""

    def examine(self, numbers: StepNumbers) -> bool:
        """False leaves the update out (every process must answer alike); an exception ends the training.

        Called once per step: after backward, or after the forward pass where that ended with ``numbers.error``, in
        which case this process has no gradients and False leaves the rest of the step out.
        """
        ...


class StopAtNonFinite:
    """Ends the training where a number is not finite.

    Args:
        folder: of the training, for the name of the last checkpoint in the message.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def examine(self, numbers: StepNumbers) -> bool:
        """True, or FloatingPointError."""
        if numbers.error is not None:
            raise FloatingPointError(
                f"at iteration {numbers.iteration}, videos of the batch {numbers.videos()}: {numbers.error}"
            ) from numbers.error
        if numbers.finite():
            return True
        last = last_checkpoint(self.folder)
        what = "a gradient" if all(map(math.isfinite, numbers.losses.values())) else "the loss"
        raise FloatingPointError(
            f"{what} is not finite at iteration {numbers.iteration}: "
            + ", ".join(f"{name} {value:.6g}" for name, value in numbers.losses.items())
            + f", gradient norm {numbers.grad_norm:.6g}; videos of the batch: {numbers.videos()}. "
            + (f"The last checkpoint before is {last}. " if last is not None else "No checkpoint was written before. ")
            + "A lower SOLVER.BASE_LR, SOLVER.CLIP_GRADIENTS, or SOLVER.AMP.DTYPE bfloat16 may help."
        )


class TrainingStep:
    """Turns the parts of a batch into an update of the weights.

    Args:
        module: the model; ``model``: what is called, the model itself or its data-parallel wrapper.
        dtype: of autocast, None for none.
        scaler: of the loss, where ``dtype`` needs one.
        layout: how batches are spread; seed: of the random numbers that are drawn in a step.
        exact: ``SOLVER.NORMALIZER`` is "effective_batch".
        all_used: every parameter is expected to get a gradient (no ``SOLVER.DDP.FIND_UNUSED_PARAMETERS``).
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        model: nn.Module,
        optimizer: Optimizer,
        clipper: GradientClipper | None,
        dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        sentinel: Sentinel,
        layout: BatchLayout,
        seed: int = 0,
        exact: bool = False,
        all_used: bool = True,
    ) -> None:
        self.module = module
        self.model = model
        self.optimizer = optimizer
        self.clipper = clipper
        self.dtype = dtype
        self.scaler = scaler
        self.sentinel = sentinel
        self.layout = layout
        self.seed, self.exact, self.all_used = seed, exact, all_used
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = self.parameters[0].device
        self.updated = False  # whether the last step changed the weights, as far as the sentinel decides it
        self._effective = EffectiveBatch()
        self._told = False
        self._counts = True  # until a count of every part shows that the losses of this model ask for none

    def __call__(self, iteration: int, batches: Sequence[list[ClipSample]]) -> None:
        """One iteration; ``batches`` are the ``layout.steps`` parts of this process."""
        self.updated = False
        tell = getattr(self.module, "set_iteration", None)
        if tell is not None:  # a method whose losses change in the course of a training, which may be a resumed one
            tell(iteration)
        self.optimizer.zero_grad(set_to_none=True)
        self._effective = self._count(iteration, batches)
        sums: dict[str, Tensor] = {}
        for index in range(len(batches)):
            with self._synchronized(last=index + 1 == len(batches)):
                losses = self._losses(iteration, index, batches)
                if losses is None:
                    self.optimizer.zero_grad(set_to_none=True)
                    return
                shares = {name: loss.float() / len(batches) for name, loss in losses.items()}
                total = torch.stack(list(shares.values())).sum()
                (total if self.scaler is None else self.scaler.scale(total)).backward()
            sums = {name: share.detach() + sums.get(name, 0.0) for name, share in shares.items()}
        if self.all_used:
            check_gradients(self.module)
        self._update(iteration, sums, batches)

    def _update(self, iteration: int, losses: dict[str, Tensor], batches: Sequence[list[ClipSample]]) -> None:
        scaler = self.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters) if self.clipper is None else self.clipper(self.parameters)
        self.updated = self._record(iteration, losses, norm, batches)
        if not self.updated:
            self.optimizer.zero_grad(set_to_none=True)
            if scaler is not None:
                scaler.update()  # or it would refuse the next step: this one's gradients were unscaled
        elif scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    @contextmanager
    def part(self, iteration: int, index: int, clips: int) -> Iterator[None]:
        """What a forward pass of one part runs in: number format, random numbers, counts.

        Args:
            index: of the part among those of this process; clips: in it.
        """
        with (
            self._effective.active(),
            part_streams(**self.streams(iteration, index, clips)),
            autocast(self.dtype, self.device),
        ):
            yield

    def streams(self, iteration: int, index: int, clips: int) -> dict[str, int]:
        """What :func:`~vis.layers.item_streams.part_streams` takes for this part."""
        first = self.layout.first_position(comm.get_rank(), index)
        return {"seed": self.seed, "iteration": iteration, "first": first, "clips": clips}

    def _synchronized(self, last: bool) -> Any:
        """Gradients are exchanged once per step; after every part where torch cannot do without (a static graph).

        What is exchanged is the sum of the parts so far, so that both come to the same.
        """
        if last or not isinstance(self.model, DistributedDataParallel) or self.model.static_graph:
            return nullcontext()
        return self.model.no_sync()

    @torch.no_grad()
    def _count(self, iteration: int, batches: Sequence[list[ClipSample]]) -> EffectiveBatch:
        """The counts that losses of several parts are divided by, before the first of them is computed.

        They follow from the targets alone where the model says so (``target_counts``); else every part is run forward
        once more.
        """
        effective = EffectiveBatch(steps=len(batches), exact=self.exact)
        if len(batches) == 1 or not self._counts:
            return effective
        self._effective = effective
        of_targets = None if self.exact else getattr(self.module, "target_counts", None)
        for index, batch in enumerate(batches):
            counts = None if of_targets is None else of_targets(batch)
            if counts is not None:
                effective.announce(counts)
                continue
            with statistics_kept(self.module), self.part(iteration, index, len(batch)), effective.counting() as found:
                self.module(batch)
            if not found:
                self._counts = False  # the same in every process
                return effective
            if not self._told:
                self._told = True
                logger.info(
                    "Losses are divided by counts of predictions over the whole batch (%s): every part of a batch is "
                    "run forward once more to count",
                    ", ".join(found),
                )
        effective.agree(self.device)
        return effective

    def _losses(self, iteration: int, index: int, batches: Sequence[list[ClipSample]]) -> dict[str, Tensor] | None:
        """None where a matcher failed and the sentinel goes on."""
        try:
            with self.part(iteration, index, len(batches[index])):
                return self.model(batches[index])
        except FloatingPointError as error:  # of a matcher, which does not know where the training is
            numbers = StepNumbers(iteration, {}, math.nan, batches, self.scaler is not None, error)
            if self.sentinel.examine(numbers):
                raise
            return None

    def _record(
        self, iteration: int, losses: dict[str, Tensor], norm: Tensor, batches: Sequence[list[ClipSample]]
    ) -> bool:
        """Check the numbers of this step before the update, in one transfer from the device, and store them."""
        names = list(losses)
        numbers = torch.stack([*losses.values(), norm.detach().float().to(self.device)])
        values = dict(zip([*names, "grad_norm"], numbers.tolist(), strict=True))
        gradient = values.pop("grad_norm")
        if not self.sentinel.examine(StepNumbers(iteration, values, gradient, batches, self.scaler is not None)):
            return False
        if comm.get_world_size() > 1:
            reduced = comm.reduce_dict({name: numbers[i] for i, name in enumerate(names)})
            values = {name: float(value) for name, value in reduced.items()}
        storage = get_event_storage()
        storage.put_scalar("total_loss", sum(values.values()))
        storage.put_scalars(**values)
        storage.put_scalar("grad_norm", gradient)
        if self.scaler is not None:
            storage.put_scalar("[metric]grad_scaler", self.scaler.get_scale(), smoothing_hint=False)
        return True
