"""Writing weights: ``.pth`` as all detectron2 programs read it, or ``.safetensors``; whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vis.checkpoint.atomic import atomic_file, save_atomic

SUFFIXES = (".pth", ".pt", ".safetensors")

# Names of types in the safetensors format.
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(state: Mapping[str, Tensor], path: str | os.PathLike[str], **others: Any) -> None:
    """Write a state dict; the suffix of ``path`` says how. An earlier file is replaced in one step.

    ``.pth``, ``.pt``: ``{"model": state, **others}``; a tensor under two names is written once.
    ``.safetensors``: tensors alone, each name with its own copy, streamed.

    Raises:
        ValueError: another suffix, a type that safetensors has not, or ``others`` for safetensors.
        OSError: see :func:`vis.checkpoint.atomic.atomic_file`.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: weights are written as {', '.join(SUFFIXES)}")
    # a view would bring all of its storage along
    plain = {name: _whole(value.detach().cpu()) for name, value in state.items()}
    if file.suffix != ".safetensors":
        save_atomic({"model": plain, **others}, file)
        return
    if others:
        raise ValueError(f"{file}: safetensors holds tensors alone; {', '.join(others)} need a .pth")
    _write_safetensors(plain, file)


def _whole(value: Tensor) -> Tensor:
    own = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if own else value.clone(memory_format=torch.contiguous_format)


def _write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """The format: length of the header in 8 bytes, a json of types, shapes and places, the bare data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    # wide types first keeps every tensor aligned
    ordered = sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, value in ordered:
        if value.dtype not in _TYPES:
            raise ValueError(f"{name} is of type {value.dtype}, which a safetensors file here cannot hold: use .pth")
        end = place + value.numel() * value.element_size()
        header[name] = {"dtype": _TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, value in ordered:
            file.write(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
