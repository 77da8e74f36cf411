"""Matching costs that are not finite: an error at once, or, in a training that watches for them, one that waits.

One process of several that leaves its forward pass by an exception leaves the others waiting in it for ever. A
training therefore lets the pass go on with finite numbers in place of the others, looks at what was found when all
processes have come to the end of their step, and does not use the step (``vis.engine.nonfinite``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# In place of a cost that is not finite: such a pair is the last to be chosen. Sums of many stay finite in float32.
_DEAR = 1e30


@dataclass
class CostProblem:
    """Numbers that were found not to be finite.

    Attributes:
        message: what a user is told.
        values: the tensor with them, on its device.
    """

    message: str
    values: Tensor


_found: list[CostProblem] | None = None  # None: a problem is an error at once


def finite_or_error(values: Tensor, message: str, *, instead: float = _DEAR) -> Tensor:
    """``values``, if all of them are finite.

    Inside :func:`problems_wait` the problem is noted, and the numbers that are not finite are replaced.

    Raises:
        FloatingPointError: with ``message``, of which "{bad}" and "{all}" become the counts.
    """
    finite = torch.isfinite(values)
    if finite.all():
        return values
    text = message.format(bad=int((~finite).sum()), all=values.numel())
    if _found is None:
        raise FloatingPointError(text)
    _found.append(CostProblem(text, values.detach()))
    return torch.nan_to_num(values, nan=instead, posinf=instead, neginf=instead)


@contextmanager
def problems_wait() -> Iterator[list[CostProblem]]:
    """Inside, problems are appended to the list that this gives instead of being raised."""
    global _found
    before = _found
    found: list[CostProblem] = []
    _found = found
    try:
        yield found
    finally:
        _found = before
