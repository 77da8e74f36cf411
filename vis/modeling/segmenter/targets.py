"""Labelled clips as criterions take them."""

from __future__ import annotations

import torch
from torch import Tensor

from vis.modeling.segmenter.frames import pad_masks
from vis.structures import ClipSample, ClipTargets


def check_labels(labels: Tensor, num_classes: int) -> None:
    """A label that the head does not have is a user's mistake; on a GPU it would end the process without a word.

    Raises:
        ValueError: a label is not in 0..num_classes-1.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"the data has instances of class {int(wrong[0])} (counted from 0), but MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"is {num_classes}; leave it out to follow the data set"
        )


def clip_targets(
    sample: ClipSample, *, size: tuple[int, int], num_classes: int, device: torch.device | str
) -> ClipTargets:
    """The instances of a clip, those that are in none of its frames left out.

    Args:
        size: (height, width) that the frames are padded to.

    Raises:
        ValueError: a class that the head does not have.
    """
    frames = sample["instances"]
    ids = torch.stack([frame.gt_ids for frame in frames], dim=1)  # (N, T)
    seen = (ids != -1).any(dim=1)
    labels = frames[0].gt_classes[seen]
    check_labels(labels, num_classes)
    masks = torch.stack(
        [frame.gt_masks.tensor[seen] & (frame.gt_ids[seen] != -1)[:, None, None] for frame in frames], 1
    )
    return ClipTargets(labels.to(device), ids[seen].to(device), pad_masks(masks, size).to(device))
