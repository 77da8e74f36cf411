"""What sums over a batch are divided by, where a batch is spread over processes and over steps of one process.

Gradients are averaged over the parts of a batch (processes x steps), so a loss that is a sum over instances is the
same however the batch is spread if every part divides its sum by the mean of the parts' counts. Between processes the
mean is taken when it is asked for; the steps of one process have to know it before the first of them has computed
anything, so the trainer counts first (:meth:`EffectiveBatch.counting`).

Losses that their authors divide by the count of one process alone ask with ``of_part=True``. They stay what they are
under ``SOLVER.NORMALIZER "released"``, where a part counts as a process; under ``"effective_batch"`` they too are
divided by means over the whole batch, which makes them the same for parts of any size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from detectron2.utils import comm
from torch import Tensor

logger = logging.getLogger(__name__)

NORMALIZERS = ("released", "effective_batch")

Counts = Mapping[str, "float | Sequence[float] | Tensor"]


class EffectiveBatch:
    """The counts of one iteration.

    Args:
        steps: parts of this process.
        exact: of :data:`NORMALIZERS` the second.
    """

    def __init__(self, *, steps: int = 1, exact: bool = False) -> None:
        self.steps, self.exact = steps, exact
        self.parts = steps * comm.get_world_size()
        self._recorded: list[dict[str, Tensor]] = []
        self._totals: dict[str, Tensor] = {}
        self._recording = False

    @contextmanager
    def active(self) -> Iterator[EffectiveBatch]:
        """Inside, :func:`effective_mean` asks this batch."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)

    @contextmanager
    def counting(self) -> Iterator[dict[str, Tensor]]:
        """Inside, a part of this process is run to be counted; gives the counts that were asked for."""
        counts: dict[str, Tensor] = {}
        self._recorded.append(counts)
        self._recording = True
        try:
            with self.active():
                yield counts
        finally:
            self._recording = False

    def announce(self, counts: Counts) -> None:
        """Counts of a part of this process that follow from its targets."""
        self._recorded.append({name: torch.as_tensor(count).double() for name, count in counts.items()})

    def agree(self, device: torch.device) -> None:
        """Add up what all parts counted; every process calls it after its last part.

        Raises:
            RuntimeError: parts counted different things.
        """
        names = sorted(self._recorded[0])
        if any(sorted(counts) != names for counts in self._recorded):
            raise RuntimeError(
                f"the parts of a batch asked for different counts: {[sorted(c) for c in self._recorded]}"
            )
        if not names:
            return
        shapes = [self._recorded[0][name].shape for name in names]
        sums = torch.cat(
            [torch.stack([counts[name].double() for counts in self._recorded]).sum(0).flatten() for name in names]
        ).to(device)
        _add_up(sums)
        parts = sums.split([shape.numel() for shape in shapes])
        self._totals = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def mean(self, name: str, counts: Tensor, *, of_part: bool, minimum: float) -> Tensor:
        """See :func:`effective_mean`."""
        if of_part and not self.exact:
            return counts.clamp(min=minimum)
        if self._recording:
            recorded = self._recorded[-1]
            if name in recorded:
                raise RuntimeError(f"the count {name!r} was asked for twice in one forward pass")
            recorded[name] = counts.detach().clone()
            return counts.clamp(min=minimum)
        total = self._total(name, counts)
        if self.exact:
            return total.clamp(min=minimum) / self.parts
        return (total / self.parts).clamp(min=minimum)

    def _total(self, name: str, counts: Tensor) -> Tensor:
        if self.steps == 1:
            return _add_up(counts.detach().clone())
        if name not in self._totals:
            raise RuntimeError(
                f"the count {name!r} was not announced: known are {sorted(self._totals)}. target_counts of the model "
                "must give every count that its losses ask for, or return None"
            )
        total = self._totals[name].to(counts)
        assert total.shape == counts.shape, f"{name}: {tuple(total.shape)} announced, {tuple(counts.shape)} asked for"
        return total


def _add_up(values: Tensor) -> Tensor:
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


_current: ContextVar[EffectiveBatch | None] = ContextVar("effective_batch", default=None)


def effective_mean(
    name: str,
    counts: float | Sequence[float] | Tensor,
    device: torch.device | None = None,
    *,
    of_part: bool = False,
    minimum: float = 1.0,
) -> Tensor:
    """Counts of this part on average over all parts of the batch, float32 in the shape of ``counts``.

    Args:
        name: unique among the counts of a forward pass; asked for in every one, with and without instances.
        of_part: the method's authors divide by the count of a process.
        minimum: of what is divided by; under "effective_batch" the least sum over all parts.
    """
    values = torch.as_tensor(counts, device=device).detach()
    values = values if values.dtype == torch.float64 else values.float()
    batch = _current.get() or EffectiveBatch()
    return batch.mean(name, values, of_part=of_part, minimum=minimum)


def effective_mean_of_items(
    name: str, counts: Sequence[float], device: torch.device, *, minimum: float = 1.0
) -> Tensor:
    """For each of the B items of this part, (B,), what its sum is divided by before the mean over the items is taken.

    The mean over the parts of the count of the b-th item; under "effective_batch" that over all items of all parts.
    """
    batch = _current.get() or EffectiveBatch()
    if not batch.exact:
        return effective_mean(name, counts, device, minimum=minimum)
    mean = effective_mean(name, [float(sum(counts))], device, minimum=minimum)
    return (mean / len(counts)).expand(len(counts))
