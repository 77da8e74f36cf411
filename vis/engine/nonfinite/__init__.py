"""Numbers that are not finite in a training: found, kept, skipped or stopped at, and seen again."""

from __future__ import annotations

from vis.engine.nonfinite.replay import replay
from vis.engine.nonfinite.sentinel import NonFiniteSentinel, build_sentinel

__all__ = ["NonFiniteSentinel", "build_sentinel", "replay"]
