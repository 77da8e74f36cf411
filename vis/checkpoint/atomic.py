"""Files that are either whole or not there, whatever kills the process while they are written."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_PREFIX, _SUFFIX = ".", ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Recording(io.FileIO):
    """A file that keeps the error of a failed write: torch's zip writer replaces it by a message of its own."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            try:
                written += super().write(view[written:]) or 0
            except OSError as error:
                self.error = error
                raise
        return written


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[io.FileIO]:
    """A binary file to write to, which takes the name ``path`` only once it is complete and on the disk.

    The data go to a temporary file in the same folder, are flushed to the disk, and then replace ``path`` in one step;
    the folder entry is flushed too. Where anything fails, an earlier file at ``path`` is as it was and the temporary
    file is gone.

    Raises:
        OSError: the file cannot be written; where the disk or a quota is full the message says so.
    """
    path = Path(path)
    temporary = path.parent / f"{_PREFIX}{path.name}.{os.getpid()}{_SUFFIX}"
    handle = _Recording(temporary, "w")
    try:
        with handle:
            yield handle
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = handle.error or (error if isinstance(error, OSError) else None)
        if cause is not None and cause.errno in _FULL:
            raise OSError(
                cause.errno,
                f"no space left to write {path} ({os.strerror(cause.errno or 0)}); what was written before is intact. "
                "Free some space (in a training, SOLVER.CHECKPOINT_KEEP N keeps only the last N checkpoints), then "
                "continue with --resume",
            ) from error
        if handle.error is not None:
            raise handle.error from error
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the new name itself durable. Systems without folder handles (Windows) flush names on their own."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` that leaves either the complete new file or the old one.

    Raises:
        OSError: see :func:`atomic_file`.
    """
    with atomic_file(path) as file:
        torch.save(obj, file)


def write_text_atomic(text: str, path: str | os.PathLike[str]) -> None:
    """Write a small text file so that a reader sees the old text or the new one.

    Raises:
        OSError: see :func:`atomic_file`.
    """
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def remove_temporary_files(folder: str | os.PathLike[str], name: str = "*") -> list[Path]:
    """Delete what killed processes left half-written in ``folder``; ``name`` is a pattern for the final file name.

    Only for a folder that no other process writes to.
    """
    stale = sorted(Path(folder).glob(f"{_PREFIX}{name}.[0-9]*{_SUFFIX}"))
    for path in stale:
        path.unlink(missing_ok=True)
    return stale
