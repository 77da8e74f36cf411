"""Weights and checkpoints: reading any container that users have, loading with a report, writing atomically."""

from __future__ import annotations

from vis.checkpoint.atomic import atomic_file, remove_temporary_files, save_atomic, write_text_atomic
from vis.checkpoint.class_rows import ClassMap, CopiedRows, build_class_map
from vis.checkpoint.conversion import Conversion, convert
from vis.checkpoint.files import read_checkpoint, read_weights
from vis.checkpoint.loading import load_state, load_weights
from vis.checkpoint.report import LoadReport
from vis.checkpoint.saving import save_weights
from vis.checkpoint.sources import SOURCES
from vis.checkpoint.stages import STAGES

__all__ = [
    "SOURCES",
    "STAGES",
    "ClassMap",
    "Conversion",
    "CopiedRows",
    "LoadReport",
    "atomic_file",
    "build_class_map",
    "convert",
    "load_state",
    "load_weights",
    "read_checkpoint",
    "read_weights",
    "remove_temporary_files",
    "save_atomic",
    "save_weights",
    "write_text_atomic",
]
