"""AP by occlusion, by length, of short and long videos, and of each class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vis.data.synthetic import generate
from vis.evaluation import GroundTruthError, evaluate_ytvis
from vis.evaluation.ap_breakdown import join_short_and_long, length_groups, occlusion_group, with_long_videos
from vis.evaluation.ytvis_io import GroundTruth, Track, load_ground_truth

A, B, C = (1, 1, 5, 5), (6, 6, 10, 12), (1, 7, 4, 11)
NO, SLIGHT, SEVERE = "no_occlusion", "slight_occlusion", "severe_occlusion"
Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("levels", "group"),
    [
        ([0, 0, 0, 0], 0),
        ([0, 0, 1, 1], 0),  # its upper half scores 0.25
        ([0, 0, 1, 2], 1),  # 0.5
        ([0, 0, 2, 2], 2),
        ([0, 0, 0, 2], 1),  # (0.75 + 0) / 2
        ([0, 0, 0, 0, 0, 2], 0),  # (0.75 + 0 + 0) / 3
        ([-1, -1, -1, 2], 2),  # where it is not, nothing counts
        ([0, 2, 2], 2),  # two of three frames
        ([-1, -1], -1),
    ],
)
def test_occlusion_of_an_object(make_masks: Make, levels: list[int], group: int) -> None:
    track = Track(codes=None, areas=np.ones(len(levels)), mean_area=1.0, occlusion=np.array(levels))  # type: ignore[arg-type]
    assert occlusion_group(track) == group
    track.occlusion = None
    assert occlusion_group(track) == -1


def test_ap_by_occlusion(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0), (7, 1, [B] * 4, 0), (7, 1, [C] * 4, 0)])
    for entry, levels in zip(gt["annotations"], ([NO] * 4, [NO, SEVERE, None, SEVERE], None), strict=True):
        entry["occlusion"] = levels
    found_a, found_b, found_c = ((7, 1, score, [box] * 4) for score, box in ((0.9, A), (0.8, B), (0.7, C)))
    groups = evaluate_ytvis(gt, make_results([found_a, found_b, found_c])).breakdown["occlusion"]
    assert {name: row["objects"] for name, row in groups.items()} == {"AP_so": 1, "AP_mo": 0, "AP_ho": 1}
    # each finds the one object of its group; the others' objects, also the one without levels, are ignored
    assert groups["AP_so"]["AP"] == pytest.approx(1)
    assert groups["AP_ho"]["AP"] == pytest.approx(1)
    assert groups["AP_mo"]["AP"] == -1
    # a prediction that finds nothing is wrong in every group
    nothing = (7, 1, 0.95, [(10, 0, 11, 3)] * 4)
    groups = evaluate_ytvis(gt, make_results([nothing, found_a])).breakdown["occlusion"]
    assert groups["AP_so"]["AP"] == pytest.approx(0.5)
    assert groups["AP_ho"]["AP"] == 0
    assert groups["AP_ho"]["AR100"] == 0


def test_without_levels_there_is_no_group(make_gt: Make, make_results: Make, caplog: pytest.LogCaptureFixture) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0)])
    results = make_results([(7, 1, 0.9, [A] * 4)])
    assert evaluate_ytvis(gt, results).breakdown == {}
    gt["annotations"][0]["occlusion"] = ["hidden"] * 4
    assert evaluate_ytvis(gt, results).breakdown == {}
    assert "annotation 0: occlusion is no list" in caplog.text


def test_levels_of_the_synthetic_data_are_read(tmp_path: Path) -> None:
    generate("synthetic_ovis", tmp_path, num_videos={"train": 1, "val": 1})
    content = json.loads((tmp_path / "synthetic_ovis" / "val.json").read_text())
    results = [
        {"video_id": a["video_id"], "category_id": a["category_id"], "score": 0.5, "segmentations": a["segmentations"]}
        for a in content["annotations"]
    ]
    groups = evaluate_ytvis(content, results).breakdown["occlusion"]
    assert sum(row["objects"] for row in groups.values()) == len(content["annotations"])
    assert max(row["AP"] for row in groups.values()) == pytest.approx(1)


def truth_of(lengths: list[int]) -> GroundTruth:
    return GroundTruth({i + 1: (11, 13, length) for i, length in enumerate(lengths)}, {1: "a"}, {})


@pytest.mark.parametrize(
    ("lengths", "bounds", "groups"),
    [
        ([5, 9, 7], None, {"1 to 5 frames": {1}, "6 to 7 frames": {3}, "over 7 frames": {2}}),
        ([5, 5, 5], None, {"all lengths": {1, 2, 3}}),
        ([5, 5, 5, 8], None, {"1 to 5 frames": {1, 2, 3}, "over 5 frames": {4}}),
        ([5], None, {"all lengths": {1}}),
        ([5, 9, 7], [7], {"1 to 7 frames": {1, 3}, "over 7 frames": {2}}),
        ([5, 9, 7], [2, 20], {"3 to 20 frames": {1, 2, 3}}),
    ],
)
def test_groups_of_lengths(lengths: list[int], bounds: list[int] | None, groups: dict[str, set[int]]) -> None:
    assert length_groups(truth_of(lengths), bounds) == groups


@pytest.mark.parametrize("bounds", [[0], [5, 5], [7, 3]])
def test_bounds_must_rise(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="positive and rise"):
        length_groups(truth_of([5, 6]), bounds)


def two_lengths(make_gt: Make) -> dict[str, Any]:
    """Videos 7 and 9 of 4 frames, video 20 of 6."""
    gt = make_gt([(7, 1, [A] * 4, 0), (9, 2, [B] * 4, 0)])
    long = make_gt([(20, 1, [A] * 6, 0), (20, 1, [B] * 6, 0)], length=6)
    gt["videos"] += [video for video in long["videos"] if video["id"] == 20]
    gt["annotations"] += [{**entry, "id": entry["id"] + 50} for entry in long["annotations"]]
    for video in gt["videos"]:
        video["file_names"] = [f"video{video['id']}/{frame:05d}.jpg" for frame in range(video["length"])]
    return gt


RESULTS = [(7, 1, 0.9, [A] * 4), (9, 2, 0.9, [C] * 4), (20, 1, 0.9, [A] * 6), (20, 5, 0.9, [A] * 6)]


def test_groups_are_scored_as_if_alone(make_gt: Make, make_results: Make) -> None:
    gt, results = two_lengths(make_gt), make_results(RESULTS)
    found = evaluate_ytvis(gt, results, length_bounds=[4]).breakdown["length"]
    assert list(found) == ["1 to 4 frames", "over 4 frames"]
    for name, ids in (("1 to 4 frames", {7, 9}), ("over 4 frames", {20})):
        part = {
            **gt,
            "videos": [video for video in gt["videos"] if video["id"] in ids],
            "annotations": [entry for entry in gt["annotations"] if entry["video_id"] in ids],
        }
        alone = evaluate_ytvis(part, [entry for entry in results if entry["video_id"] in ids])
        assert [found[name][key] for key in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")] == [
            *alone.stats[:3],
            *alone.stats[6:9],
        ]
        assert found[name]["videos"] == len(ids)
        assert found[name]["objects"] == 2
    assert found["over 4 frames"]["AP"] == pytest.approx(51 / 101)
    assert found["1 to 4 frames"]["AP"] == pytest.approx(0.5)


def test_short_and_long_videos(make_gt: Make, make_results: Make) -> None:
    gt, results = two_lengths(make_gt), make_results(RESULTS)
    assert "ytvis2022" not in evaluate_ytvis(gt, results).breakdown
    named = [with_long_videos(load_ground_truth(gt), chosen) for chosen in ([20], ["video20"])]
    short, long = (
        load_ground_truth(
            {
                **gt,
                "videos": [video for video in gt["videos"] if (video["id"] == 20) == is_long],
                "annotations": [entry for entry in gt["annotations"] if (entry["video_id"] == 20) == is_long],
            }
        )
        for is_long in (False, True)
    )
    next(video for video in gt["videos"] if video["id"] == 20)["long"] = True
    tables = [
        evaluate_ytvis(truth, results).breakdown["ytvis2022"]
        for truth in (*named, join_short_and_long(short, long), gt)
    ]
    assert tables[0] == tables[1] == tables[2] == tables[3]
    assert list(tables[0]) == ["short", "long", "mean"]
    assert tables[0]["mean"]["AP"] == pytest.approx((0.5 + 51 / 101) / 2)
    with pytest.raises(GroundTruthError, match=r"both hold the videos \[20\]"):
        join_short_and_long(named[0], long)
    with pytest.raises(GroundTruthError, match=r"1 are not in the ground truth: \['video8'\]"):
        with_long_videos(named[0], [20, "video8"])
    long.categories = {1: "other"}
    with pytest.raises(GroundTruthError, match="differ in their categories"):
        join_short_and_long(short, long)


def test_numbers_of_each_class(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0), (7, 1, [B] * 4, 0), (7, 1, [C] * 4, 1), (9, 5, [A] * 4, 0)])
    result = evaluate_ytvis(gt, make_results([(7, 1, 0.9, [A] * 4), (9, 5, 0.9, [(1, 1, 3, 5)] * 4)]))
    first, none, last = (result.class_stats[f"class{i}"] for i in (1, 2, 5))
    assert first["objects"] == 2
    assert (first["AP"], first["AP50"], first["AR1"], first["AR100"]) == pytest.approx((51 / 101, 51 / 101, 0.5, 0.5))
    assert none == {"AP": -1, "AP50": -1, "AP75": -1, "AR1": -1, "AR10": -1, "AR100": -1, "objects": 0}
    assert (last["AP"], last["AP50"], last["AP75"]) == pytest.approx((0.1, 1, 0))
    table = result.class_table()
    assert "nan" not in table
    assert table.splitlines()[3].split() == ["class2", "|", *"-|-|-|-|-|-|0"]


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(make_gt: Make, make_results: Make, workers: int) -> None:
    gt, results = two_lengths(make_gt), make_results(RESULTS)
    assert evaluate_ytvis(gt, results, workers=workers) == evaluate_ytvis(gt, results)
    with pytest.raises(ValueError, match="workers must be positive"):
        evaluate_ytvis(gt, results, workers=0)
