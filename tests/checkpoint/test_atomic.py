"""Files are whole or not there."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vis.checkpoint import remove_temporary_files, save_atomic, write_text_atomic


def test_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    for value in (1, 2):
        save_atomic({"a": torch.full((3,), value)}, path)
    assert torch.load(path, weights_only=True)["a"].tolist() == [2, 2, 2]
    write_text_atomic("model.pth", tmp_path / "last_checkpoint")
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]


@contextmanager
def full_device(path: Path) -> Iterator[None]:
    """The temporary file of ``path`` is on a device without room."""
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    yield


@contextmanager
def small_files(path: Path) -> Iterator[None]:
    """The system lets files grow to 2000 bytes only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("full", "number"), [(full_device, errno.ENOSPC), (small_files, errno.EFBIG)])
def test_a_full_disk_leaves_the_old_file(full: Any, number: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_atomic({"a": torch.ones(3)}, path)
    with full(path), pytest.raises(OSError, match="no space left to write .*model.pth.*intact") as caught:
        save_atomic({"a": torch.zeros(3000)}, path)
    assert caught.value.errno == number
    assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1, 1]
    assert [item.name for item in tmp_path.iterdir()] == ["model.pth"]


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_atomic(torch.ones(3), path)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        save_atomic({"a": torch.ones(2), "b": lambda: None}, path)
    assert torch.load(path, weights_only=True).tolist() == [1, 1, 1]
    assert [item.name for item in tmp_path.iterdir()] == ["model.pth"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_atomic(torch.ones(1), tmp_path / "nowhere" / "model.pth")


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".model_final.pth.123.tmp", ".gitignore", "results.tmp", ".results.json.tmp"):
        (tmp_path / name).write_text("")
    assert [path.name for path in remove_temporary_files(tmp_path)] == [".model_final.pth.123.tmp"]
    assert len(list(tmp_path.iterdir())) == 3
