"""Images as clips: large-scale jitter for image pre-training, and pseudo-videos made of copies of one image."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vis.config import CfgNode, declare
from vis.data.frame_sampling import FrameSampler
from vis.data.mapper import ClipMapper, build_clip_mapper, clip_steps
from vis.data.transforms import (
    ClipAugmentation,
    EachFrame,
    FixedSizeCrop,
    Flip,
    ResizeScale,
    SmoothRotation,
    Step,
    one_of,
)

__all__ = ["build_image_mapper", "build_mapper"]

logger = logging.getLogger(__name__)

#: By kind of data set; large-scale jitter; copies of an image; a video clip.
MAPPERS = ("", "coco_instance_lsj", "coco_clip", "ytvis")


@declare
def add_config(cfg: CfgNode) -> None:
    """Keys of the mappers of images."""
    # "" takes what fits each data set: clips of a video, pseudo-videos of an image (large-scale jitter with
    # LSJ_AUG.ENABLED). "coco_instance_lsj", "coco_clip" and "ytvis" ask for one of them for every data set.
    cfg.INPUT.DATASET_MAPPER_NAME = ""
    # Large-scale jitter of "coco_instance_lsj": scale drawn from [MIN_SCALE, MAX_SCALE], then IMAGE_SIZE pixels square.
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0
    # The same, switched on by ENABLED, under the names of the video repositories.
    cfg.INPUT.LSJ_AUG = CfgNode()
    cfg.INPUT.LSJ_AUG.ENABLED = False
    cfg.INPUT.LSJ_AUG.IMAGE_SIZE = 1024
    cfg.INPUT.LSJ_AUG.MIN_SCALE = 0.1
    cfg.INPUT.LSJ_AUG.MAX_SCALE = 2.0
    # Pseudo-videos.
    cfg.INPUT.PSEUDO = CfgNode()
    # Copies of the image; 0 takes INPUT.SAMPLING_FRAME_NUM.
    cfg.INPUT.PSEUDO.SAMPLING_FRAME_NUM = 0
    # Key of released files, without effect: every frame of a pseudo-video is the same image.
    cfg.INPUT.PSEUDO.SAMPLING_FRAME_RANGE = 20
    cfg.INPUT.PSEUDO.AUGMENTATIONS = ["rotation"]
    cfg.INPUT.PSEUDO.MIN_SIZE_TRAIN = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768)
    cfg.INPUT.PSEUDO.MAX_SIZE_TRAIN = 768
    cfg.INPUT.PSEUDO.MAX_SIZE_TRAIN_RANGE = ()
    cfg.INPUT.PSEUDO.MIN_SIZE_TRAIN_SAMPLING = "choice_by_clip"
    cfg.INPUT.PSEUDO.CROP = CfgNode()
    cfg.INPUT.PSEUDO.CROP.ENABLED = False
    cfg.INPUT.PSEUDO.CROP.TYPE = "absolute_range"
    cfg.INPUT.PSEUDO.CROP.SIZE = (384, 600)
    cfg.INPUT.PSEUDO.CROP.EACH_FRAME = False
    # The frames of a clip made of an image are augmented by INPUT's own keys, every one by itself, as if each were a
    # clip (the pairs of IDOL).
    cfg.INPUT.COCO_PAIRS = False


def _large_scale_jitter(cfg: CfgNode, num_frames: int) -> ClipAugmentation:
    node = cfg.INPUT.LSJ_AUG if cfg.INPUT.LSJ_AUG.ENABLED else cfg.INPUT
    steps: list[Step] = [Flip(kind=cfg.INPUT.RANDOM_FLIP)]
    if num_frames > 1 and "rotation" in cfg.INPUT.PSEUDO.AUGMENTATIONS:
        steps.append(SmoothRotation())
    steps.append(ResizeScale(min_scale=node.MIN_SCALE, max_scale=node.MAX_SCALE, target=node.IMAGE_SIZE))
    steps.append(FixedSizeCrop(size=node.IMAGE_SIZE))
    return ClipAugmentation(steps=tuple(steps))


def build_image_mapper(cfg: CfgNode, *, jitter: bool, categories: Sequence[int | None] | None = None) -> ClipMapper:
    """Clips of copies of one image, by large-scale jitter or as pseudo-videos (crop, resize, flip, smooth rotation)."""
    num_frames = cfg.INPUT.PSEUDO.SAMPLING_FRAME_NUM or cfg.INPUT.SAMPLING_FRAME_NUM
    flip = cfg.INPUT.RANDOM_FLIP
    if jitter:
        augmentation = _large_scale_jitter(cfg, num_frames)
    elif cfg.INPUT.COCO_PAIRS:
        of_frame = clip_steps(cfg.INPUT, flip=flip, one_frame=True)
        augmentation = ClipAugmentation(steps=(EachFrame(steps=of_frame.steps),))
    else:
        augmentation = clip_steps(cfg.INPUT.PSEUDO, flip=flip)
    return ClipMapper(
        frames=FrameSampler(num_frames=num_frames), augmentation=augmentation, categories=categories, still=True
    )


def build_mapper(
    cfg: CfgNode, *, dataset_name: str, still: bool, categories: Sequence[int | None] | None = None
) -> ClipMapper:
    """The mapper for one training data set.

    Args:
        dataset_name: for the log.
        still: the data set holds images (every record has one frame).
        categories: see :class:`ClipMapper`.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    one_of(name, MAPPERS, "INPUT.DATASET_MAPPER_NAME")
    if name in ("coco_instance_lsj", "coco_clip") and not still:
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME {name!r} makes clips of images, but {dataset_name!r} holds videos. "
            f"Leave the key empty: each data set then gets the mapper that fits it."
        )
    if name == "ytvis" or not still:
        logger.info("%s: clips of %d frame(s)", dataset_name, cfg.INPUT.SAMPLING_FRAME_NUM)
        return build_clip_mapper(cfg, categories=categories)
    jitter = name == "coco_instance_lsj" or (not name and cfg.INPUT.LSJ_AUG.ENABLED)
    mapper = build_image_mapper(cfg, jitter=jitter, categories=categories)
    kind = (
        "large-scale jitter" if jitter else "frames augmented one by one" if cfg.INPUT.COCO_PAIRS else "pseudo-videos"
    )
    logger.info("%s: images as clips of %d frame(s), %s", dataset_name, mapper.frames.num_frames, kind)
    return mapper
