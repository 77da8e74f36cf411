"""Names of parameters: class heads, constants, and where a backbone sits in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

# Pattern of the layers whose rows are classes -> rows of each class, rows at the end that are of none (None: as the
# source of the file says).
_CLASS_ROWS: tuple[tuple[re.Pattern[str], int, int | None], ...] = (
    (re.compile(r"(^|\.)class_embed\.(.+\.)?(weight|bias)$"), 1, None),
    (re.compile(r"fcos_head\.cls_logits\.(weight|bias)$"), 1, 0),
    (re.compile(r"box_predictor\.cls_score\.(weight|bias)$"), 1, 1),
    (re.compile(r"box_predictor\.bbox_pred\.(weight|bias)$"), 4, 0),
    (re.compile(r"mask_head\.predictor\.(weight|bias)$"), 1, 0),
)
_EMPTY_WEIGHT = re.compile(r"(^|\.)\w*criterion\.empty_weight$")
#: Layers with channels for the ids of instances (IAI): re-made where MODEL.IAI.NUM_IDS differs.
ID_CHANNELS = re.compile(
    r"(fcos_head\.id_logits\.(weight|bias)|association\.id_bank\.weight|roi_heads\.id_head\.predictor\.(weight|bias))$"
)

#: Constants of a configuration and counters that steer nothing: some files have them, some do not.
CONSTANTS = re.compile(
    r"(^|\.)(pixel_mean|pixel_std|relative_position_index|num_batches_tracked|cell_anchors\.\d+)$|\.attn_mask$"
)
#: Constants that the model keeps, and that a file must agree with where it has them.
INDICES = re.compile(r"\.relative_position_index$")


class ClassLayout(NamedTuple):
    """How the rows of a layer are classes: ``each`` of every class, in order, then ``none`` that are of no class."""

    each: int
    none: int

    def classes(self, rows: int) -> int:
        """How many classes these rows are of."""
        return (rows - self.none) // self.each


def class_layout(name: str, no_object: bool) -> ClassLayout | None:
    """Of a layer whose rows are classes, so that it is re-made where the classes differ; None of any other.

    Args:
        no_object: the last row of a query's class head is "no object".
    """
    if _EMPTY_WEIGHT.search(name):
        return ClassLayout(1, int(no_object))
    for pattern, each, none in _CLASS_ROWS:
        if pattern.search(name):
            return ClassLayout(each, int(no_object) if none is None else none)
    return None


def is_constant_of_classes(name: str) -> bool:
    """Whether the rows are of classes, but nothing that was learnt of them."""
    return _EMPTY_WEIGHT.search(name) is not None


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
