"""A training that is told to go writes a checkpoint first: SIGTERM, and the signals that schedulers send beforehand."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

#: Exit status of a training that was told to go and can be continued (EX_TEMPFAIL of sysexits.h).
EXIT_STATUS = 75
#: SIGTERM ends jobs; SIGUSR1 and SIGUSR2 are what ``sbatch --signal`` usually announces the end of the time by.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Preempted(SystemExit):
    """The training was told to go; its last checkpoint is written.

    Attributes:
        number: the signal, 0 in a process that did not get it itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_STATUS)
        self.number = number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name if self.number else "a signal to another process"
        return f"told to go by {name}"


@contextmanager
def passed_on(processes: Sequence[int]) -> Iterator[None]:
    """Inside, this process hands the signals on to those that it started, which end by themselves, and stays.

    Args:
        processes: their numbers.
    """
    if threading.current_thread() is not threading.main_thread():  # others cannot take signals
        yield
        return

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class PreemptionHook(HookBase):
    """On a signal: finish the step (several processes: those up to where they look), write a checkpoint, leave with 75.

    A signal during an evaluation waits for its end. One before the first step, or during the last evaluation, ends the
    process as it would without this hook: nothing would be lost.

    Args:
        save: writes a checkpoint of the state after this step, and is called in every process.
        device: of the model; several processes agree there.
        every: several processes look every so many iterations whether one of them got a signal.
    """

    def __init__(self, *, save: Callable[[], None], device: torch.device, every: int = 10) -> None:
        self.save = save
        self.device = device
        self.every = every
        self.number = 0
        self._before: dict[int, Any] = {}

    def before_train(self) -> None:
        """Take the signals over; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            logger.info("not in the main thread: signals end this training without a checkpoint")
            return
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def after_train(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def after_step(self) -> None:
        """Leave, where it is time to.

        Raises:
            Preempted: after the checkpoint is written.
        """
        if not self._told():
            return
        self.save()
        comm.synchronize()  # who starts the processes ends the others soon after the first one has left
        logger.warning("told to go after iteration %d: --resume continues there", self.trainer.iter)
        raise Preempted(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number  # a handler does no more than that: it may stand anywhere in a step

    def _told(self) -> bool:
        if comm.get_world_size() == 1:
            return bool(self.number)
        if (self.trainer.iter + 1) % self.every:
            return False
        told = torch.tensor([self.number], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())
