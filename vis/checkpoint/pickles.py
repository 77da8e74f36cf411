"""Reading detectron2's ``.pkl`` weights without running what a pickle may contain.

Such a file is a pickle of NumPy arrays in plain containers. A pickle can name any function and have it called, so the
reader here knows only the few names that arrays need and refuses every other one.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np


class ForbiddenContent(ValueError):
    """The file names Python objects other than arrays and plain containers."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """The one use Python 2 pickles make of ``codecs.encode``: bytes that were stored as text."""
    if encoding not in ("latin1", "latin-1"):
        raise ForbiddenContent(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


class _ArrayType:
    """Stands for ``numpy.ndarray``, which called with a shape would reserve memory for it."""


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct`` as arrays use it: empty, the content follows."""
    if not isinstance(kind, _ArrayType) or tuple(shape) != (0,):
        raise ForbiddenContent(f"an array of shape {shape} without content")
    return np.ndarray((0,), "b")


def _array_functions() -> dict[tuple[str, str], Any]:
    core: Any = getattr(np, "_core", None) or np.core  # numpy 2 renamed the package; files name either
    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _ArrayType(),
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
    }
    for package in ("numpy.core", "numpy._core"):
        names[f"{package}.multiarray", "_reconstruct"] = _empty_array
        names[f"{package}.multiarray", "scalar"] = core.multiarray.scalar
        names[f"{package}.numeric", "_frombuffer"] = core.numeric._frombuffer
    return names


class _ArrayUnpickler(pickle.Unpickler):
    _allowed = _array_functions()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise ForbiddenContent(f"{module}.{name}")
        return self._allowed[module, name]


def read_array_pickle(path: Path) -> Any:
    """The content of a pickle of arrays, numbers, strings and plain containers.

    Raises:
        ForbiddenContent: it holds anything else.
        pickle.UnpicklingError, EOFError: it is not a pickle or ends too early.
    """
    with path.open("rb") as file:
        content = _ArrayUnpickler(file, encoding="latin1").load()
    _refuse_objects(content)
    return content


def _refuse_objects(content: Any) -> None:
    """Everything in it, each object once: lists that hold one another make more paths than there is time for."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        elif isinstance(item, np.ndarray):
            if item.dtype.hasobject:
                raise ForbiddenContent("an array of Python objects")
        elif not isinstance(item, (np.generic, str, bytes, int, float, complex, bool, type(None))):
            raise ForbiddenContent(f"{type(item).__module__}.{type(item).__qualname__}")
