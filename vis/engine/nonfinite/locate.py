"""Where numbers that are not finite first appear: a step is run again with an eye on every module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vis.engine.nonfinite.samples import describe, has_nonfinite, tensors_in
from vis.modeling.matchers.finite import CostProblem, problems_wait

# The order is that of the flow of a step; the first finding is the one to look at.
KINDS = ("data", "weights", "module", "matching", "loss", "gradient", "error")


@dataclass
class Finding:
    """One place with numbers that are not finite.

    Attributes:
        kind: one of ``KINDS``.
        name: of the tensor in the batch, of the parameter, module or loss.
        text: what was found there.
    """

    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.text}"


@dataclass
class Trace:
    """What running a step again showed.

    Attributes:
        findings: in the order in which they came about.
        losses: name -> number, of the last of several batches.
        worst: the first tensor that is not finite, on the CPU; None where there is none.
    """

    findings: list[Finding] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    worst: Tensor | None = None

    @property
    def first(self) -> Finding | None:
        """The earliest place."""
        return self.findings[0] if self.findings else None

    def add(self, kind: str, name: str, values: Tensor, more: str = "") -> None:
        """Note a tensor."""
        if self.worst is None:
            self.worst = values.detach().cpu().clone()
        self.findings.append(Finding(kind, name, describe(values) + more))

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Note those that are not finite."""
        self.losses = {name: float(loss.detach()) for name, loss in losses.items()}
        for name, loss in losses.items():
            if has_nonfinite(loss):
                self.add("loss", name, loss)


class _Watch:
    """Hooks that note the first module whose output, and the first tensor whose gradient is not finite."""

    def __init__(self, module: nn.Module, trace: Trace, problems: list[CostProblem]) -> None:
        self.trace = trace
        self.problems = problems
        self.forward_found = self.backward_found = False
        self._handles: list[RemovableHandle] = []
        for name, part in module.named_modules():
            self._handles.append(part.register_forward_hook(self._after(name or "the model"), with_kwargs=True))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient(name, "of the parameter")))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def note_matching(self) -> None:
        """What matchers found since the last call."""
        for problem in self.problems:
            self.trace.add("matching", "costs", problem.values, f" ({problem.message.split(',')[0]})")
        self.problems.clear()

    def _after(self, name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.note_matching()
            for place, tensor in tensors_in(output):
                if not self.forward_found and has_nonfinite(tensor):
                    self.forward_found = True
                    broken = [where for where, value in tensors_in([args, kwargs]) if has_nonfinite(value)]
                    origin = "; its input is not finite already" if broken else "; its input is finite"
                    kind = type(part).__name__
                    self.trace.add("module", f"{name} ({kind}){' output ' + place if place else ''}", tensor, origin)
                if tensor.requires_grad and not tensor.is_leaf:
                    # a tensor's own hook: module hooks for gradients do not bear operations in place
                    self._handles.append(tensor.register_hook(self._gradient(name, "of the output")))

        return hook

    def _gradient(self, name: str, what: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not self.backward_found and has_nonfinite(gradient):
                self.backward_found = True
                self.trace.add("gradient", name, gradient, f" ({what}; the first one on the way back)")

        return hook


def trace_step(
    module: nn.Module,
    batches: Sequence[Any],
    *,
    context: Callable[[], AbstractContextManager[Any]],
    scale: float = 1.0,
) -> Trace:
    """Run forward and backward of a step on the bare model, and note where numbers first are not finite.

    The random state and the buffers are to be those from before the step; parameters and ``grad`` are not changed,
    buffers (running statistics) are. In a job of several processes all have to call it, since losses are normalised
    over all of them.

    Args:
        batches: those of the step, one after the other.
        context: what a forward pass runs in (autocast).
        scale: of the loss.
    """
    trace = Trace()
    for place, tensor in tensors_in(list(batches) if len(batches) > 1 else batches[0], "batch"):
        if has_nonfinite(tensor):
            trace.add("data", place, tensor)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if has_nonfinite(tensor):
            trace.add("weights", name, tensor)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        with problems_wait() as problems, _Watch(module, trace, problems) as watch:
            for batch in batches:
                with context():
                    losses = module(batch)
                    total = torch.stack([loss.float() for loss in losses.values()]).sum()
                watch.note_matching()
                trace.add_losses(losses)
                # Not backward(): that would add to the gradients, and start the exchange between processes.
                torch.autograd.grad(total * scale, parameters, allow_unused=True)
    except (FloatingPointError, RuntimeError, ValueError, IndexError) as error:  # of the model, on broken numbers
        trace.findings.append(Finding("error", type(error).__name__, str(error).split("\n")[0][:500]))
    return trace
