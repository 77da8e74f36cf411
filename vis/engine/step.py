"""One step of the optimisation: losses, gradients, clipping, update, and what the log is told of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.optim import Optimizer

from vis.engine.precision import autocast
from vis.engine.state import last_checkpoint
from vis.solver import GradientClipper
from vis.solver.clipping import gradient_norm
from vis.structures import ClipSample

__all__ = ["Sentinel", "StepNumbers", "StopAtNonFinite", "TrainingStep"]


@dataclass
class StepNumbers:
    """What a step came to in this process, before its update.

    Args:
        losses: the numbers of the losses by name; empty where ``error`` ended the forward pass.
        grad_norm: norm of all gradients before clipping; equal in all processes, since gradients are.
        batch: the clips of this process.
        scaled: a loss scaler watches the gradients: an overflow of theirs is its business.
        error: what a matcher found not to be finite.
    """

    iteration: int
    losses: dict[str, float]
    grad_norm: float
    batch: list[ClipSample]
    scaled: bool
    error: FloatingPointError | None = None

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
    """Turns a batch into an update of the weights.

    Args:
        module: the model; ``model``: what is called, the model itself or its data-parallel wrapper.
        dtype: of autocast, None for none.
        scaler: of the loss, where ``dtype`` needs one.
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
    ) -> None:
        self.module = module
        self.model = model
        self.optimizer = optimizer
        self.clipper = clipper
        self.dtype = dtype
        self.scaler = scaler
        self.sentinel = sentinel
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = self.parameters[0].device
        self.updated = False  # whether the last step changed the weights, as far as the sentinel decides it

    def __call__(self, iteration: int, batch: list[ClipSample]) -> None:
        """One iteration."""
        self.updated = False
        tell = getattr(self.module, "set_iteration", None)
        if tell is not None:  # a method whose losses change in the course of a training, which may be a resumed one
            tell(iteration)
        losses = self._losses(iteration, batch)
        if losses is None:
            return
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        scaler = self.scaler
        (total if scaler is None else scaler.scale(total)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters) if self.clipper is None else self.clipper(self.parameters)
        self.updated = self._record(iteration, losses, norm, batch)
        if not self.updated:
            self.optimizer.zero_grad(set_to_none=True)
            if scaler is not None:
                scaler.update()  # or it would refuse the next step: this one's gradients were unscaled
        elif scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    def _losses(self, iteration: int, batch: list[ClipSample]) -> dict[str, Tensor] | None:
        """None where a matcher failed and the sentinel goes on."""
        try:
            with autocast(self.dtype, self.device):
                return self.model(batch)
        except FloatingPointError as error:  # of a matcher, which does not know where the training is
            numbers = StepNumbers(iteration, {}, math.nan, batch, self.scaler is not None, error)
            if self.sentinel.examine(numbers):
                raise
            return None

    def _record(self, iteration: int, losses: dict[str, Tensor], norm: Tensor, batch: list[ClipSample]) -> bool:
        """Check the numbers of this step before the update, in one transfer from the device, and store them."""
        names = list(losses)
        numbers = torch.stack(
            [*(loss.detach().float() for loss in losses.values()), norm.detach().float().to(self.device)]
        )
        values = dict(zip([*names, "grad_norm"], numbers.tolist(), strict=True))
        gradient = values.pop("grad_norm")
        if not self.sentinel.examine(StepNumbers(iteration, values, gradient, batch, self.scaler is not None)):
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
