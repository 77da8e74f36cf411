"""Intersections and IoU of tracks: equal to pixels, compiled and not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch

from vis.evaluation import rle_kernels
from vis.evaluation.rle_kernels import PackedCodes, intersections
from vis.evaluation.track_iou import frame_intersections, frame_iou, pairwise_iou, track_areas
from vis.evaluation.ytvis_io import Track, make_track
from vis.structures.rle import BadRLE

H, W, T = 17, 23, 5
WAYS = [pytest.param(False, id="pycocotools"), pytest.param(True, id="compiled")]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not rle_kernels.compiled():
        pytest.skip("vis._C is not built")
    monkeypatch.setattr(rle_kernels, "compiled", lambda: request.param)
    return bool(request.param)


def code(mask: np.ndarray) -> dict[str, Any]:
    return mask_utils.encode(np.asfortranarray(mask, np.uint8))


def blobs(rng: np.random.Generator) -> np.ndarray:
    """(T, H, W): noise, rectangles, whole columns, everything, nothing."""
    masks = rng.random((T, H, W)) < rng.choice([0.02, 0.5, 0.98])
    for mask in masks:
        kind = rng.integers(0, 5)
        if kind == 0:
            mask[:] = False
            y, x = rng.integers(0, H), rng.integers(0, W)
            mask[y : y + rng.integers(1, H), x : x + rng.integers(1, W)] = True
        elif kind == 1:
            mask[:, rng.integers(0, W) :] = False
        elif kind == 2:
            mask[:] = rng.random() < 0.5
    return masks


def track(masks: np.ndarray, absent: np.ndarray) -> Track:
    return make_track([None if gone else code(mask) for mask, gone in zip(masks, absent, strict=True)], H, W)


@pytest.mark.parametrize("seed", range(8))
def test_equals_pixels(way: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = ([blobs(rng) for _ in range(n)] for n in (3, 4))
    gone_a, gone_b = (rng.random((n, T)) < 0.3 for n in (3, 4))
    for masks, gone in ((a, gone_a), (b, gone_b)):
        for mask, where in zip(masks, gone, strict=True):
            mask[where] = False
    tracks_a, tracks_b = ([track(m, g) for m, g in zip(*pair, strict=True)] for pair in ((a, gone_a), (b, gone_b)))
    shared = frame_intersections(tracks_a, tracks_b)
    expected = np.array([[(p & q).sum((1, 2)) for q in b] for p in a])
    assert shared.dtype == np.int64
    np.testing.assert_array_equal(shared, expected)
    unions = np.array([[(p | q).sum() for q in b] for p in a])
    iou = np.divide(expected.sum(2), unions, out=np.zeros(unions.shape), where=unions > 0)
    np.testing.assert_array_equal(pairwise_iou(tracks_a, tracks_b), iou)
    per_frame = frame_iou(shared, track_areas(tracks_a), track_areas(tracks_b))
    union = np.array([[(p | q).sum((1, 2)) for q in b] for p in a])
    np.testing.assert_array_equal(per_frame, np.where(union > 0, expected / np.maximum(union, 1), 0))


def test_masks_of_no_pixel_and_frames_without_mask(way: bool) -> None:
    empty, full = np.zeros((T, H, W), bool), np.ones((T, H, W), bool)
    zero, whole = track(empty, np.zeros(T, bool)), track(full, np.zeros(T, bool))
    nowhere = track(full, np.ones(T, bool))
    some = track(full, np.array([0, 1, 1, 1, 1], bool))
    tracks = [zero, whole, nowhere, some]
    found = pairwise_iou(tracks, tracks)
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [0, 1, 0, 0.2], [0, 0, 0, 0], [0, 0.2, 0, 1]])


def test_no_tracks(way: bool) -> None:
    one = track(np.ones((T, H, W), bool), np.zeros(T, bool))
    assert frame_intersections([], [one, one]).shape == (0, 2, T)
    assert frame_intersections([one], []).shape == (1, 0, T)
    assert pairwise_iou([], []).shape == (0, 0)


def rle(runs: list[int], height: int, width: int) -> dict[str, Any]:
    return mask_utils.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def test_exact_up_to_the_largest_picture(way: bool) -> None:
    """The quotient that pycocotools gives, times the area, is rounded to the whole number that it came from."""
    height, width = 46_340, 46_340  # just below 2^31 pixels
    total = height * width
    rng = np.random.default_rng(5)
    for _ in range(40):
        cuts = np.sort(rng.integers(1, total, 3))
        a = [int(cuts[0]), int(total - cuts[0])]
        b = [int(cuts[1]), int(cuts[2] - cuts[1]), int(total - cuts[2])]
        both = [PackedCodes.of([rle(runs, height, width)], height, width) for runs in (a, b)]
        expected = max(0, int(cuts[2] - max(cuts[0], cuts[1])))
        assert intersections(both[:1], both[1:], use_compiled=way)[0, 0, 0] == expected
        assert both[0].areas(use_compiled=way).tolist() == [total - cuts[0]]


@pytest.mark.parametrize("counts", [b"5", b"57", b"P", b"\xc3~", b"PPPPPPPPPP1", b"ak3", b"a`3L"])
def test_damaged_codes_are_named(way: bool, counts: bytes) -> None:
    good = code(np.ones((H, W)))["counts"]
    with pytest.raises(BadRLE) as error:
        PackedCodes([good, b"", counts, good], H, W).areas()
    assert error.value.index == 2


def test_damaged_codes_are_the_same_ones() -> None:
    """Random damage: what NumPy refuses, the compiled code refuses, and areas of the rest agree."""
    if not rle_kernels.compiled():
        pytest.skip("vis._C is not built")
    rng = np.random.default_rng(7)
    outcomes = set()
    for _ in range(800):
        counts = bytearray(code(rng.random((H, W)) < 0.1)["counts"])
        counts[rng.integers(len(counts))] = rng.integers(44, 114)
        found = []
        for use_compiled in (False, True):
            try:
                found.append(int(PackedCodes([bytes(counts)], H, W).areas(use_compiled=use_compiled)[0]))
            except BadRLE as error:
                found.append(str(error))
        assert found[0] == found[1]
        outcomes.add(type(found[0]))
    assert outcomes == {int, str}


def test_the_compiled_code_trusts_nothing() -> None:
    if not rle_kernels.compiled():
        pytest.skip("vis._C is not built")
    good, bad = PackedCodes([code(np.ones((H, W)))["counts"]] * 2, H, W), PackedCodes([b"", b"57"], H, W)
    with pytest.raises(ValueError, match="track 1, frame 1, does not fit its size"):
        intersections([good, bad], [good], use_compiled=True)
    text, ends = torch.zeros(5, dtype=torch.uint8), torch.tensor([3, 2, 5])
    for wrong in (ends, torch.tensor([3, 4]), torch.tensor([-1, 5])):
        with pytest.raises(RuntimeError, match="ends of run-length codes|last code must end"):
            torch.ops.vis.rle_areas(text, wrong, H * W)


def test_tracks_of_different_videos_are_refused(way: bool) -> None:
    one = track(np.ones((T, H, W), bool), np.zeros(T, bool))
    other = make_track([code(np.ones((W, H)))] * T, W, H)
    shorter = make_track([code(np.ones((H, W)))] * (T - 1), H, W)
    for wrong in (other, shorter):
        with pytest.raises(ValueError, match="one length and size"):
            frame_intersections([one], [wrong])


def test_packed_codes_read_like_a_list() -> None:
    codes = [code(np.ones((H, W))), None, code(np.zeros((H, W)))]
    packed = PackedCodes.of(codes, H, W)
    assert list(packed) == codes
    assert packed[-1] == codes[2]
    assert packed[:2] == codes[:2]
    with pytest.raises(IndexError):
        packed[3]
