"""Files as the releases have them, small: names and kinds from the recorded manifests, values from the names."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

State = dict[str, Tensor]

# Sizes over 16 stand for themselves by a smaller one, the same everywhere; class counts stay.
_KEPT = {20, 21, 25, 26, 40, 41, 80, 81, 92, 1000}
_SMALL = {64: 5, 96: 6, 128: 7, 192: 9, 256: 8, 512: 11, 768: 14, 1024: 15, 1536: 13, 2048: 12, 1370: 10}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "empty_weight", "relative_position_index")


def shrink(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The small shape that stands for a real one."""
    return tuple(n if n <= 16 or n in _KEPT else _SMALL.get(n, 3 + n % 13) for n in shape)


def value_of(name: str, like: Tensor) -> Tensor:
    """A value that only this name has; tables of indices are constants."""
    if like.dtype != torch.float32:
        return torch.arange(like.numel()).reshape(like.shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator)


class Skeleton(nn.Module):
    """A model that is nothing but names: parameters and buffers of zeros; tables of indices have their values."""

    def __init__(self, state: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
        super().__init__()
        made: dict[str, nn.Parameter] = {}
        for name, value in state.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            if last in _BUFFERS:
                module.register_buffer(last, value_of(name, value) if "index" in last else torch.zeros_like(value))
            else:
                made[name] = made[shared[name]] if name in shared else nn.Parameter(torch.zeros_like(value))
                module.register_parameter(last, made[name])


class Release:
    """One released architecture, small."""

    def __init__(self, manifest: Path) -> None:
        with gzip.open(manifest) as file:
            entries: dict[str, dict[str, Any]] = json.load(file)
        kinds = {"float32": torch.float32, "int64": torch.int64}
        self.shared = {name: entry["shared_with"] for name, entry in entries.items() if entry.get("shared_with")}
        self.like = {
            name: torch.empty(shrink(tuple(entry["shape"])), dtype=kinds[entry["dtype"]], device="meta")
            for name, entry in entries.items()
        }

    def without(self, *prefixes: str) -> Release:
        """The same without some parts."""
        other = object.__new__(Release)
        other.shared = self.shared
        other.like = {name: value for name, value in self.like.items() if not name.startswith(prefixes)}
        return other

    def state(self, classes: int | None = None) -> State:
        """Values; ``classes`` rows in the class heads instead of the release's."""
        state = {}
        for name, like in self.like.items():
            if classes is not None and ("class_embed" in name or "empty_weight" in name):
                like = torch.empty((classes, *like.shape[1:]), device="meta")
            state[name] = state[self.shared[name]] if name in self.shared else value_of(name, like)
        return state

    def model(self, classes: int | None = None, **attributes: Any) -> Skeleton:
        """A model with these names; ``attributes`` are set on its class (``WEIGHT_STAGES``)."""
        state = {name: torch.zeros_like(value) for name, value in self.state(classes).items()}
        return type("Skeleton", (Skeleton,), attributes)(state, self.shared)


@pytest.fixture(scope="session")
def release(shared_dir: Path) -> Callable[[str], Release]:
    """``release("dvis_online_r50")``: the architecture of a recorded manifest."""
    read = lru_cache(lambda name: Release(shared_dir / "parity" / f"{name}.manifest.json.gz"))
    return lambda name: read(name).without("~")


def assert_holds(model: nn.Module, expected: Mapping[str, Tensor], skip: tuple[str, ...] = ()) -> None:
    """Every tensor of ``expected`` is in the model, and everything else (but ``skip``) has its initial zeros."""
    for name, value in model.state_dict().items():
        if name in expected:
            assert torch.equal(value, expected[name].to(value.dtype)), name
        elif not name.endswith("relative_position_index") and not name.startswith(skip or ("~",)):
            assert not value.any(), f"{name} was loaded with something"


@pytest.fixture(scope="session")
def holds() -> Callable[..., None]:
    return assert_holds


@pytest.fixture(scope="session")
def small() -> Callable[[Mapping[str, Tensor]], State]:
    """A real state dict with the values of the names, in small shapes."""

    def make(state: Mapping[str, Tensor]) -> State:
        like = {key: torch.empty(shrink(tuple(v.shape)), dtype=v.dtype, device="meta") for key, v in state.items()}
        return {key: value_of(key, value) for key, value in like.items()}

    return make
