"""Clip-consistent transforms: pixels and masks move together, one draw per clip, nothing but the generator decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vis.data.color import ColorTransform
from vis.data.transforms import (
    ClipAugmentation,
    Color,
    Crop,
    FixedSizeCrop,
    Flip,
    RandomApply,
    ResizeScale,
    ResizeShortest,
    SmoothRotation,
    Step,
    shortest_edge_size,
)

HEIGHT, WIDTH, FRAMES = 60, 84, 5


def picture() -> tuple[np.ndarray, np.ndarray]:
    """A white block on black and its mask, off centre in both directions."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[8:32, 10:50] = 1
    return np.repeat(mask[:, :, None] * 255, 3, axis=2), mask


def drawn(step: Step, seed: int = 0, frames: int = FRAMES) -> list[Any]:
    augmentation = ClipAugmentation(steps=(step,))
    return augmentation(HEIGHT, WIDTH, frames, np.random.default_rng(seed))


STEPS: dict[str, Step] = {
    "resize": ResizeShortest(min_sizes=(30, 41, 77), max_size=200),
    "resize_range": ResizeShortest(min_sizes=(30, 77), max_size=90, sampling="range"),
    "flip": Flip(probability=1.0),
    "flip_vertical": Flip(kind="vertical", probability=1.0),
    "crop": Crop(kind="absolute_range", size=(30, 50)),
    "crop_relative": Crop(kind="relative_range", size=(0.5, 0.6)),
    "rotation": SmoothRotation(),
    "jitter": ClipAugmentation(
        steps=(Flip(), ResizeScale(min_scale=0.5, max_scale=2.0, target=64), FixedSizeCrop(size=64))
    ),
    "crop_then_resize": ClipAugmentation(
        steps=(
            RandomApply(
                steps=(ResizeShortest(min_sizes=(70,), max_size=200), Crop(kind="absolute_range", size=(40, 60))),
                probability=1.0,
            ),
            ResizeShortest(min_sizes=(48,), max_size=100),
            Flip(),
        )
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("seed", range(4))
def test_pixels_and_masks_move_together(name: str, seed: int) -> None:
    image, mask = picture()
    for transform in drawn(STEPS[name], seed):
        moved, moved_mask = transform.apply_image(image), transform.apply_segmentation(mask)
        assert moved.shape[:2] == moved_mask.shape
        # White inside, outside black or grey padding; at the border the bilinear filter mixes both.
        inner = moved_mask > 0
        agree = (moved[..., 0] > 200) == inner
        assert agree.mean() > 0.93
        assert inner.any()


@pytest.mark.parametrize("name", ["resize", "crop", "jitter", "crop_then_resize"])
def test_frames_of_a_clip_get_the_same_transform(name: str) -> None:
    image, _ = picture()
    for seed in range(6):
        first, *others = [transform.apply_image(image) for transform in drawn(STEPS[name], seed)]
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("name", STEPS)
def test_only_the_generator_decides(name: str) -> None:
    image, _ = picture()
    clips = [[transform.apply_image(image) for transform in drawn(STEPS[name], seed)] for seed in (3, 3, 4, 5, 6, 7)]
    same = [all(np.array_equal(one, two) for one, two in zip(clips[0], clip, strict=True)) for clip in clips[1:]]
    assert same[0]
    assert not all(same[1:]) or name.startswith("flip")  # these always flip here


def test_flip_per_frame_and_per_clip() -> None:
    def flipped(kind: str, seed: int) -> list[bool]:
        image, _ = picture()
        return [not np.array_equal(each.apply_image(image), image) for each in drawn(Flip(kind=kind), seed)]

    assert all(len(set(flipped("flip_by_clip", seed))) == 1 for seed in range(20))
    assert any(len(set(flipped("horizontal", seed))) == 2 for seed in range(5))
    assert {flipped("flip_by_clip", seed)[0] for seed in range(20)} == {True, False}
    assert not any(flipped("none", 0))
    image, _ = picture()
    (vertical,) = drawn(Flip(kind="vertical", probability=1.0), frames=1)
    assert np.array_equal(vertical.apply_image(image), image[::-1])
    (horizontal,) = drawn(Flip(kind="horizontal", probability=1.0), frames=1)
    assert np.array_equal(horizontal.apply_image(image), image[:, ::-1])


def test_resize_per_frame_and_per_clip() -> None:
    def sizes(sampling: str) -> list[set[int]]:
        step = ResizeShortest(min_sizes=(30, 50), max_size=999, sampling=sampling)
        return [{t.apply_image(picture()[0]).shape[0] for t in drawn(step, seed)} for seed in range(8)]

    assert all(len(each) == 1 for each in sizes("choice_by_clip"))
    assert set.union(*sizes("choice_by_clip")) == {30, 50}
    assert any(len(each) == 2 for each in sizes("choice"))
    assert all(len(each) == 1 for each in sizes("range_by_clip"))
    assert any(len(each) > 2 for each in sizes("range"))
    assert all(30 <= height <= 50 for each in sizes("range") for height in each)


@pytest.mark.parametrize(
    ("size", "short_edge", "max_size", "expected"),
    [
        ((720, 1280), 360, 1333, (360, 640)),
        ((720, 1280), 480, 1333, (480, 853)),
        ((1280, 720), 480, 1333, (853, 480)),
        ((100, 1000), 300, 1333, (133, 1333)),
        ((41, 83), 0, 1333, (41, 83)),
        ((1, 900), 20, 30, (1, 30)),
    ],
)
def test_shortest_edge(size: tuple[int, int], short_edge: int, max_size: int, expected: tuple[int, int]) -> None:
    assert shortest_edge_size(*size, short_edge, max_size) == expected


def test_resizes_as_pillow_does() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    mask = rng.integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8)
    (transform,) = drawn(ResizeShortest(min_sizes=(31,), max_size=999), frames=1)
    size = (43, 31)  # width, height: 84 * 31 / 60 = 43.4
    assert np.array_equal(transform.apply_image(image), Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    nearest = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    assert np.array_equal(transform.apply_segmentation(mask), nearest)


def test_crop_sizes_cover_their_range_and_stop_at_the_frame() -> None:
    step = Crop(kind="absolute_range", size=(55, 70))
    shapes = {drawn(step, seed, frames=1)[0].apply_image(picture()[0]).shape[:2] for seed in range(300)}
    assert {height for height, _ in shapes} == set(range(55, HEIGHT + 1))
    assert {width for _, width in shapes} == set(range(55, 71))
    assert replace(step, kind="absolute", size=(20, 999)).window(HEIGHT, WIDTH, np.random.default_rng()) == (20, WIDTH)
    assert replace(step, kind="relative", size=(0.5, 1)).window(HEIGHT, WIDTH, np.random.default_rng()) == (30, WIDTH)


def test_crop_happens_in_half_of_the_clips() -> None:
    step = RandomApply(steps=(Crop(kind="absolute", size=(20, 20)),))
    cropped = [drawn(step, seed, frames=1)[0].apply_image(picture()[0]).shape[0] == 20 for seed in range(200)]
    assert 75 < sum(cropped) < 125


def test_large_scale_jitter_pads_with_grey_outside_of_every_mask() -> None:
    step = ClipAugmentation(steps=(ResizeScale(min_scale=0.5, max_scale=0.5, target=64), FixedSizeCrop(size=64)))
    (transform,) = drawn(step, frames=1)
    image = transform.apply_image(picture()[0])
    mask = transform.apply_segmentation(np.ones((HEIGHT, WIDTH), dtype=np.uint8))
    assert image.shape == (64, 64, 3)
    assert mask[:23, :32].all()  # 60 x 84 fitted into 32 x 32 is 23 x 32
    assert mask.sum() == 23 * 32
    assert (image[23:] == 128).all()
    assert (image[:, 32:] == 128).all()


def test_rotation_is_smooth() -> None:
    directions = set()
    for seed in range(10):
        angles = [transform.transforms[0].angle for transform in drawn(SmoothRotation(), seed)]
        assert max(map(abs, angles)) <= 15
        steps = np.sign(np.diff(angles))
        assert len(set(steps)) == 1
        directions.add(steps[0])
    assert directions == {-1, 1}


def test_colours_leave_masks_alone() -> None:
    image = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    grey = np.repeat(image[..., :1], 3, axis=2)
    for kind in ("brightness", "contrast", "saturation"):
        assert np.array_equal(ColorTransform(kind=kind, factor=1.0).apply_image(image), image)
        mask = image[..., 0] > 100
        assert ColorTransform(kind=kind, factor=0.9).apply_segmentation(mask) is mask
        factors = [transform.transforms[0].factor for transform in drawn(Color(kind=kind))]
        assert len(set(factors)) == FRAMES
        assert all(0.9 <= factor <= 1.1 for factor in factors)
    darker = ColorTransform(kind="brightness", factor=0.5).apply_image(image)
    assert np.array_equal(darker, image // 2)
    assert np.abs(ColorTransform(kind="saturation", factor=0.5).apply_image(grey).astype(int) - grey).max() <= 1
    flat = ColorTransform(kind="contrast", factor=0.0).apply_image(image)
    assert np.ptp(flat) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flip(kind="flip_by_clp"), "Did you mean 'flip_by_clip'"),
        (lambda: ResizeShortest(min_sizes=(1,), max_size=9, sampling="choise"), "MIN_SIZE_TRAIN_SAMPLING is 'choise'"),
        (lambda: ResizeShortest(min_sizes=(1, 2, 3), max_size=9, sampling="range"), "exactly two sizes"),
        (lambda: ResizeShortest(min_sizes=(), max_size=9), "one or more sizes"),
        (lambda: Crop(kind="absolut", size=(1, 2)), "INPUT.CROP.TYPE"),
        (lambda: Crop(kind="absolute_range", size=(600, 384)), "INPUT.CROP.SIZE"),
        (lambda: Crop(kind="relative", size=(300, 600)), "INPUT.CROP.SIZE"),
        (lambda: Color(kind="hue"), "INPUT.AUGMENTATIONS is 'hue'"),
        (lambda: ResizeScale(min_scale=2.0, max_scale=1.0, target=64), "MIN_SCALE <= MAX_SCALE"),
    ],
)
def test_wrong_values_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
