"""Names of parameters in files versus names in our models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor

#: Parameters that hold one row for each class: re-made where the number of classes differs.
CLASS_HEADS = re.compile(r"(^|\.)(class_embed\.(.+\.)?(weight|bias)|criterion\.empty_weight)$")

# Buffers that older versions of the models saved; ours are constants of the configuration.
CONSTANTS = re.compile(r"(^|\.)(pixel_mean|pixel_std)$")

# Old name -> name since. From Mask2Former files of before the rename of the queries, and early DVIS files.
_RENAMED = (
    (re.compile(r"(^|\.)static_query\."), r"\1query_feat."),
    (re.compile(r"^offline_tracker\."), "refiner."),
)


def modern_names(state: Mapping[str, Tensor], model_keys: Collection[str]) -> dict[str, Tensor]:
    """Take off the ``module.`` of data-parallel wrappers and replace names of earlier releases.

    A name that the model itself has is left alone.
    """
    wrapped = bool(state) and all(key.startswith("module.") for key in state)
    result = {}
    for key, value in state.items():
        name = key.removeprefix("module.") if wrapped else key
        if name not in model_keys:
            for pattern, replacement in _RENAMED:
                name = pattern.sub(replacement, name)
        result[name] = value
    return result


def backbone_names(state: Mapping[str, Tensor], model_keys: Collection[str]) -> dict[str, Tensor]:
    """Put the names of a backbone alone (``res2.0.conv1.weight``) under where the model has its backbone.

    The place is the prefix with "backbone" in it under which most names of the file are found
    (``backbone.``, ``backbone.bottom_up.``, ``detr.detr.backbone.0.backbone.``). Names that already fit stay.
    """
    prefixes: Counter[str] = Counter()
    by_ending: dict[str, list[str]] = {}
    for key in model_keys:
        parts = key.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join(parts[:cut]) + "."
            if "backbone" in prefix:
                by_ending.setdefault(key[len(prefix) :], []).append(prefix)
    for key in state:
        prefixes.update(by_ending.get(key, []))
    if not prefixes:
        return dict(state)
    best = max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)))
    return {key if key in model_keys else best + key: value for key, value in state.items()}
