"""From a record of a data set to a training sample: choose frames, decode only those, transform, bring into slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from fvcore.transforms.transform import TransformList
from torch import Tensor

from vis.config import CfgNode, declare
from vis.data.color import COLOR_KINDS
from vis.data.frame_reader import FrameSource, frame_source
from vis.data.frame_sampling import FrameSampler, build_frame_sampler
from vis.data.transforms import (
    ClipAugmentation,
    Color,
    Crop,
    EachFrame,
    Flip,
    RandomApply,
    ResizeShortest,
    SmoothRotation,
    Step,
    one_of,
)
from vis.structures import ClipSample
from vis.structures.polygons import segmentation_to_mask

__all__ = ["ClipMapper", "build_clip_mapper", "clip_steps"]

# Before the random crop the shorter edge is brought to one of these (DETR's recipe, which the VIS family kept).
_CROP_RESIZE = ResizeShortest(min_sizes=(400, 500, 600), max_size=1333, sampling="choice_by_clip")


@declare
def add_config(cfg: CfgNode) -> None:
    """Keys of the augmentation of video clips; MIN_SIZE_TRAIN, MAX_SIZE_TRAIN and CROP.ENABLED are detectron2's."""
    # "choice" and "range" draw a size for every frame, "choice_by_clip" and "range_by_clip" one for the clip.
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice_by_clip"
    # Two sizes: the bound of the longer edge is drawn too, uniform between them, instead of MAX_SIZE_TRAIN; as often as
    # the shorter edge is.
    cfg.INPUT.MAX_SIZE_TRAIN_RANGE = ()
    # "none", "horizontal" and "vertical" (every frame by itself), "flip_by_clip" (horizontally, the whole clip).
    cfg.INPUT.RANDOM_FLIP = "flip_by_clip"
    # Any of "brightness", "contrast", "saturation", "rotation".
    cfg.INPUT.AUGMENTATIONS = []
    # With CROP.ENABLED, half of the clips are cropped: height and width each uniform in SIZE.
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = (384, 600)
    # True: a window for every frame, out of the frame as it is (IDOL). False: one for the clip, after a resize.
    cfg.INPUT.CROP.EACH_FRAME = False


def clip_steps(node: CfgNode, *, flip: str, one_frame: bool = False) -> ClipAugmentation:
    """Crop, resize, flip, colours and rotation, in this order, from ``cfg.INPUT`` or ``cfg.INPUT.PSEUDO``.

    With ``one_frame`` for clips of one frame, where a window for each is one for all.
    """
    steps: list[Step] = []
    if node.CROP.ENABLED:
        crop = Crop(kind=node.CROP.TYPE, size=tuple(node.CROP.SIZE))
        each = node.CROP.EACH_FRAME and not one_frame
        cropped: tuple[Step, ...] = (EachFrame(steps=(crop,)),) if each else (_CROP_RESIZE, crop)
        steps.append(RandomApply(steps=cropped, probability=0.5))
    min_sizes = node.MIN_SIZE_TRAIN
    steps.append(
        ResizeShortest(
            min_sizes=(min_sizes,) if isinstance(min_sizes, int) else tuple(min_sizes),
            max_size=node.MAX_SIZE_TRAIN,
            max_sizes=tuple(node.MAX_SIZE_TRAIN_RANGE),
            sampling=node.MIN_SIZE_TRAIN_SAMPLING,
        )
    )
    steps.append(Flip(kind=flip))
    for name in node.AUGMENTATIONS:
        one_of(name, (*COLOR_KINDS, "rotation"), "INPUT.AUGMENTATIONS")
    steps.extend(Color(kind=kind) for kind in COLOR_KINDS if kind in node.AUGMENTATIONS)
    if "rotation" in node.AUGMENTATIONS:
        steps.append(SmoothRotation())
    return ClipAugmentation(steps=tuple(steps))


def _decode_mask(record: Mapping[str, Any], annotation: Mapping[str, Any], frame: int) -> np.ndarray:
    """The mask of one instance in one frame, (H, W) uint8 of 0 and 1."""
    try:
        mask = segmentation_to_mask(annotation["segmentations"][frame], record["height"], record["width"])
    except ValueError as error:
        raise ValueError(
            f"{record.get('json_file') or 'The annotation file'}: annotation {annotation['id']} of video "
            f"{record['video_id']}, frame {frame}: {error}. tools/check_dataset.py lists all problems of the file."
        ) from error
    return mask.view(np.uint8)


def _boxes_of(masks: np.ndarray) -> np.ndarray:
    """Tight boxes (N, 4) float32 x0 y0 x1 y1, upper ends exclusive, of (N, H, W) masks; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(columns):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """One tensor per array; arrays of one size become views of one block, which crosses processes as one piece."""
    if len({array.shape for array in arrays}) == 1:
        return list(torch.from_numpy(np.stack(arrays)))
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


class ClipMapper:
    """A training sample of one video (or of copies of one image).

    Only the chosen frames are read and only their masks decoded, after the choice. Rules of the Mask2Former family,
    with the class of an absent instance kept:

    - a slot for every instance, crowds left out, that is seen in one of the frames: the same slots in the same order in
      each frame;
    - ``gt_ids`` is the instance's index among the annotations of its video, -1 in a frame where it is absent or has
      lost its last pixel (resized or cropped away);
    - a slot that is -1 in every frame is removed; a clip may end up with no slot at all;
    - boxes are the tight boxes of the transformed masks.

    Args:
        frames: chooses frames.
        augmentation: gives one transform per frame.
        categories: for each contiguous class of the data set the class to train as, None to leave such instances out;
            by default every class is kept as it is.
        annotated_only: clips are made of the frames alone in which an instance can be trained on, that is one with a
            box of a pixel at least.
        still: the record is an image: ``frames.num_frames`` copies of it make the clip.
    """

    def __init__(
        self,
        *,
        frames: FrameSampler,
        augmentation: ClipAugmentation,
        categories: Sequence[int | None] | None = None,
        annotated_only: bool = False,
        still: bool = False,
    ) -> None:
        self.frames = frames
        self.augmentation = augmentation
        self.categories = categories
        self.annotated_only = annotated_only
        self.still = still

    def category(self, annotation: Mapping[str, Any]) -> int | None:
        """The class to train an annotation as; None where it has none, or where it is a crowd."""
        if annotation.get("iscrowd", 0):
            return None
        category = annotation["category_id"]
        return category if self.categories is None else self.categories[category]

    def usable(self, record: Mapping[str, Any]) -> bool:
        """Whether any instance of the record can be trained on."""
        if self.annotated_only:
            return bool(self.annotated_frames(record))
        return any(
            self.category(annotation) is not None and any(_seen(annotation, frame) for frame in range(record["length"]))
            for annotation in record.get("annotations") or ()
        )

    def annotated_frames(self, record: Mapping[str, Any]) -> list[int]:
        """The frames in which an instance can be trained on that is a pixel wide and high at least."""
        usable = [each for each in record.get("annotations") or () if self.category(each) is not None]
        return [frame for frame in range(record["length"]) if any(_valid(each, frame) for each in usable)]

    def _picks(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[int]:
        if not self.annotated_only:
            return self.frames(record["length"], rng)
        frames = self.annotated_frames(record)
        return [frames[pick] for pick in self.frames(len(frames), rng)]

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> ClipSample:
        """The sample. All randomness is drawn from ``rng``.

        Raises:
            FileNotFoundError, ValueError: a frame is missing or damaged, or does not have the size that the annotation
                file gives; a mask does not have the size of its video.
        """
        count = self.frames.num_frames
        picks = [0] * count if self.still else self._picks(record, rng)
        transforms = self.augmentation(record["height"], record["width"], count, rng)
        source = frame_source(record)
        present = self._present(record, picks)
        images, masks = self._apply(record, source, picks, present, transforms)
        return ClipSample(
            image=_tensors(images),
            instances=self._instances(record, picks, present, masks),
            height=record["height"],
            width=record["width"],
            video_id=record["video_id"],
            # Copies of an image are frames of a made-up video.
            frame_ids=list(range(count)) if self.still else picks,
            length=count if self.still else record["length"],
            file_names=[source.file_names[frame] for frame in picks],
        )

    def _present(self, record: Mapping[str, Any], picks: Sequence[int]) -> list[int]:
        """Indices of the annotations that are seen in one of the frames, in the order of the file."""
        return [
            index
            for index, annotation in enumerate(record.get("annotations") or ())
            if self.category(annotation) is not None and any(_seen(annotation, frame) for frame in picks)
        ]

    def _apply(
        self,
        record: Mapping[str, Any],
        source: FrameSource,
        picks: Sequence[int],
        present: Sequence[int],
        transforms: Sequence[TransformList],
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """T pictures (3, H, W) uint8 and T stacks of masks (N, H, W) bool, transformed."""
        images, stacks = [], []
        last, frame, decoded = -1, np.empty(0), []
        for pick, transform in zip(picks, transforms, strict=True):
            if pick != last:  # copies of one frame are decoded once
                last, frame = pick, source.read(pick)
                decoded = [_mask_or_none(record, record["annotations"][index], pick) for index in present]
            image = transform.apply_image(frame)
            stack = np.zeros((len(present), *image.shape[:2]), dtype=bool)
            for slot, mask in enumerate(decoded):
                if mask is not None:
                    stack[slot] = transform.apply_segmentation(mask)
            images.append(np.ascontiguousarray(image.transpose(2, 0, 1)))
            stacks.append(stack)
        return images, stacks

    def _instances(
        self, record: Mapping[str, Any], picks: Sequence[int], present: Sequence[int], masks: Sequence[np.ndarray]
    ) -> list[Instances]:
        visible = np.stack([stack.any(axis=(1, 2)) for stack in masks])  # (T, N)
        kept = np.flatnonzero(visible.any(axis=0))
        slots = np.asarray(present, dtype=np.int64)[kept]
        classes = np.array([self.category(record["annotations"][slot]) for slot in slots], dtype=np.int64)
        ids = np.where(visible[:, kept], slots, -1)
        stacks = [stack[kept] for stack in masks]
        rows = zip(
            _tensors([classes] * len(picks)),
            _tensors(list(ids)),
            _tensors(stacks),
            _tensors([_boxes_of(stack) for stack in stacks]),
            strict=True,
        )
        result = []
        for gt_classes, gt_ids, gt_masks, gt_boxes in rows:
            instances = Instances((gt_masks.shape[1], gt_masks.shape[2]))
            instances.gt_classes = gt_classes
            instances.gt_ids = gt_ids
            instances.gt_masks = BitMasks(gt_masks)
            instances.gt_boxes = Boxes(gt_boxes)
            result.append(instances)
        return result


def _seen(annotation: Mapping[str, Any], frame: int) -> bool:
    """An object counts in a frame if it has both a mask and, where the file gives boxes, a box there."""
    boxes = annotation.get("bboxes")
    return bool(annotation["segmentations"][frame]) and (boxes is None or bool(boxes[frame]))


def _valid(annotation: Mapping[str, Any], frame: int) -> bool:
    boxes = annotation.get("bboxes")
    return _seen(annotation, frame) and (boxes is None or min(boxes[frame][2:]) >= 1)


def _mask_or_none(record: Mapping[str, Any], annotation: Mapping[str, Any], frame: int) -> np.ndarray | None:
    return _decode_mask(record, annotation, frame) if _seen(annotation, frame) else None


def build_clip_mapper(cfg: CfgNode, *, categories: Sequence[int | None] | None = None) -> ClipMapper:
    """The mapper of video data sets that ``cfg.INPUT`` describes.

    Raises:
        ValueError: keys out of range, or clips of annotated frames of videos that may have none.
    """
    if cfg.INPUT.SAMPLING_ANNOTATED_ONLY and not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        raise ValueError(
            "INPUT.SAMPLING_ANNOTATED_ONLY True takes the frames with an object alone, so that videos without any have "
            "to be left out: set DATALOADER.FILTER_EMPTY_ANNOTATIONS True."
        )
    return ClipMapper(
        frames=build_frame_sampler(cfg),
        augmentation=clip_steps(cfg.INPUT, flip=cfg.INPUT.RANDOM_FLIP),
        categories=categories,
        annotated_only=cfg.INPUT.SAMPLING_ANNOTATED_ONLY,
    )
