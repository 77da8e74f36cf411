"""Parts that a model has for its training alone: weights with them serve models without them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from vis.checkpoint.sources import Recognised

#: Of a name of such a part, the prefix that the whole part has: heads (``MODEL.HEADS``), BatchFormer
#: (``MODEL.BATCH_FORMER``). Nothing at test time reads them, and other parts do not depend on them.
TRAINING_PARTS = re.compile(r"^(heads\.\w+\.|.*\.transformer\.bf\.)")


def without_training_parts(file: Recognised, own: Collection[str]) -> tuple[Recognised, dict[str, int]]:
    """The file without the training parts that a model with the names ``own`` has nothing of, and what was left out.

    A part that the model has stays whole, so that one of another size is an error as ever.

    Returns:
        The file, and the prefix of each part that was left out -> its number of tensors.
    """
    kept, out = {}, dict[str, int]()
    for name, value in file.state.items():
        found = TRAINING_PARTS.match(name)
        prefix = found.group() if found else ""
        if prefix and not any(other.startswith(prefix) for other in own):
            out[prefix] = out.get(prefix, 0) + 1
        else:
            kept[name] = value
    return dataclasses.replace(file, state=kept) if out else file, out


def left_out(path: str, parts: dict[str, int]) -> str:
    """The line of the log."""
    listed = ", ".join(f"{prefix}* ({count} tensors)" for prefix, count in parts.items())
    return f"{path} has parts for training alone, which this model is without and does not need: {listed}"
