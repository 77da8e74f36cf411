"""Weights and checkpoints: reading any container that users have, loading with a report, writing atomically."""

from __future__ import annotations

from vis.checkpoint.atomic import atomic_file, remove_temporary_files, save_atomic, write_text_atomic
from vis.checkpoint.files import read_checkpoint
from vis.checkpoint.loading import LoadReport, load_weights

__all__ = [
    "LoadReport",
    "atomic_file",
    "load_weights",
    "read_checkpoint",
    "remove_temporary_files",
    "save_atomic",
    "write_text_atomic",
]
