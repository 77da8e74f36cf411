"""Weights of a recording: the released state dict, and values computed from names."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vis.checkpoint import SOURCES
from vis.engine.parity.common import Array, Check, chosen, existing


def read_manifest(path: str | Path) -> dict[str, dict[str, Any]]:
    """``name -> {shape, dtype, fill, shared_with?}`` of a ``.json.gz`` (or ``.json``) file, in its order."""
    file = existing(path, "manifest")
    try:
        manifest = json.loads(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file} cannot be read as (compressed) json: {error}") from error
    wrong = [name for name, entry in manifest.items() if not {"shape", "dtype", "fill"} <= set(entry)]
    if not manifest or wrong:
        raise ValueError(
            f"{file} is not a manifest: entries need shape, dtype and fill, {wrong[:3] or 'none'} have not"
        )
    return manifest


def in_our_names(model: nn.Module, manifest: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A manifest under the names of the model, for one whose names are not the release's.

    Such a model says in ``RECORDING`` which source of weights has the release's names. An entry keeps the released name
    as "released", which its value is computed from, and a single number has whichever shape the model gives it.
    """
    source = getattr(model, "RECORDING", None)
    if source is None:
        return dict(manifest)
    state, renamed = model.state_dict(), {}
    for name, entry in manifest.items():
        ours = SOURCES[source].ours(name) or name
        shape = entry["shape"]
        if ours in state and state[ours].numel() == 1 and int(np.prod(shape)) == 1:
            shape = list(state[ours].shape)
        renamed[ours] = {**entry, "shape": shape, "released": name}
    return renamed


def formula_weight(name: str, shape: Sequence[int], mean: float, std: float) -> Array:
    """The float32 value of a weight, computed from its name."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    scaled = np.asarray(noise, dtype=np.float32) * np.float32(std)
    if name.endswith("running_var"):
        scaled = np.abs(scaled)
    return np.asarray(np.float32(mean) + scaled, dtype=np.float32)


def check_state_dict(
    model: nn.Module, manifest: Mapping[str, Mapping[str, Any]], only: Sequence[str] = ()
) -> list[Check]:
    """Key set, shapes, dtypes, and which entries are one tensor; of names that begin with one of ``only``, if any.

    Raises:
        ValueError: one of ``only`` begins no name of the manifest.
    """
    state = model.state_dict()
    for prefix in only:
        if not any(name.startswith(prefix) for name in manifest):
            parts = sorted({name.split(".")[0] + "." for name in manifest})
            raise ValueError(f"no key of the manifest begins with {prefix!r}; they begin with {', '.join(parts)}")
    names = [name for name in manifest if chosen(name, only)]
    missing = [name for name in names if name not in state]
    unexpected = [name for name in state if name not in manifest and chosen(name, only)]
    common = [name for name in names if name in state]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(manifest[name]['shape'])}"
        for name in common
        if list(state[name].shape) != list(manifest[name]["shape"])
    ]
    dtypes = [
        f"{name} {_dtype(state[name])} instead of {manifest[name]['dtype']}"
        for name in common
        if _dtype(state[name]) != manifest[name]["dtype"]
    ]
    return [
        _listing("keys missing in the model", missing, f"none of {len(names)}"),
        _listing("keys the release does not have", unexpected, "none"),
        _listing("shapes", shapes, f"{len(common)} equal"),
        _listing("dtypes", dtypes, f"{len(common)} equal"),
        _listing(
            "shared tensors", _sharing_errors(state, {name: manifest[name] for name in names}), "as in the release"
        ),
    ]


def _sharing_errors(state: Mapping[str, Tensor], manifest: Mapping[str, Mapping[str, Any]]) -> list[str]:
    errors = []
    owners: dict[tuple[int, torch.Size], str] = {}
    for name in manifest:
        if name not in state or state[name].numel() == 0:
            continue
        tensor = state[name]
        owner = owners.setdefault((tensor.data_ptr(), tensor.shape), name)
        target = manifest[name].get("shared_with")
        if target is None and owner != name:
            errors.append(f"{name} is the tensor of {owner}, the release has two")
        elif target is not None and (target not in state or state[target].data_ptr() != tensor.data_ptr()):
            errors.append(f"{name} should be the tensor of {target}")
    return errors


def fill_weights(model: nn.Module, manifest: Mapping[str, Mapping[str, Any]], only: Sequence[str] = ()) -> None:
    """Write the formula's values into the model. Entries without a fill keep the model's own constant.

    With ``only``, entries whose names begin with one of them are written, and the tensors that these share.
    """
    state = model.state_dict()
    wanted = {manifest[name].get("shared_with") or name for name in manifest if chosen(name, only)}
    with torch.no_grad():
        for name, entry in manifest.items():
            if name not in wanted or entry["fill"] is None or entry.get("shared_with") is not None:
                continue
            value = formula_weight(entry.get("released", name), entry["shape"], *entry["fill"])
            state[name].copy_(torch.from_numpy(value))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listing(name: str, problems: Sequence[str], fine: str) -> Check:
    shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return Check(name, not problems, f"{len(problems)}: {shown}" if problems else fine)
