"""Batches as plain containers of tensors, which load with ``weights_only=True``, and back; every tensor in anything."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

logger = logging.getLogger(__name__)

_TYPE = "__type__"
_WRAPPERS: dict[str, type] = {"BitMasks": BitMasks, "Boxes": Boxes}


def to_plain(value: Any, where: str = "batch") -> Any:
    """Tensors (on the CPU), numbers, texts and containers of them in place of ``value``.

    What has no such form becomes its ``repr``, with a warning: a batch that holds it cannot be replayed.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        whole = value.detach().cpu()
        # a view would bring all of its storage along
        return whole.clone() if whole.untyped_storage().nbytes() > whole.numel() * whole.element_size() else whole
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Instances):
        fields = {name: to_plain(field, f"{where}.{name}") for name, field in value.get_fields().items()}
        return {_TYPE: "Instances", "image_size": [int(side) for side in value.image_size], "fields": fields}
    if type(value).__name__ in _WRAPPERS:
        return {_TYPE: type(value).__name__, "tensor": to_plain(value.tensor, where)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    logger.warning("%s is a %s, which a dump cannot hold: its batch cannot be replayed", where, type(value).__name__)
    return {_TYPE: "unknown", "repr": repr(value)[:1000]}


def from_plain(value: Any) -> Any:
    """What :func:`to_plain` was given; tuples are lists.

    Raises:
        ValueError: something in it could not be kept.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TYPE)
    if kind is None:
        return {key: from_plain(item) for key, item in value.items()}
    if kind in _WRAPPERS:
        return _WRAPPERS[kind](value["tensor"])
    if kind == "Instances":
        height, width = value["image_size"]
        fields = {name: from_plain(item) for name, item in value["fields"].items()}
        return Instances((height, width), **fields)
    raise ValueError(f"the dump holds {value.get('repr', kind)!r}, which it could not keep: it cannot be replayed")


def tensors_in(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """``(place, tensor)`` of every tensor in containers, data classes and detectron2's structures, in order."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Instances):
        for name, field in value.get_fields().items():
            yield from tensors_in(field, f"{where}.{name}")
    elif type(value).__name__ in _WRAPPERS:
        yield where, value.tensor
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{where}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{where}.{field.name}" if where else field.name)


def has_nonfinite(tensor: Tensor) -> bool:
    """Whether a number in it is NaN or infinite; whole numbers never are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return not bool(torch.isfinite(tensor.detach()).all())


def describe(tensor: Tensor) -> str:
    """``float32 [2, 5]: 3 NaN, 1 infinite of 10, the first at [0, 2]; finite ones up to 12.5``."""
    values = tensor.detach()
    nan, finite = torch.isnan(values), torch.isfinite(values)
    bad = (~finite).nonzero()
    first = f", the first at {bad[0].tolist()}" if len(bad) and values.dim() else ""
    largest = values[finite].abs().max().item() if finite.any() else None
    return (
        f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}: {int(nan.sum())} NaN, "
        f"{int((~finite & ~nan).sum())} infinite of {values.numel()}{first}"
        + (f"; finite ones up to {largest:.4g}" if largest is not None else "")
    )
