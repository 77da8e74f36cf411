"""The processes of one job look after one another: when one ends, the others end too, and say which and why.

A process that died cannot say so, and what its peers would show is an error of their communication ("connection closed
by peer"), or nothing at all for as long as NCCL waits. So every process keeps a thread that says through the store of
the job, once a second, that it is there, looks at the others, and ends this process when one of them is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

PERIOD = 1.0
#: Seconds without a sign of life after which a process of another machine counts as gone. Reading a large json keeps a
#: process from giving one; processes of this machine are looked up in its table of processes instead.
SILENCE = 45.0
#: Seconds that the main thread has to end by an error of its own.
GRACE = 8.0
_ENDED = "ended"
# Words of errors of Gloo, NCCL and the store.
_OF_COMMUNICATION = ("connection", "gloo", "nccl", "peer", "socket", "store", "timed out", "timeout", "broken pipe")


class Peers:
    """The watch of one process over the others of its job.

    Args:
        store: a connection of its own to the store of the job, since the watching thread must not wait for others.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.cause = ""
        self._told = False
        self._stop = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._places: dict[int, tuple[str, int]] = {}
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Say where this process is, and begin to watch."""
        self.store.set(f"place_{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        self.store.set(f"alive_{self.rank}", "0")
        self._thread.start()

    def stop(self) -> None:
        """This process is done with the job: nobody will miss it.

        Process 0, which may hold the store, leaves some time for the others to read in it why it ends.
        """
        self._stop.set()
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that held it
            self.store.set(f"done_{self.rank}", "1")
            keys = [f"done_{rank}" for rank in range(self.world_size)]
            end = time.monotonic() + 3 * PERIOD
            while self.rank == 0 and time.monotonic() < end and not self.store.check(keys):
                time.sleep(0.05)
        self._thread.join(5)

    def tell(self, text: str) -> None:
        """Let the others know why this process, or another one, ends; the first one to tell is believed."""
        if self._told:
            return
        self._told = True
        with contextlib.suppress(RuntimeError):
            self.store.compare_set(_ENDED, "", text)

    def wait_for_cause(self, seconds: float) -> str:
        """What ended another process, "" where nothing was found out."""
        end = time.monotonic() + seconds
        while not self.cause and time.monotonic() < end and self._thread.is_alive():
            time.sleep(0.1)
        if self.cause:
            return self.cause
        quiet = [rank for rank, (_, since) in self._seen.items() if time.monotonic() - since > 4 * PERIOD]
        return ", ".join(f"nothing is heard of {self._name(rank)}" for rank in sorted(quiet))

    def _watch(self) -> None:
        count = 0
        while not self._stop.wait(PERIOD):
            count += 1
            try:
                self.store.set(f"alive_{self.rank}", str(count))
                self.cause = self._look()
            except RuntimeError as error:  # the store went with the process that held it
                self.cause = f"process 0, which holds the store of the job, does not answer ({_first_line(error)})"
            if self.cause and not self._stop.is_set():
                self._end()
                return

    def _look(self) -> str:
        """Why a process is gone, "" while all are there."""
        if self.store.check([_ENDED]):
            return self._read(_ENDED)
        for rank in range(self.world_size):
            # Of other machines each process watches one, so that many processes do not ask for the sign of every other.
            if rank == self.rank or not self._to_watch(rank) or self.store.check([f"done_{rank}"]):
                continue
            if text := self._missing(rank):
                self.tell(text)
                return text
        return ""

    def _to_watch(self, rank: int) -> bool:
        if rank not in self._places and self.store.check([f"place_{rank}"]):
            host, process = self._read(f"place_{rank}").rsplit(" ", 1)
            self._places[rank] = (host, int(process))
        known = self._places.get(rank)
        here = known is not None and known[0] == socket.gethostname()
        return known is not None and (here or rank == (self.rank + 1) % self.world_size)

    def _missing(self, rank: int) -> str:
        host, process = self._places[rank]
        if host == socket.gethostname() and not _runs(process):
            return f"{self._name(rank)} is gone without a word: it was killed, as the system does for want of memory"
        sign, now = self._read(f"alive_{rank}"), time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != sign:
            self._seen[rank] = (sign, now)
        silent = now - self._seen[rank][1]
        if host == socket.gethostname() or silent < SILENCE:
            return ""
        return f"{self._name(rank)} has given no sign of life for {silent:.0f} seconds"

    def _name(self, rank: int) -> str:
        host, process = self._places.get(rank, ("?", 0))
        return f"process {rank} (pid {process} on {host})"

    def _read(self, key: str) -> str:
        return self.store.get(key).decode()

    def _end(self) -> None:
        """The main thread, which may wait in a collective for ever, has some seconds for an error of its own."""
        logger.error("another process of this job ended: %s", self.cause)
        if not self._stop.wait(GRACE):
            print(f"error: another process of this job ended: {self.cause}", file=sys.stderr, flush=True)
            logging.shutdown()
            os._exit(1)


def _runs(process: int) -> bool:
    """Whether there is a process with this number, and not just what is left of one."""
    stat = Path(f"/proc/{process}/stat")
    if Path("/proc/self/stat").exists():
        try:
            return stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]


_active: Peers | None = None


@contextlib.contextmanager
def watch_peers() -> Iterator[None]:
    """Inside, the processes of the default process group look after one another."""
    global _active
    store = _own_store()
    if store is None:
        yield
        return
    peers = Peers(store, dist.get_rank(), dist.get_world_size())
    peers.start()
    _active = peers
    try:
        with explained():
            yield
    finally:
        _active = None
        peers.stop()


def _own_store() -> Any:
    """A new connection to the store that the default process group was made with; None where it is a file."""
    from torch.distributed import distributed_c10d  # not in every build of torch

    # torch has no public way to it.
    store: Any = distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    return job_store(store.host, store.port)


def job_store(host: str, port: int) -> Any:
    """What processes tell one another through, at the store of a job."""
    client = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return dist.PrefixStore(f"vis_peers_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Errors inside are told to the other processes; one of the communication is replaced by what caused it.

    Raises:
        ChildProcessError: another process ended.
    """
    try:
        yield
    except Exception as error:
        peers = _active
        if peers is None or isinstance(error, ChildProcessError):
            raise
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_COMMUNICATION):
            cause = peers.wait_for_cause(2 * GRACE)
            if cause and not cause.startswith(f"process {peers.rank}:"):
                raise ChildProcessError(f"another process of this job ended: {cause}") from error
        peers.tell(f"process {peers.rank}: {type(error).__name__}: {_first_line(error)}")
        raise
