"""Frames of a labelled clip as detectors take them."""

from __future__ import annotations

import torch
from detectron2.structures import BitMasks, Boxes, Instances

from vis.modeling.segmenter.frames import pad_masks
from vis.modeling.segmenter.targets import check_labels
from vis.structures import ClipSample


def detector_targets(
    sample: ClipSample, *, padded_size: tuple[int, int], num_classes: int, device: torch.device
) -> list[Instances]:
    """Of each frame the instances that are seen in it: ``gt_boxes``, ``gt_classes``, ``gt_masks``, ``gt_ids``.

    Args:
        padded_size: (height, width) of the masks; the image size stays that of the frame.

    Raises:
        ValueError: a class that the detector does not have.
    """
    targets = []
    for frame in sample["instances"]:
        seen = frame.gt_ids != -1
        labels = frame.gt_classes[seen]
        check_labels(labels, num_classes)
        height, width = frame.image_size
        target = Instances((int(height), int(width)))
        target.gt_boxes = Boxes(frame.gt_boxes.tensor[seen].float())
        target.gt_classes = labels
        target.gt_masks = BitMasks(pad_masks(frame.gt_masks.tensor[seen], padded_size))
        target.gt_ids = frame.gt_ids[seen]
        targets.append(target.to(device))
    return targets
