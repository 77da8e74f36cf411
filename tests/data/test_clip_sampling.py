"""Clips as the methods of this project sample them, and joint training on videos and images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from vis.config import CfgNode, get_cfg
from vis.data.frame_sampling import FrameSampler, build_frame_sampler
from vis.data.loaders import build_train_loader

MakeRecord = Callable[..., dict[str, Any]]


def sampler(frames: int, near: int, **keys: Any) -> FrameSampler:
    cfg = get_cfg()
    cfg.INPUT.SAMPLING_FRAME_NUM, cfg.INPUT.SAMPLING_FRAME_RANGE = frames, near
    for key, value in keys.items():
        cfg.INPUT[key] = value
    return build_frame_sampler(cfg)


def clips(frames: FrameSampler, length: int, count: int = 400) -> list[list[int]]:
    return [frames(length, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize(("frames", "near"), [(5, 2), (21, 10), (15, 7), (11, 5)])
def test_stages_of_dvis_take_windows(frames: int, near: int) -> None:
    """DVIS online 5/2 and offline 21/10, DVIS++ offline 15/7, CTVIS with ViT-L 11/5."""
    starts = Counter()
    for clip in clips(sampler(frames, near), frames + 3):
        assert clip == list(range(clip[0], clip[0] + frames))
        starts[clip[0]] += 1
    assert set(starts) == {0, 1, 2, 3}  # the last start too
    assert min(starts.values()) > 60


def test_offline_clips_run_backwards_in_half_of_the_cases() -> None:
    drawn = clips(sampler(21, 10, REVERSE_AGU=True), 30)
    backwards = [clip for clip in drawn if clip[0] > clip[-1]]
    assert all(np.diff(clip).tolist() in ([1] * 20, [-1] * 20) for clip in drawn)
    assert 160 < len(backwards) < 240


def test_a_short_video_never_jumps_in_time() -> None:
    for clip in clips(sampler(21, 10, REVERSE_AGU=True), 4, 60):
        steps = set(np.sign(np.diff(clip)).tolist())
        assert steps <= {0, 1} or steps <= {0, -1}
        assert set(clip) == {0, 1, 2, 3}


def test_ctvis_draws_around_a_reference_frame() -> None:
    """10/15: ten different frames in the order of time, all within 15 of one of them."""
    spans = []
    for clip in clips(sampler(10, 15), 80):
        assert clip == sorted(set(clip))
        assert len(clip) == 10
        assert any(max(abs(frame - reference) for frame in clip) <= 15 for reference in clip)
        spans.append(clip[-1] - clip[0])
    assert max(spans) > 20
    assert min(spans) < 20
    short = clips(sampler(10, 15), 6, 50)
    assert all(len(clip) == 10 and set(clip) == set(range(6)) and clip == sorted(clip) for clip in short)


@pytest.fixture
def joint(make_record: MakeRecord) -> Iterator[CfgNode]:
    """Images of classes b, x and videos of classes a, b: three quarters of the clips are to be of the images."""
    images = [make_record(number, (40, 56), [[(5, 5, 40, 30)], [(8, 20, 30, 36)]]) for number in (1, 2, 3)]
    videos = [make_record(number, (40, 56), [[(5 + t, 5, 40, 30) for t in range(6)]]) for number in (11, 12)]
    for name, records, classes in (("stills", images, ["b", "x"]), ("clips", videos, ["a", "b"])):
        DatasetCatalog.register(name, lambda records=records: records)
        MetadataCatalog.get(name).set(thing_classes=classes)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.DATASET_RATIO = ("stills", "clips"), [3.0, 1.0]
    cfg.INPUT.SAMPLING_FRAME_NUM, cfg.INPUT.SAMPLING_FRAME_RANGE = 5, 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.PSEUDO.MIN_SIZE_TRAIN = (32,), (24,)
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.DEVICE = 2, 0, "cpu"
    yield cfg
    for name in ("stills", "clips"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_images_and_videos_together(joint: CfgNode) -> None:
    """Clips of both kinds have the same length; sizes, odds and classes are as asked for."""
    of_images = 0
    batches = list(islice(build_train_loader(joint), 60))
    for batch in batches:
        heights = {int(sample["image"][0].shape[1]) for sample in batch}
        assert len(heights) == 1  # the batch of a process is of one data set
        still = heights == {24}
        of_images += still
        for sample in batch:
            assert len(sample["image"]) == len(sample["instances"]) == 5
            classes = {tuple(frame.gt_classes.tolist()) for frame in sample["instances"]}
            assert classes == ({(1,)} if still else {(0,)})  # "b" of the images is the second class of the videos
            assert (sample["video_id"] < 10) == still
            turned = {int(frame.gt_masks.tensor.sum()) for frame in sample["instances"]}
            assert not still or len(turned) > 1 or not torch.equal(sample["image"][0], sample["image"][-1])
    assert 35 <= of_images <= 55


def test_images_and_videos_together_resume_exactly(joint: CfgNode) -> None:
    """Which set a batch comes from, and what is drawn in it, follows from the iteration alone."""
    whole = list(islice(build_train_loader(joint), 24))
    again = list(islice(build_train_loader(joint, start_iter=15), 9))
    for before, after in zip(whole[15:], again, strict=True):
        for one, other in zip(before, after, strict=True):
            assert (one["video_id"], one["frame_ids"]) == (other["video_id"], other["frame_ids"])
            assert all(torch.equal(a, b) for a, b in zip(one["image"], other["image"], strict=True))
