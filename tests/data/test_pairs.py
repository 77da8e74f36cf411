"""Pairs of frames as IDOL trains on: windows of their own on videos, two pictures made of one image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fvcore.transforms.transform import CropTransform, HFlipTransform, TransformList

from vis.config import CfgNode
from vis.data.image_mapper import build_mapper
from vis.data.mapper import clip_steps
from vis.data.transforms import ClipAugmentation, Crop, EachFrame, ResizeShortest
from vis.engine import load_cfg

HEIGHT, WIDTH = 720, 1280


@pytest.fixture(scope="module")
def cfg(project_root: Path) -> Callable[..., CfgNode]:
    return lambda name, *options: load_cfg(str(project_root / f"configs/idol/{name}.yaml"), options)


def kinds(transform: TransformList, kind: type) -> list[Any]:
    """The transforms of a kind, however deep."""
    found = []
    for part in transform.transforms:
        found += kinds(part, kind) if isinstance(part, TransformList) else [part] * isinstance(part, kind)
    return found


def test_each_frame_draws_for_itself() -> None:
    step = EachFrame(steps=(Crop(kind="absolute_range", size=(30, 50)),))
    drawn = step.draw([(60, 84), (70, 100), (60, 84)], np.random.default_rng(0))
    windows = [(x.x0, x.y0, x.w, x.h) for x in (kinds(transform, CropTransform)[0] for transform, _ in drawn)]
    assert len(set(windows)) == 3
    assert [size for _, size in drawn] == [(h, w) for _, _, w, h in windows]
    after = ClipAugmentation(steps=(step, ResizeShortest(min_sizes=(40,), max_size=200)))
    transforms = after(60, 84, 3, np.random.default_rng(0))
    shapes = {transform.apply_image(np.zeros((60, 84, 3), np.uint8)).shape for transform in transforms}
    assert all(min(shape[:2]) == 40 for shape in shapes)
    assert len(shapes) > 1


def test_windows_of_a_video_pair(cfg: Callable[..., CfgNode]) -> None:
    """In half of the pairs both frames are cropped, each elsewhere, out of the frame as it is; flips are common."""
    node = cfg("ovis_r50").INPUT
    augmentation = clip_steps(node, flip=node.RANDOM_FLIP)
    cropped = 0
    for seed in range(40):
        pair = augmentation(HEIGHT, WIDTH, 2, np.random.default_rng(seed))
        crops = [kinds(transform, CropTransform) for transform in pair]
        flips = [len(kinds(transform, HFlipTransform)) for transform in pair]
        assert len(crops[0]) == len(crops[1]) <= 1
        assert flips[0] == flips[1]
        if crops[0]:
            cropped += 1
            a, b = crops[0][0], crops[1][0]
            assert (a.orig_w, a.orig_h) == (WIDTH, HEIGHT)
            assert (a.x0, a.y0, a.w, a.h) != (b.x0, b.y0, b.w, b.h)
            assert all(384 <= side <= 600 for side in (a.w, a.h, b.w, b.h))
    assert 10 < cropped < 30


def test_two_pictures_of_an_image(cfg: Callable[..., CfgNode], make_record: Callable[..., dict[str, Any]]) -> None:
    """Size, flip and window of each by themselves; an object that one window misses is absent there."""
    mapper = build_mapper(cfg("coco_r50"), dataset_name="images", still=True)
    left, right = (0, 10, 20, 40), (620, 10, 640, 40)
    record = make_record(1, (480, 640), [[left], [right]])
    samples = [mapper(record, np.random.default_rng(seed)) for seed in range(48)]
    assert all(len(sample["image"]) == 2 for sample in samples)
    sizes = [[tuple(image.shape[1:]) for image in sample["image"]] for sample in samples]
    assert sum(a != b for a, b in sizes) > 24
    assert all(320 <= min(size) <= 640 for pair in sizes for size in pair)
    ids = [[frame.gt_ids.tolist() for frame in sample["instances"]] for sample in samples]
    assert any(-1 in key and key != reference for key, reference in ids)
    sides = [
        [np.sign(x.gt_boxes.tensor[0, 0].item() - x.gt_boxes.tensor[1, 0].item()) for x in sample["instances"]]
        for sample, (key, reference) in zip(samples, ids, strict=True)
        if -1 not in key + reference and len(key) == 2
    ]
    assert len({tuple(pair) for pair in sides}) > 2, "flips are drawn one by one"


def test_released_key(cfg: Callable[..., CfgNode]) -> None:
    assert cfg("ovis_r50", "INPUT.COCO_PRETRAIN", "True").INPUT.COCO_PAIRS is True
    assert cfg("ovis_r50").INPUT.COCO_PAIRS is False
