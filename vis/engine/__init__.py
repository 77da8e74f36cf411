"""Running things: configuration, the trainer, launching, the predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vis.engine.config import load_cfg

__all__ = ["load_cfg"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: vis.engine.doctor is of use where detectron2, which it needs, is missing.
    if name == "load_cfg":
        from vis.engine.config import load_cfg

        return load_cfg
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
