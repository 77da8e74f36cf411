"""Names of parameters: class heads, constants, and where a backbone sits in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

#: Parameters that hold one row for each class: re-made where the number of classes differs.
CLASS_HEADS = re.compile(
    r"(^|\.)(class_embed\.(.+\.)?(weight|bias)|\w*criterion\.empty_weight"
    r"|box_predictor\.(cls_score|bbox_pred)\.(weight|bias)|mask_head\.predictor\.(weight|bias))$"
)
#: Of these, the ones whose rows are the classes themselves, so that a row can be copied from another label set.
CLASS_ROWS = re.compile(r"(^|\.)class_embed\.(.+\.)?(weight|bias)$")

#: Constants of a configuration and counters that steer nothing: some files have them, some do not.
CONSTANTS = re.compile(
    r"(^|\.)(pixel_mean|pixel_std|relative_position_index|num_batches_tracked|cell_anchors\.\d+)$|\.attn_mask$"
)
#: Constants that the model keeps, and that a file must agree with where it has them.
INDICES = re.compile(r"\.relative_position_index$")


def backbone_prefix(names: Collection[str], model_keys: Collection[str]) -> str | None:
    """Where the model has a backbone with these names, or None.

    The place is the prefix with "backbone" in it under which most of the names are found (``backbone.``,
    ``backbone.bottom_up.``, ``backbone.vit_module.``, ``detr.detr.backbone.0.backbone.``).
    """
    prefixes: Counter[str] = Counter()
    by_ending: dict[str, list[str]] = {}
    for key in model_keys:
        parts = key.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join(parts[:cut]) + "."
            if "backbone" in prefix:
                by_ending.setdefault(key[len(prefix) :], []).append(prefix)
    for key in names:
        prefixes.update(by_ending.get(key, []))
    return max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)), default=None)


def grouped(names: Collection[str]) -> str:
    """Names counted by their first part, or two where all share the first."""
    depth = 2 if len({name.split(".")[0] for name in names}) == 1 else 1
    counts = Counter(".".join(name.split(".")[:depth]) for name in names)
    return ", ".join(f"{head} {count}" for head, count in counts.items())
