"""Child processes that do not outlive this one, and folders that only one process works in."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

LOCK = ".lock"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class FolderInUse(ValueError):
    """Another process works in a folder."""


class FolderLock:
    """Held until it is closed here and in every child that it was given to, however they end.

    Where the system has no ``flock`` (Windows) nothing is locked.

    Raises:
        FolderInUse: somebody else holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        if importlib.util.find_spec("fcntl") is None:
            return
        fcntl = importlib.import_module("fcntl")
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self.descriptor, 32).decode(errors="replace").strip()
            os.close(self.descriptor)
            raise FolderInUse(f"{folder} is in use by another process (started by process {owner})") from error
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let go; children that were given it keep it."""
        os.close(self.descriptor)


class Running(Protocol):
    """Something that runs, here or elsewhere."""

    def poll(self) -> int | None: ...
    def seconds(self) -> float: ...
    def last_words(self) -> str: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Child:
    """Commands that run one after the other until one fails; their output goes to a file.

    On Linux the running command is killed when this process dies, by whatever signal. It keeps the lock of its folder,
    so that nobody continues the folder before it is gone.

    Args:
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        folder: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.lock = FolderLock(folder)
        self.log = log
        self.environment = {**os.environ, **(environment or {})}
        self.started = time.monotonic()
        self._left = [list(command) for command in commands]
        self._output = log.open("wb")
        self._process = self._next()

    def _next(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._left.pop(0),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=self.environment,
            pass_fds=(self.lock.descriptor,),
            start_new_session=True,  # Ctrl-C is for this process, which tells its children
            preexec_fn=_die_with_parent(),
        )

    def poll(self) -> int | None:
        """The exit status of the last command that ran, None while there is more to do."""
        status = self._process.poll()
        if status == 0 and self._left:
            self._process = self._next()
            return None
        if status is not None and not self._output.closed:
            self._output.close()
            self.lock.close()
        return status

    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started

    def terminate(self) -> None:
        """Ask it to end; a training writes a checkpoint first."""
        self._left = []
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it, with all processes of its own."""
        self._left = []
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self, lines: int = 12) -> str:
        """The end of its output."""
        return tail(self.log, lines)


def stop_all(children: Sequence[Running], grace: float) -> None:
    """Ask all to end, and kill those that have not after ``grace`` seconds."""
    for child in children:
        child.terminate()
    end = time.monotonic() + grace
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    for child in children:
        child.kill()
        child.poll()


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file that may be large."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 65536, 0))
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _die_with_parent() -> Callable[[], Any] | None:
    """What a new process calls before its program: the system kills it when its parent dies."""
    if not sys.platform.startswith("linux"):
        return None
    library, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        library.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be asked
            os._exit(1)

    return ask
