"""Measurements with their settings: the op, inference, its memory, a training step, the loaders.

Each module has one ``measure_*`` function that takes :class:`Settings` and returns the figures as a dict for json, and
``lines(result)`` that puts them into words. ``tools/benchmark.py`` is the command.
"""

from __future__ import annotations

from vis.engine.benchmarks.common import Settings

__all__ = ["Settings"]
