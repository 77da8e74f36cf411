"""The configuration tree and the registry of declared keys.

A part of the framework (a backbone, a head, a mapper ...) declares its own keys beside its code:

    @declare
    def add_config(cfg: CfgNode) -> None:
        cfg.MODEL.MY_HEAD = CfgNode()
        cfg.MODEL.MY_HEAD.HIDDEN_DIM = 256

so that adding a part edits no central file. :func:`get_cfg` gives detectron2's defaults, then the defaults that several
parts share, then what every imported part declared.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TypeVar

from detectron2.config import CfgNode
from detectron2.config import get_cfg as _detectron2_cfg

from vis.config.defaults import add_shared_defaults

__all__ = ["CfgNode", "closest", "declare", "get_cfg"]

Declaration = TypeVar("Declaration", bound=Callable[[CfgNode], None])

# Keyed by where the function was written: a module that is imported again (a reload, a second IMPORTS) replaces its
# declaration instead of adding a second one.
_DECLARED: dict[tuple[str, str], Callable[[CfgNode], None]] = {}


def declare(function: Declaration) -> Declaration:
    """Register ``function(cfg)``, which adds the keys of one part with their default values; returns it unchanged."""
    _DECLARED[(function.__module__, function.__qualname__)] = function
    return function


def get_cfg() -> CfgNode:
    """A new, unfrozen tree: detectron2's defaults, vis' shared defaults, the keys of every part imported so far."""
    cfg = _detectron2_cfg()
    add_shared_defaults(cfg)
    # Sorted by name: the result does not depend on the order in which modules happened to be imported.
    for key in sorted(_DECLARED):
        _DECLARED[key](cfg)
    return cfg


def closest(name: str, candidates: Iterable[str]) -> str:
    """A hint for an error message: `` Did you mean 'X'?`` with the nearest candidate, or an empty string."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
