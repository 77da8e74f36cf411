"""Fusion of result files: what is paired, what scores and masks become, and that it helps where it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import pytest

from vis.evaluation import ResultsError, evaluate_ytvis
from vis.evaluation.ensemble import fuse_files, load_videos, vote
from vis.evaluation.result_files import load_results
from vis.evaluation.ytvis_io import make_track

Make = Callable[..., Any]
A, B, FAR = (1, 1, 5, 5), (6, 6, 10, 10), (0, 8, 3, 12)
T = 4


@pytest.fixture
def fuse(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """``fuse(gt, results, results, ..., weights=...)``: the fused list."""

    def run(gt: dict[str, Any], *results: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        (tmp_path / "gt.json").write_text(json.dumps(gt))
        files = []
        for i, content in enumerate(results):
            files.append(tmp_path / f"{i}.json")
            files[-1].write_text(json.dumps(content))
        run.fusion = fuse_files(load_videos(tmp_path / "gt.json"), files, tmp_path / "out" / "fused.json", **options)  # type: ignore[attr-defined]
        return load_results(tmp_path / "out" / "fused.json")

    return run


def ap(gt: dict[str, Any], results: list[dict[str, Any]]) -> float:
    return evaluate_ytvis(gt, results).stats[0]


def test_two_imperfect_results_are_better_together(make_gt: Make, make_results: Make, fuse: Make) -> None:
    """Each finds what the other misses and has false alarms of its own; what both have comes first."""
    gt = make_gt([(video, 1, [box] * T, 0) for video in (1, 2, 3) for box in (A, B)])
    first, second = (
        make_results(
            [(video, 1, 0.6, [box] * T) for video in (1, 2, 3) for box in found[video]]
            + [(video, 1, 0.9, [false] * T) for video in (1, 2, 3)]
        )
        for found, false in (({1: (A, B), 2: (A,), 3: (B,)}, FAR), ({1: (A, B), 2: (A, B), 3: (A,)}, (0, 0, 2, 2)))
    )
    fused = fuse(gt, first, second)
    both = ap(gt, fused)
    assert both > max(ap(gt, first), ap(gt, second))
    assert fuse.fusion.by_members == {2: 3, 1: 9}  # type: ignore[attr-defined]
    found = [(entry["video_id"], round(entry["score"], 6)) for entry in fused]
    assert (
        found
        == [(1, 0.6)] * 2
        + [(1, 0.45)] * 2
        + [(2, 0.6)]
        + [(2, 0.45)] * 2
        + [(2, 0.3)]
        + [(3, 0.45)] * 2
        + [(3, 0.3)] * 2
    )
    assert fuse(gt, first, second) == fused


def noisy(make_results: Make, seed: int) -> list[dict[str, Any]]:
    """Tracks of three classes with equal masks, equal scores, empty tracks and frames without a mask among them."""
    rng = np.random.Generator(np.random.PCG64(seed))
    entries = []
    for video in (1, 2, 7):
        for _ in range(9):
            y, x = rng.integers(0, 6, 2).tolist()
            boxes = [(y, x, y + 4, x + 5) if rng.random() < 0.7 else None for _ in range(T)]
            if rng.random() < 0.2:
                boxes = [None] * T
            for _ in range(int(rng.integers(1, 3))):
                entries.append((video, int(rng.choice([1, 2, 5])), round(float(rng.random()), 1), boxes))
    return make_results(entries)


@pytest.mark.parametrize("weights", [None, (0.3, 1.1, 7.0)])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_file_with_itself_is_itself(
    make_gt: Make, make_results: Make, fuse: Make, seed: int, weights: tuple[float, ...] | None
) -> None:
    results = noisy(make_results, seed)
    gt = make_gt([(video, c, [A] * T, 0) for video in (1, 2) for c in (1, 2, 5)])
    fused = fuse(gt, results, results, results, weights=weights)

    def as_set(entries: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps(entry, sort_keys=True) for entry in entries)

    assert as_set(fused) == as_set(results)
    assert evaluate_ytvis(gt, fused).stats == evaluate_ytvis(gt, results).stats


def test_scores(make_gt: Make, make_results: Make, fuse: Make) -> None:
    """Weighted means over all files; a track that a file does not have counts 0 there."""
    gt = make_gt([(1, 1, [A] * T, 0)])
    results = [
        make_results([(1, 1, 0.8, [A] * T), (1, 2, 0.5, [B] * T)]),
        make_results([(1, 1, 0.4, [A] * T), (1, 5, 0.6, [B] * T)]),
        make_results([(1, 1, 0.2, [A] * T), (1, 2, 0.3, [B] * T)]),
    ]
    fused = fuse(gt, *results, weights=(3, 1, 2))
    scores = {entry["category_id"]: entry["score"] for entry in fused}
    assert scores == pytest.approx(
        {1: (3 * 0.8 + 0.4 + 2 * 0.2) / 6, 2: (3 * 0.5 + 2 * 0.3) / 6, 5: 0.6 / 6}
    )  # the same mask as another class is another track
    assert [entry["score"] for entry in fused] == sorted(scores.values(), reverse=True)
    assert len(fuse(gt, *results, max_num=2)) == 2
    assert fuse.fusion.dropped == 1  # type: ignore[attr-defined]


def test_pairs_are_those_of_the_largest_sum_above_the_gate(make_gt: Make, make_results: Make, fuse: Make) -> None:
    """In the first file P and Q; the second has one track close to both and one close to Q alone."""
    p, q = (0, 0, 10, 4), (0, 0, 10, 5)
    close, other = (0, 0, 10, 5), (0, 0, 10, 7)  # IoU with P and Q: 4/5 and 1; 4/7 and 5/7
    gt = make_gt([(1, 1, [A] * T, 0)])
    first = make_results([(1, 1, 0.9, [p] * T), (1, 1, 0.5, [q] * T)])
    second = make_results([(1, 1, 0.7, [other] * T), (1, 1, 0.3, [close] * T)])
    scores = [entry["score"] for entry in fuse(gt, first, second)]
    assert scores == pytest.approx([(0.9 + 0.7) / 2, (0.5 + 0.3) / 2])  # 4/7 + 1 is more than 4/5 + 5/7
    scores = [entry["score"] for entry in fuse(gt, first, second, iou_threshold=0.6)]
    assert scores == pytest.approx([(0.9 + 0.3) / 2, (0.5 + 0.7) / 2])  # 4/7 is below the gate
    scores = [entry["score"] for entry in fuse(gt, first, second, iou_threshold=0.95)]
    assert scores == pytest.approx([0.9 / 2, (0.5 + 0.3) / 2, 0.7 / 2])


def code(mask: np.ndarray) -> dict[str, Any] | None:
    return mask_utils.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1, 2), (1, 1, 1), (2, 1, 1), (1.0, 0.4, 0.3, 0.5), (0.1, 0.1, 0.2)])
@pytest.mark.parametrize("leader", [0, 1])
def test_votes(weights: tuple[float, ...], leader: int) -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    masks = rng.random((len(weights), 3, 11, 13)) < 0.5
    masks[:, 1] = False
    masks[0, 1, :4] = True
    tracks = [make_track([code(mask) for mask in track], 11, 13) for track in masks]
    found = vote(tracks, np.array(weights), leader)
    total = np.tensordot(weights, masks, 1)
    half = sum(weights) / 2
    draw = np.abs(total - half) < 1e-9
    wanted = np.where(draw, masks[leader], total > half)
    for rle, mask in zip(found, wanted, strict=True):
        assert (rle is None) == (not mask.any())
        if rle is not None:
            assert rle["size"] == [11, 13]
            assert isinstance(rle["counts"], str)
            assert np.array_equal(mask_utils.decode(rle), mask)


def test_of_two_equal_files_the_better_scored_track_gives_the_masks(
    make_gt: Make, make_results: Make, fuse: Make
) -> None:
    gt = make_gt([(1, 1, [A] * T, 0)])
    wide = [(1, 1, 5, 6)] * 3 + [None]
    first, second = make_results([(1, 1, 0.4, [A] * T)]), make_results([(1, 1, 0.8, wide)])
    (fused,) = fuse(gt, first, second)
    assert fused["segmentations"] == second[0]["segmentations"]
    (fused,) = fuse(gt, first, second, weights=(3, 1))
    assert fused["segmentations"] == first[0]["segmentations"]


def test_videos_that_a_file_does_not_have(
    make_gt: Make, make_results: Make, fuse: Make, caplog: pytest.LogCaptureFixture
) -> None:
    gt = make_gt([(1, 1, [A] * T, 0), (2, 1, [A] * T, 0)])
    first = make_results([(1, 1, 0.8, [A] * T), (2, 1, 0.6, [A] * T)])
    second = make_results([(1, 1, 0.4, [A] * T)])
    with caplog.at_level("WARNING", logger="vis"):
        fused = fuse(gt, first, second)
    assert [(entry["video_id"], entry["score"]) for entry in fused] == [(1, pytest.approx(0.6)), (2, 0.6)]
    assert "1.json has no prediction for 1 of 2 videos (ids [2])" in caplog.text
    assert fuse(gt, [], []) == []


def test_no_annotations_are_needed(make_gt: Make, make_results: Make, fuse: Make) -> None:
    gt = make_gt([(1, 1, [A] * T, 0)])
    gt["annotations"] = None
    results = make_results([(1, 1, 0.8, [A] * T)])
    assert fuse(gt, results, results) == results
    for video in gt["videos"]:
        video["file_names"] = [f"{t}.jpg" for t in range(video.pop("length"))]
    assert fuse(gt, results, results) == results
    del gt["videos"][0]["height"]
    with pytest.raises(ValueError, match="gt.json: KeyError 'height'"):
        fuse(gt, results, results)


def test_files_of_other_data_are_refused(make_gt: Make, make_results: Make, fuse: Make, tmp_path: Path) -> None:
    gt = make_gt([(1, 1, [A] * T, 0)])
    results = make_results([(1, 1, 0.8, [A] * T)])
    with pytest.raises(ResultsError, match="category_id 3 is not in the ground truth"):
        fuse(gt, results, make_results([(1, 3, 0.8, [A] * T)]))
    with pytest.raises(ResultsError, match="video_id 4 is not in the ground truth"):
        fuse(gt, results, make_results([(4, 1, 0.8, [A] * T)]))
    with pytest.raises(ResultsError, match="one entry per frame"):
        fuse(gt, results, make_results([(1, 1, 0.8, [A] * 3)]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1,)}, "a positive number for each of 2 files"),
        ({"weights": (1, 0)}, "a positive number for each"),
        ({"iou_threshold": 0.0}, "more than 0 and at most 1"),
        ({"max_num": 0}, "1 or more"),
    ],
)
def test_options(make_gt: Make, make_results: Make, fuse: Make, options: dict[str, Any], message: str) -> None:
    gt, results = make_gt([(1, 1, [A] * T, 0)]), make_results([(1, 1, 0.8, [A] * T)])
    with pytest.raises(ValueError, match=message):
        fuse(gt, results, results, **options)
    with pytest.raises(ValueError, match="an ensemble has two or more"):
        fuse(gt, results)
