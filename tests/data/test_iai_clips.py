"""Clips of IAI: steps through the annotated frames, boxes of two drawn sides, pairs of MaskTrack R-CNN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vis.config import get_cfg
from vis.data.frame_sampling import FrameSampler
from vis.data.mapper import build_clip_mapper
from vis.data.transforms import ClipAugmentation, ResizeShortest

MakeRecord = Callable[..., dict[str, Any]]
A, B = (2, 3, 12, 13), (20, 5, 30, 21)


def clips(length: int, count: int = 600, **options: Any) -> list[list[int]]:
    sampler = FrameSampler(num_frames=5, step_max=3, **options)
    return [sampler(length, np.random.default_rng(seed)) for seed in range(count)]


def test_steps_of_one_to_three_frames() -> None:
    drawn = clips(40)
    steps = Counter(int(step) for clip in drawn for step in np.diff(clip))
    assert set(steps) == {1, 2, 3}
    assert min(steps.values()) > 0.3 * 4 * 600, "uniform where nothing is near the end"
    assert {clip[-1] - clip[0] for clip in drawn} == set(range(4, 13))
    assert {clip[0] for clip in drawn} == set(range(36)), "0 to the length less 5"


def test_steps_near_the_end_leave_room_for_the_rest() -> None:
    assert clips(5, 20) == [[0, 1, 2, 3, 4]] * 20
    drawn = clips(7)
    assert all(clip == sorted(set(clip)) and clip[-1] < 7 for clip in drawn)
    # a start at 2 leaves nothing to choose, one at 0 all 15 choices of 4 of the 6 others
    assert {tuple(clip) for clip in drawn if clip[0] == 2} == {(2, 3, 4, 5, 6)}
    assert len({tuple(clip) for clip in drawn if clip[0] == 0}) == 15


@pytest.mark.parametrize(("length", "expected"), [(1, [0] * 5), (2, [0, 1, 0, 1, 0]), (3, [0, 1, 2, 0, 1])])
def test_short_videos_start_over(length: int, expected: list[int]) -> None:
    assert clips(length, 3) == [expected] * 3


def config(**keys: Any) -> Any:
    cfg = get_cfg()
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    for key, value in keys.items():
        cfg.INPUT[key] = value
    return cfg


def test_only_frames_with_an_object(make_record: MakeRecord) -> None:
    """Frame 1 has a crowd alone, frame 3 nothing, frame 4 a box without width."""
    record = make_record(
        1, (27, 45), [[A, None, B, None, (3, 3, 4, 9), A], [None, A, None, None, None, None]], crowds=(1,)
    )
    record["annotations"][0]["bboxes"][4] = [3, 3, 0.5, 6]
    mapper = build_clip_mapper(config(SAMPLING_FRAME_NUM=5, SAMPLING_STEP_MAX=3, SAMPLING_ANNOTATED_ONLY=True))
    assert mapper.annotated_frames(record) == [0, 2, 5]
    sample = mapper(record, np.random.default_rng(0))
    assert sample["frame_ids"] == [0, 2, 5, 0, 2]
    assert [frame.gt_ids.tolist() for frame in sample["instances"]] == [[0]] * 5
    assert mapper.usable(record)
    record["annotations"][0]["bboxes"] = [None] * 6
    assert not mapper.usable(record)
    cfg = config(SAMPLING_ANNOTATED_ONLY=True)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    with pytest.raises(ValueError, match="set DATALOADER.FILTER_EMPTY_ANNOTATIONS True"):
        build_clip_mapper(cfg)


def test_pairs_of_masktrack(make_record: MakeRecord) -> None:
    """Any two annotated frames of a video, either of them the key frame."""
    record = make_record(1, (27, 45), [[A] * 7 + [None, B]])
    keys = {"SAMPLING_FRAME_NUM": 2, "SAMPLING_FRAME_RANGE": 10000, "SAMPLING_FRAME_SHUFFLE": True}
    mapper = build_clip_mapper(config(SAMPLING_ANNOTATED_ONLY=True, **keys))
    pairs = {tuple(mapper._picks(record, np.random.default_rng(seed))) for seed in range(900)}
    frames = [0, 1, 2, 3, 4, 5, 6, 8]
    assert pairs == {(a, b) for a in frames for b in frames if a != b}


def sizes(sampling: str, frame: tuple[int, int], count: int = 40, **options: Any) -> list[list[tuple[int, ...]]]:
    step = ResizeShortest(min_sizes=(36, 48), max_size=64, sampling=sampling, max_sizes=(64, 96), **options)
    image = np.zeros((*frame, 3), dtype=np.uint8)
    drawn = [ClipAugmentation(steps=(step,))(*frame, 5, np.random.default_rng(seed)) for seed in range(count)]
    return [[transform.apply_image(image).shape[:2] for transform in each] for each in drawn]


def test_box_of_two_drawn_sides() -> None:
    """IAI's range of scales: long edge in [64, 96], short edge in [36, 48], apart; a picture is fitted into the box."""
    wide = sizes("range_by_clip", (72, 288))  # 1 : 4, so that the long edge decides
    assert all(len(set(clip)) == 1 for clip in wide)
    assert {clip[0][1] for clip in wide} <= set(range(64, 97))
    assert len({clip[0] for clip in wide}) > 15
    square = sizes("range_by_clip", (72, 72))  # here the short one
    assert {clip[0][0] for clip in square} <= set(range(36, 49))
    portrait = sizes("range_by_clip", (288, 72))
    assert all(64 <= clip[0][0] <= 96 for clip in portrait), "the longer edge, whichever it is"
    assert any(len(set(clip)) > 3 for clip in sizes("range", (72, 288)))


def test_a_fixed_box() -> None:
    """640 x 360, as IAI reads videos: 1280 x 720 and 640 x 480."""
    step = ResizeShortest(min_sizes=(360,), max_size=640)
    for frame, expected in (((720, 1280), (360, 640)), ((480, 640), (360, 480)), ((720, 1920), (240, 640))):
        drawn = step.draw([frame] * 2, np.random.default_rng(0))
        assert [size for _, size in drawn] == [expected] * 2


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match="INPUT.SAMPLING_STEP_MAX is -1"):
        FrameSampler(num_frames=5, step_max=-1)
    with pytest.raises(ValueError, match="INPUT.MAX_SIZE_TRAIN_RANGE is .960, 640."):
        ResizeShortest(min_sizes=(360,), max_size=640, max_sizes=(960, 640))
