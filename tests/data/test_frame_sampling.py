"""Which frames make a clip."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vis.data.frame_sampling import FrameSampler


def clips(sampler: FrameSampler, length: int, count: int = 300) -> list[list[int]]:
    return [sampler(length, np.random.default_rng(seed)) for seed in range(count)]


def test_one_frame_is_uniform() -> None:
    drawn = Counter(clip[0] for clip in clips(FrameSampler(num_frames=1), 5, 1000))
    assert set(drawn) == set(range(5))
    assert min(drawn.values()) > 150


def test_contiguous_window_reaches_both_ends() -> None:
    drawn = clips(FrameSampler(num_frames=5, frame_range=2), 9)
    assert all(clip == list(range(clip[0], clip[0] + 5)) for clip in drawn)
    assert {clip[0] for clip in drawn} == {0, 1, 2, 3, 4}  # 4 = L - T is the last start


def test_window_of_the_whole_video() -> None:
    assert clips(FrameSampler(num_frames=5, frame_range=2), 5, 3) == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("frame_range", [2, 10])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_videos_stay_in_the_order_of_time_and_use_every_frame(length: int, frame_range: int) -> None:
    for clip in clips(FrameSampler(num_frames=5, frame_range=frame_range), length, 50):
        assert clip == sorted(clip)
        assert len(clip) == 5
        assert set(clip) == set(range(length))


def test_others_lie_in_range_without_repeats() -> None:
    for clip in clips(FrameSampler(num_frames=4, frame_range=3), 30):
        assert clip == sorted(clip)
        assert len(set(clip)) == 4
        assert clip[-1] - clip[0] <= 6


def test_interval_keeps_frames_apart() -> None:
    for clip in clips(FrameSampler(num_frames=2, frame_range=6, interval=4), 40):
        assert 4 <= clip[1] - clip[0] <= 6


def test_range_zero_repeats_the_frame() -> None:
    assert all(len(set(clip)) == 1 for clip in clips(FrameSampler(num_frames=3, frame_range=0), 9, 20))


def test_shuffle_and_reverse() -> None:
    shuffled = clips(FrameSampler(num_frames=5, frame_range=2, shuffle=True), 9)
    assert any(clip != sorted(clip) and clip != sorted(clip)[::-1] for clip in shuffled)
    turned = clips(FrameSampler(num_frames=5, frame_range=2, reverse=True), 9)
    backwards = sum(clip == sorted(clip, reverse=True) for clip in turned)
    assert all(clip in (sorted(clip), sorted(clip)[::-1]) for clip in turned)
    assert 100 < backwards < 200


def test_ratio_restricts_the_frames() -> None:
    assert {clip[0] for clip in clips(FrameSampler(num_frames=1, ratio=0.1), 36)} == {0, 9, 18, 27}
    assert {clip[0] for clip in clips(FrameSampler(num_frames=1, ratio=0.01), 36)} == {18}
    assert {clip[0] for clip in clips(FrameSampler(num_frames=1, ratio=0.01), 1, 5)} == {0}


def test_same_generator_same_clip() -> None:
    sampler = FrameSampler(num_frames=4, frame_range=9, shuffle=True, reverse=True)
    assert clips(sampler, 50, 20) == clips(sampler, 50, 20)


@pytest.mark.parametrize(
    "values", [{"num_frames": 0}, {"num_frames": 1, "ratio": 0}, {"num_frames": 2, "frame_range": -1}]
)
def test_wrong_values_are_named(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="INPUT.SAMPLING_FRAME"):
        FrameSampler(**values)  # type: ignore[arg-type]
