"""Identities of a training clip (Zhu et al., "Instance As Identity", ECCV 2022, sections 3.1 and 3.3).

Every instance of a clip has a channel, in which its mask is written to the identity bank. The id head is to name that
channel, and in the frame in which the instance is seen for the first time "new", the last of its N channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipIdentities:
    """Identities of the n instances of a clip of T frames.

    Attributes:
        channels: (n,) int64, of the identity bank; -1 for an instance that is in no frame, or that has no channel
            since there are more instances than channels: it is left out everywhere.
        visible: (T, n) bool, in the frame and with a channel.
        head: (T, n) int64, what the id head is to name; of no meaning where not visible.
        new: (T,) bool, an instance is seen for the first time.
    """

    channels: Tensor
    visible: Tensor
    head: Tensor
    new: Tensor


def clip_identities(gt_ids: Tensor, num_ids: int, generator: torch.Generator | None = None) -> ClipIdentities:
    """The identities of a clip.

    Of more than N - 1 instances those seen in most frames have a channel, of equals those with the lower ids.

    Args:
        gt_ids: (T, n) int64, one column for each instance, -1 where it is absent.
        num_ids: N channels of the id head: N - 1 instances and "new".
        generator: draws the channels at random, so that all of them are trained; None: in the order of the ids, as
            released.
    """
    length, count = gt_ids.shape
    visible = gt_ids != -1
    names = gt_ids.amax(dim=0) if length else gt_ids.new_full((count,), -1)
    seen = (names != -1).nonzero()[:, 0]
    ascending = seen[names[seen].argsort(stable=True)]
    if len(ascending) > num_ids - 1:
        frames = visible[:, ascending].sum(dim=0)
        most = frames.argsort(descending=True, stable=True)[: num_ids - 1].sort().values
        logger.debug("a clip of %d instances: %d of them are left out", len(ascending), len(ascending) - len(most))
        ascending = ascending[most]
    order = torch.arange(len(ascending))
    if generator is not None:
        order = torch.randperm(num_ids - 1, generator=generator)[: len(ascending)]
    channels = torch.full((count,), -1, dtype=torch.int64)
    channels[ascending] = order
    visible = visible & (channels != -1)
    earlier = visible.long().cumsum(dim=0) - visible.long()
    fresh = visible & (earlier == 0)
    head = torch.where(fresh, torch.tensor(num_ids - 1), channels.expand(length, -1))
    return ClipIdentities(channels, visible, head, fresh.any(dim=1))


def paint(masks: Tensor, channels: Tensor, num_ids: int) -> Tensor:
    """The map of identities of a frame: each pixel's channel, that of the smaller mask where masks overlap.

    Args:
        masks: (n, H, W) bool; channels: (n,) int64.

    Returns:
        (H, W) uint8, ``num_ids`` where no mask is.
    """
    labels = torch.full(masks.shape[1:], num_ids, dtype=torch.uint8, device=masks.device)
    areas = masks.flatten(1).sum(dim=1).tolist()
    # The last to be written wins; of equal masks the first.
    for row in sorted(range(len(masks)), key=lambda i: (areas[i], i), reverse=True):
        labels[masks[row]] = int(channels[row])
    return labels


def identity_maps(
    instances: Sequence[Instances], identities: ClipIdentities, num_ids: int, padded: tuple[int, int]
) -> Tensor:
    """(T, H, W) uint8 maps of a clip at the padded size; what was padded is background."""
    maps = []
    for t, of_frame in enumerate(instances):
        rows = identities.visible[t].nonzero()[:, 0]
        masks = _padded(of_frame.gt_masks.tensor[rows], padded)
        maps.append(paint(masks, identities.channels[rows], num_ids))
    return torch.stack(maps)


def frame_targets(
    instances: Instances, identities: ClipIdentities, frame: int, padded: tuple[int, int], device: torch.device
) -> Instances:
    """What the image model is to find in a frame of the clip: visible instances, masks at the padded size."""
    rows = identities.visible[frame].nonzero()[:, 0]
    height, width = instances.image_size
    targets = Instances((int(height), int(width)))
    targets.gt_boxes = Boxes(instances.gt_boxes.tensor[rows].to(device))
    targets.gt_classes = instances.gt_classes[rows].to(device)
    targets.gt_masks = BitMasks(_padded(instances.gt_masks.tensor[rows], padded).to(device))
    targets.gt_head_ids = identities.head[frame, rows].to(device)
    return targets


def _padded(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, H, W) -> (n, *size), what is new is of no instance."""
    return F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
