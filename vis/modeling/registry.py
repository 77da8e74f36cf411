"""Registries of the parts, and a look-up whose error names the closest known part."""

from __future__ import annotations

from typing import Any

from fvcore.common.registry import Registry

from vis.config import closest

PIXEL_DECODER_REGISTRY = Registry("PIXEL_DECODER")
TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
HEAD_REGISTRY = Registry("HEAD")
TRACKER_REGISTRY = Registry("TRACKER")
REFINER_REGISTRY = Registry("REFINER")
DETECTOR_REGISTRY = Registry("DETECTOR")


def lookup(registry: Registry, name: str, key: str) -> Any:
    """The object registered as ``name``; ``key`` is the config key it came from.

    Raises:
        ValueError: the name is not registered.
    """
    known = [entry for entry, _ in registry]
    if name not in known:
        raise ValueError(f"{key} is {name!r}, which is not known.{closest(name, known)} Known: {sorted(known)}")
    return registry.get(name)
