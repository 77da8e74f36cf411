"""From a path or an address to a dict of tensors, whatever container the file is.

Nothing in a file is run: torch files are read with ``weights_only=True``, detectron2's ``.pkl`` by
:mod:`vis.checkpoint.pickles`, safetensors has no code in it. What a file declares is compared with its size before
anything is reserved for it (:mod:`vis.checkpoint.bounds`).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vis.checkpoint.bounds import Unbounded, check_legacy_torch, check_opcodes, check_torch_zip
from vis.checkpoint.locations import local_path
from vis.checkpoint.pickles import ForbiddenContent, read_array_pickle

# What a file of torch.save starts with when it is not a zip archive: protocol 2 and the magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_CONTAINERS = ("model", "state_dict", "model_state_dict")
# Tensors may share memory (a weight under two names), but not be a multiple of the file.
_MOST_OF_FILE = 8
#: ``torch.load(weights_only=True)`` takes names of other packages, with aliases, only since this version.
NUMBERS_ALLOWED = torch.__version__ >= (2, 7)  # type: ignore[operator]  # a TorchVersion compares with tuples
_READING_ERRORS = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    ValueError,
    MemoryError,
    OverflowError,
    RecursionError,
    zipfile.BadZipFile,
)


@dataclass
class WeightFile:
    """The weights of one file.

    Attributes:
        state: name -> tensor.
        backbone_only: the file says that it is a backbone (detectron2's "matching_heuristics", or Caffe2's "blobs").
        path: where the file lies on this machine.
        content: everything else that the file holds.
    """

    state: dict[str, Tensor]
    backbone_only: bool
    path: Path
    content: dict[Any, Any] = field(default_factory=dict)


def read_checkpoint(path: str | PathLike[str]) -> Any:
    """Everything in a file of ``torch.save``, tensors on the CPU.

    Raises:
        FileNotFoundError: see :func:`vis.checkpoint.locations.local_path`.
        ValueError: the file is not such a file, is damaged, or holds Python objects that could run code.
    """
    file = local_path(path)
    kind = _kind(file)
    if kind not in ("torch", "legacy torch"):
        raise ValueError(f"{file} is {_NAMES.get(kind, kind)}, expected a checkpoint written by torch.save")
    return _guarded(file, kind)


def read_weights(path: str | PathLike[str]) -> WeightFile:
    """The weights in a ``.pth``/``.pt``, ``.safetensors`` or detectron2 ``.pkl`` file; the content tells which it is.

    Raises:
        FileNotFoundError: see :func:`vis.checkpoint.locations.local_path`.
        ValueError: it is none of these, is damaged, holds objects that could run code, or has no tensors in it.
    """
    file = local_path(path)
    content = _guarded(file, _kind(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dict of tensors or {{'model': ...}}")
    caffe2 = isinstance(content.get("blobs"), dict) and "model" not in content
    inside = "blobs" if caffe2 else next((name for name in _CONTAINERS if isinstance(content.get(name), dict)), None)
    state = content if inside is None else content[inside]
    arrays = {str(key): value for key, value in state.items() if isinstance(value, (Tensor, np.ndarray))}
    if not arrays:
        raise ValueError(f"{file} has no weights in it: found {', '.join(map(str, list(content)[:8])) or 'nothing'}")
    declared, size = sum(value.nbytes for value in arrays.values()), file.stat().st_size
    if declared > _MOST_OF_FILE * size:  # before any of it is copied
        raise ValueError(f"{file} declares {declared} bytes of tensors and has {size}: it is refused")
    tensors = {key: _tensor(value, key, file) for key, value in arrays.items()}
    others = {} if inside is None else {key: value for key, value in content.items() if key != inside}
    return WeightFile(tensors, caffe2 or bool(content.get("matching_heuristics")), file, others)


_NAMES = {
    "torch": "a PyTorch file",
    "legacy torch": "a PyTorch file",
    "pickle": "a pickle (.pkl)",
    "safetensors": "a safetensors file",
}


def _kind(file: Path) -> str:
    with file.open("rb") as handle:
        head = handle.read(256)
    start = head.lstrip()[:64].lower()
    if not head:
        raise ValueError(f"{file} is empty: copy or download it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{file} is a web page, not weights: the download led to a page that asks for a login or a confirmation. "
            "Download the file in a browser"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull`")
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(file)
    if head.startswith(_LEGACY_TORCH):
        return "legacy torch"
    if head[:1] == b"\x80":
        return "pickle"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**30:
        return "safetensors"
    raise ValueError(f"{file} is not a file of weights (.pth, .pt, .safetensors, .pkl): it starts with {head[:16]!r}")


def _kind_of_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is cut off or damaged ({error}): copy or download it again") from error
    if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise ValueError(f"{file} is a zip archive of other things ({', '.join(names[:4])} ...): unpack it first")
    if any("/code/" in name for name in names):
        raise ValueError(f"{file} is a TorchScript archive, which is a program: export its state_dict() instead")
    return "torch"


def _guarded(file: Path, kind: str) -> Any:
    try:
        if kind == "safetensors":
            return _read_safetensors(file)
        if kind == "pickle":
            with file.open("rb") as handle:
                check_opcodes(handle, file.stat().st_size)
            return read_array_pickle(file)
        (check_torch_zip if kind == "torch" else check_legacy_torch)(file)
        with _numbers_allowed():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Unbounded as error:
        raise ValueError(f"{file} is refused: {error}. No program writes such files; do not use it") from error
    except ForbiddenContent as error:
        raise ValueError(
            f"{file} holds Python objects beside arrays ({error}) and is refused: reading them can run code. "
            "Save it again with torch.save({'model': state_dict}, path) where you trust it"
        ) from error
    except _READING_ERRORS as error:
        text = str(error).split("\n")[0]
        if isinstance(error, pickle.UnpicklingError) and "Weights only" in str(error):
            raise ValueError(
                f"{file} holds Python objects beside tensors ({_forbidden_name(str(error))}) and is refused: reading "
                "them can run code. Save it again with torch.save({'model': state_dict}, path) where you trust it"
            ) from error
        raise ValueError(f"{file} is cut off or damaged ({text}): copy or download it again") from error


def _numbers_allowed() -> AbstractContextManager[None]:
    """Lets ``torch.load`` read NumPy's single numbers: trainings leave them in schedules and metrics."""
    if not NUMBERS_ALLOWED:
        return nullcontext()
    core: Any = getattr(np, "_core", None) or np.core
    scalar = core.multiarray.scalar
    allowed: list[Any] = [(scalar, f"numpy.{package}.multiarray.scalar") for package in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
    return torch.serialization.safe_globals(allowed)


def _forbidden_name(message: str) -> str:
    lines = [line.strip() for line in message.split("\n") if "GLOBAL" in line or "Unsupported" in line]
    return (lines or message.split("\n"))[0][:200]


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)  # the library compares every size in the header with the file
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(str(error)) from error


def _tensor(value: Tensor | np.ndarray, name: str, file: Path) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{file}: {name} is an array of {value.dtype}, expected numbers")
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{file}: {name} is a {value.layout} tensor on {value.device}, expected a plain one")
    return value
