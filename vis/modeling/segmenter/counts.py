"""Numbers of instances of labelled clips: what losses will be divided by, known before anything is computed.

A model's ``target_counts(samples)`` gives them by the names under which its losses ask
:func:`~vis.layers.effective_batch.effective_mean` for them, or None where they depend on more than the targets. Where
gradients are accumulated, the trainer then need not run every part of a batch forward once more to count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vis.layers.batch_former import BatchFormers
from vis.structures import ClipSample


def seen_in_frames(samples: Sequence[ClipSample]) -> int:
    """Instances of all frames, each counted in every frame that shows it."""
    return sum(int((frame.gt_ids != -1).sum()) for sample in samples for frame in sample["instances"])


def seen_in_clip(sample: ClipSample) -> int:
    """Instances that are in at least one frame of a clip."""
    ids = torch.stack([frame.gt_ids for frame in sample["instances"]], dim=1)
    return int((ids != -1).any(dim=1).sum())


def only_targets_count(model: nn.Module) -> bool:
    """False where heads count matched queries, or a second stream counts every target twice."""
    heads: Any = getattr(model, "heads", None)
    return not heads and not any(isinstance(module, BatchFormers) for module in model.modules())
