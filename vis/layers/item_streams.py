"""Random numbers of a training step that belong to a place in the batch, not to the process that computes it.

The trainer gives every part of a batch streams of its own (:func:`part_streams`): one that the global generators are
set to, which dropout draws from, and one for each clip or frame, which the code around an item switches to
(:func:`of_item`). So what is drawn is a function of (seed, iteration, position in the effective batch), whatever the
number of processes. Outside of a training nothing is switched: the global generators go on as they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["item_seed", "of_item", "part_streams"]

# Apart from the streams of the sampler of batches.
_PART_STREAM, _ITEM_STREAM = 11, 12

State = tuple[Tensor, Tensor | None]


@dataclass
class _Part:
    """Where a part is, and the states of the streams of its items: (items per clip, number in the batch) -> state."""

    seed: int
    iteration: int
    first: int
    clips: int
    states: dict[tuple[int, int], State] = field(default_factory=dict)
    inside: bool = False


_current: ContextVar[_Part | None] = ContextVar("item_streams", default=None)


@contextmanager
def part_streams(*, seed: int, iteration: int, first: int, clips: int) -> Iterator[None]:
    """Inside, random numbers are those of the clips ``first`` ... ``first + clips - 1`` of this iteration's batch.

    The global generators (Python, NumPy, torch, CUDA) are seeded and stay so afterwards.
    """
    number = _number(seed, _PART_STREAM, iteration, first)
    random.seed(number)
    np.random.seed(number % 2**32)
    _seed_torch(number)
    token = _current.set(_Part(seed, iteration, first, clips))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def of_item(item: int, items: int) -> Iterator[None]:
    """Inside, torch's generators are at the stream of one of this part's items; it goes on where it was left.

    An item of an item (a frame of a clip that was switched to) draws from the stream of the outer one.

    Args:
        item: which; ``items``: how many the part has, the same number for every clip (1, or the frames of a clip).
    """
    part = _current.get()
    if part is None or part.inside:
        yield
        return
    each = max(items // part.clips, 1)
    key = (each, part.first * each + item)
    outside = _state()
    if key in part.states:
        _set_state(part.states[key])
    else:
        _seed_torch(_number(part.seed, _ITEM_STREAM, part.iteration, *key))
    part.inside = True
    try:
        yield
    finally:
        part.inside = False
        part.states[key] = _state()
        _set_state(outside)


def item_seed(item: int, items: int) -> int | None:
    """A seed from the stream of an item, for a generator of its own; None outside of a training."""
    if _current.get() is None:
        return None
    with of_item(item, items):
        return int(torch.randint(2**62, ()))


def _number(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _seed_torch(number: int) -> None:
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def _state() -> State:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_state(state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
