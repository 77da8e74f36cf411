"""Run-length codes agree with pycocotools, and damaged ones never reach it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from vis.structures import rle
from vis.structures.polygons import polygons_to_rle, segmentation_to_mask
from vis.structures.rle import BadRLE, rle_areas


@pytest.mark.parametrize("seed", range(4))
def test_rle_agrees_with_pycocotools(seed: int) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.random((37, 53 + seed)) < (0.02, 0.5, 0.98, 0.0)[seed]
    code = rle.encode(mask)
    assert isinstance(code["counts"], str)
    np.testing.assert_array_equal(rle.decode(code), mask)
    np.testing.assert_array_equal(rle.decode({**code, "counts": code["counts"].encode()}), mask)
    assert rle.area(code) == mask.sum() == coco_mask.area(code)
    runs = rle.run_lengths(code).tolist()
    assert rle.compress({"size": code["size"], "counts": runs}) == code
    assert rle.to_box(code) == coco_mask.toBbox(code).tolist()
    np.testing.assert_array_equal(rle.decode(rle.merge([code, rle.encode(~mask)])), np.ones_like(mask))


@pytest.mark.parametrize("counts", ["", "0", "~~~~", "é", "zzzzzzzzzzzz", "112", [5], [-1, 60], ["a"], 5, None])
def test_damaged_counts_are_refused_before_decoding(counts: Any) -> None:
    """pycocotools would write past its buffer with some of these."""
    with pytest.raises(ValueError, match="run length|counts"):
        rle.decode({"size": [7, 8], "counts": counts})


@pytest.mark.parametrize("size", [None, [7], [7.0, 8], [0, 8], [2**20, 2**20]])
def test_wrong_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        rle.decode({"size": size, "counts": [56]})


def test_masks_of_another_size_are_refused() -> None:
    code = rle.encode(np.ones((7, 8), dtype=bool))
    with pytest.raises(ValueError, match="the RLE is of size 7x8, the frame is 8x7"):
        segmentation_to_mask(code, 8, 7)
    with pytest.raises(ValueError, match=r"\(2, 7, 8\)"):
        rle.encode(np.ones((2, 7, 8)))
    assert not segmentation_to_mask(None, 3, 4).any()


def test_areas_of_codes() -> None:
    rng = np.random.default_rng(5)
    masks = [rng.random((19, 29)) < p for p in (0, 0.02, 0.5, 0.98, 1)]
    masks.append(np.zeros((19, 29), bool))
    masks[-1][:, 9:25] = True  # long runs: several characters each
    codes = [coco_mask.encode(np.asfortranarray(m, np.uint8))["counts"] for m in masks]
    assert rle_areas(codes, 19 * 29).tolist() == [int(m.sum()) for m in masks]
    assert rle_areas([], 5).tolist() == []
    for index, code in enumerate(codes):
        with pytest.raises(BadRLE) as error:
            rle_areas([*codes[:index], code + b"1"], 19 * 29)
        assert error.value.index == index


@pytest.mark.parametrize("batch", [1, 40, 300])
def test_areas_in_several_passes(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(rle, "_BATCH", batch)
    rng = np.random.default_rng(6)
    masks = rng.random((9, 19, 29)) < np.linspace(0, 0.5, 9)[:, None, None]
    codes = [rle.encode(mask)["counts"].encode() for mask in masks]
    assert rle_areas(codes, 19 * 29).tolist() == masks.sum((1, 2)).tolist()
    for index in (0, 5, 8):
        for damaged in (b"", codes[index][:-1] + b"o"):
            with pytest.raises(BadRLE) as error:
                rle_areas([*codes[:index], damaged, *codes[index + 1 :]], 19 * 29)
            assert error.value.index == index


def test_areas_of_more_pixels_than_can_be_counted() -> None:
    with pytest.raises(BadRLE, match="4294967296 pixels"):
        rle_areas([b"0"], 2**32)


@pytest.mark.parametrize("counts", ["0", "~~~~", "112", [5]])
def test_pycocotools_is_not_given_damaged_counts(monkeypatch: pytest.MonkeyPatch, counts: Any) -> None:
    good = rle.encode(np.ones((7, 8), dtype=bool))
    for name in ("merge", "toBbox", "decode", "area", "iou", "frPyObjects"):
        monkeypatch.setattr(coco_mask, name, None)
    damaged = {"size": [7, 8], "counts": counts}
    for read in (rle.compress, rle.to_box, rle.area, rle.decode, lambda code: rle.merge([good, code])):
        with pytest.raises(ValueError, match="run length|counts"):
            read(damaged)
    with pytest.raises(ValueError, match="run length|counts"):
        segmentation_to_mask(damaged, 7, 8)
    with pytest.raises(ValueError, match="at least 6; this one has 4"):
        polygons_to_rle([[1.0, 2.0, 3.0, 4.0]], 7, 8)


def test_masks_of_a_frame() -> None:
    """Given transposed; the same codes as one by one, None where a mask is empty."""
    masks = np.random.default_rng(7).random((4, 7, 11)) < 0.4
    masks[[0, 2]] = False
    transposed = torch.from_numpy(masks.transpose(0, 2, 1))
    for given in (transposed, transposed.contiguous()):
        assert rle.encode_masks(given) == [None, rle.encode(masks[1]), None, rle.encode(masks[3])]
    assert rle.encode_masks(transposed[[0, 2]]) == [None, None]
    assert rle.encode_masks(transposed[:0]) == []


@pytest.mark.parametrize("code", [b"", b"\xff\xfe", b"P", b"PPPPPPPPPP1", b"00", b"o", b"Q4"])
def test_damaged_code(code: bytes) -> None:
    with pytest.raises(BadRLE) as error:
        rle_areas([b"57", code] if code else [b"", b"57"], 12)
    assert error.value.index == (1 if code else 0)
