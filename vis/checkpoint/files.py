"""From a path or an address to a dict of tensors, whatever container the file is.

Nothing in a file is run: torch files are read with ``weights_only=True``, detectron2's ``.pkl`` by
:mod:`vis.checkpoint.pickles`, safetensors has no code in it.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from vis.checkpoint.pickles import ForbiddenContent, read_array_pickle

# What a file of torch.save starts with when it is not a zip archive: protocol 2 and the magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_CONTAINERS = ("model", "state_dict", "model_state_dict")
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
)


@dataclass
class WeightFile:
    """The weights of one file.

    Attributes:
        state: name -> tensor.
        backbone_only: the names are those of a classification backbone alone (detectron2's "matching_heuristics").
        path: where the file lies on this machine.
    """

    state: dict[str, Tensor]
    backbone_only: bool
    path: Path


def local_path(path: str | PathLike[str]) -> Path:
    """The file behind a path, a ``detectron2://`` name or an ``http(s)://`` address (downloaded once, to FVCORE_CACHE).

    Raises:
        FileNotFoundError: no such file, or the download failed.
    """
    name = str(path)
    if "://" in name:
        try:
            return Path(PathManager.get_local_path(name))
        except Exception as error:  # a dozen kinds of network errors, none of them ours
            raise FileNotFoundError(
                f"{name} could not be downloaded ({type(error).__name__}: {error}). Download it elsewhere and give "
                "the path of the file"
            ) from error
    file = Path(name).expanduser()
    if file.is_dir():
        raise FileNotFoundError(f"{name} is a folder, expected a file of weights (.pth, .pt, .safetensors or .pkl)")
    if not file.is_file():
        near = sorted(item.name for item in file.parent.glob("*.p*") if item.is_file()) if file.parent.is_dir() else []
        hint = f"that folder holds {', '.join(near[:8])}" if near else f"looked from {Path.cwd()}"
        raise FileNotFoundError(f"weights file {name} does not exist ({hint})")
    return file


def read_checkpoint(path: str | PathLike[str]) -> Any:
    """Everything in a file of ``torch.save``, tensors on the CPU.

    Raises:
        FileNotFoundError: see :func:`local_path`.
        ValueError: the file is not such a file, is damaged, or holds Python objects that could run code.
    """
    file = local_path(path)
    kind = _kind(file)
    if kind != "torch":
        raise ValueError(f"{file} is {_NAMES.get(kind, kind)}, expected a checkpoint written by torch.save")
    return _guarded(file, "torch")


def read_weights(path: str | PathLike[str]) -> WeightFile:
    """The weights in a ``.pth``/``.pt``, ``.safetensors`` or detectron2 ``.pkl`` file; the content tells which it is.

    Raises:
        FileNotFoundError: see :func:`local_path`.
        ValueError: it is none of these, is damaged, holds objects that could run code, or has no tensors in it.
    """
    file = local_path(path)
    content = _guarded(file, _kind(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dict of tensors or {{'model': ...}}")
    caffe2 = "blobs" in content and "model" not in content
    state = content["blobs"] if caffe2 else content
    for name in _CONTAINERS:
        if isinstance(content.get(name), dict):
            state = content[name]
            break
    tensors = {str(key): _tensor(value) for key, value in state.items() if isinstance(value, (Tensor, np.ndarray))}
    if not tensors:
        raise ValueError(f"{file} has no weights in it: found {', '.join(map(str, list(content)[:8])) or 'nothing'}")
    if caffe2:
        tensors = _caffe2_names(tensors)
    return WeightFile(tensors, caffe2 or bool(content.get("matching_heuristics")), file)


_NAMES = {
    "torch": "a PyTorch file",
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
        return "torch"
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
            return read_array_pickle(file)
        return torch.load(file, map_location="cpu", weights_only=True)
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


def _forbidden_name(message: str) -> str:
    lines = [line.strip() for line in message.split("\n") if "GLOBAL" in line or "Unsupported" in line]
    return (lines or message.split("\n"))[0][:200]


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(str(error)) from error


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))


def _caffe2_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Caffe2 files (detectron2's MSRA ImageNet weights) in detectron2's names; momentum buffers dropped."""
    from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names

    weights = {key: value for key, value in tensors.items() if not key.endswith("_momentum")}
    renamed, _ = convert_c2_detectron_names(weights)
    return renamed
