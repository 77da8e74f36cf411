"""Comparison of two result files: exact on all videos, exact on drawn videos, and what the intervals say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vis.evaluation import evaluate_ytvis
from vis.evaluation.ap_curve import average_precision
from vis.evaluation.compare import METRICS, MIN_VIDEOS, Comparison, _measure, _side, _weights, compare_tracks
from vis.evaluation.track_metrics import track_metrics
from vis.evaluation.ytvis_io import check_results, load_ground_truth

Make = Callable[..., Any]
A, B = (1, 1, 5, 5), (6, 6, 10, 10)


def compare(gt: dict[str, Any], a: list[Any], b: list[Any], **options: Any) -> Comparison:
    truth = load_ground_truth(gt)
    return compare_tracks(truth, check_results(a, truth), check_results(b, truth), **options)


def random_data(make_gt: Make, make_results: Make, seed: int, digits: int = 1) -> tuple[Any, Any, Any]:
    """Objects of three classes, and two result files with faults, crowds and, with one digit, equal scores; 9 videos,
    of which the first has no objects."""
    rng = np.random.Generator(np.random.PCG64(seed))
    objects, files = [], ([], [])
    for video in range(1, 9):
        for _ in range(int(rng.integers(1, 5))):
            y, x = rng.integers(0, 7, 2).tolist()
            boxes = [(y, x, y + 4, x + 4) if rng.random() < 0.8 else None for _ in range(4)]
            category = int(rng.choice([1, 2, 5]))
            objects.append((video, category, boxes, int(rng.random() < 0.15)))
            for file, shift in zip(files, (1, 2), strict=True):
                for _ in range(int(rng.integers(0, 4))):
                    moved = [box and (box[0] + int(rng.integers(0, shift + 1)), *box[1:]) for box in boxes]
                    found = category if rng.random() < 0.8 else 1
                    file.append((video, found, round(rng.random(), digits), moved))
    gt = make_gt(objects)
    gt["videos"].append({**gt["videos"][0], "id": 0})
    return gt, make_results(files[0]), make_results(files[1])


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_the_evaluation(make_gt: Make, make_results: Make, seed: int) -> None:
    gt, *files = random_data(make_gt, make_results, seed)
    found = compare(gt, *files, bootstrap=2)
    for side, results in zip("ab", files, strict=True):
        expected = evaluate_ytvis(gt, results)
        truth = load_ground_truth(gt)
        tracks = track_metrics(truth, check_results(results, truth))
        values = [getattr(found.overall[name], side) for name in METRICS]
        wanted = [expected.stats[0], expected.stats[1], expected.stats[7], tracks.class_averaged["HOTA"]]
        assert values == pytest.approx(wanted, rel=0, abs=1e-12)
        for name, each in found.per_class.items():
            ap = expected.per_class[name]
            assert getattr(each["AP"], side) == pytest.approx(np.nan if ap < 0 else ap, rel=0, abs=1e-12, nan_ok=True)
    for each in (found.overall, *found.per_class.values()):
        for value in each.values():
            assert value.difference == pytest.approx(value.b - value.a, nan_ok=True)


@pytest.mark.parity
def test_value_on_the_recorded_results(shared_dir: Path) -> None:
    folder = shared_dir / "parity" / "ytvis_eval"
    gt, results = (json.loads((folder / name).read_text()) for name in ("gt.json", "res.json"))
    stats = json.loads((folder / "stats.json").read_text())
    found = compare(gt, [], results, bootstrap=3)
    assert [found.overall[name].b for name in METRICS[:3]] == pytest.approx(
        [stats[0], stats[1], stats[7]], rel=0, abs=1e-12
    )
    assert found.overall["AP"].a == 0


def copied(gt: dict[str, Any], results: list[Any], times: list[int]) -> tuple[dict[str, Any], list[Any]]:
    """The data set in which the videos occur so often, each copy under an id of its own."""
    videos, annotations, predictions = [], [], []
    for video, count in zip(sorted(gt["videos"], key=lambda v: v["id"]), times, strict=True):
        for copy in range(count):
            new = video["id"] * 100 + copy
            videos.append({**video, "id": new})
            annotations += [{**a, "video_id": new} for a in gt["annotations"] if a["video_id"] == video["id"]]
            predictions += [{**r, "video_id": new} for r in results if r["video_id"] == video["id"]]
    return {**gt, "videos": videos, "annotations": annotations}, predictions


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_equals_the_evaluation_of_the_drawn_videos(make_gt: Make, make_results: Make, seed: int) -> None:
    gt, results, _ = random_data(make_gt, make_results, seed, digits=9)
    truth = load_ground_truth(gt)
    videos = sorted(truth.videos)
    side = _side(truth, videos, check_results(results, truth), 0.3)
    objects = [
        [sum(not t.ignore for t in truth.tracks.get((video, c), [])) for c in truth.categories] for video in videos
    ]
    (weights,) = _weights(len(videos), 5, seed)
    assert (weights.sum(1) == len(videos)).all()
    measured = _measure(side, np.array(objects, float), weights)
    for values, times in zip(measured, weights.astype(int).tolist(), strict=True):
        drawn_gt, drawn = copied(gt, results, times)
        expected = evaluate_ytvis(drawn_gt, drawn)
        drawn_truth = load_ground_truth(drawn_gt)
        hota = track_metrics(drawn_truth, check_results(drawn, drawn_truth)).class_averaged["HOTA"]
        wanted = [expected.stats[0], expected.stats[1], expected.stats[7], hota]
        assert values[:, 0] == pytest.approx(wanted, rel=0, abs=1e-12)
        per_class = [np.nan if ap < 0 else ap for ap in expected.per_class.values()]
        assert values[0, 1:] == pytest.approx(per_class, rel=0, abs=1e-12, nan_ok=True)


def test_identical_files_differ_by_nothing(make_gt: Make, make_results: Make) -> None:
    gt, results, _ = random_data(make_gt, make_results, 5)
    found = compare(gt, results, results, bootstrap=100)
    for each in (found.overall, *found.per_class.values()):
        for value in each.values():
            assert value.difference == 0
            assert (value.low, value.high, value.p) == (0, 0, 1) or value.num_videos < MIN_VIDEOS
    assert found.overall["AP"].num_videos == 8
    assert found.overall["AP"].p == 1
    assert sum(each["HOTA"].p == 1 for each in found.per_class.values()) == 1
    assert found.overall["AP"].draws == 100


def test_strictly_better(make_gt: Make, make_results: Make) -> None:
    """B finds all, A loses a quarter of each track: better in every draw."""
    videos = range(1, 13)
    gt = make_gt([(video, 1, [A] * 4, 0) for video in videos])
    gt["videos"] = [video for video in gt["videos"] if video["id"] in videos]
    a = make_results([(video, 1, 0.9, [A, A, A, None]) for video in videos])
    b = make_results([(video, 1, 0.9, [A] * 4) for video in videos])
    found = compare(gt, a, b, bootstrap=99)
    ap = found.overall["AP"]
    # IoU 0.75: right at six of ten thresholds
    assert (ap.a, ap.b, ap.difference, ap.low, ap.high) == pytest.approx((0.6, 1, 0.4, 0.4, 0.4))
    assert ap.p == pytest.approx(2 / 100)
    assert found.overall["HOTA"].difference > 0
    assert found.overall["AP50"].p == 1
    back = compare(gt, b, a, bootstrap=99).overall["AP"]
    assert (back.difference, back.low, back.p) == pytest.approx((-0.4, -0.4, 0.02))


def test_known_interval(make_gt: Make, make_results: Make) -> None:
    """Ten videos with one object each, B finds that of one video more. A draw has it k times, k binomial(10, 1/10), and
    with all scores equal and no false positives AP50 is the interpolated share of found objects."""
    videos = range(1, 11)
    gt = make_gt([(video, 1, [A] * 4, 0) for video in videos])
    gt["videos"] = [video for video in gt["videos"] if video["id"] in videos]
    a = make_results([(video, 1, 0.9, [A] * 4) for video in range(1, 6)])
    b = make_results([(video, 1, 0.9, [A] * 4) for video in range(1, 7)])
    found = compare(gt, a, b, bootstrap=4000, seed=3)
    value = found.overall["AR10"]
    assert (value.a, value.b, value.difference) == pytest.approx((0.5, 0.6, 0.1))
    assert (value.low, value.high) == pytest.approx((0, 0.3))  # k = 0 and k = 3: P(k = 0) = 0.35, P(k > 3) = 0.013
    assert value.p == pytest.approx(2 * 0.9**10, abs=0.03)
    assert found.overall["AP50"].difference == pytest.approx((61 - 51) / 101)


def test_deterministic(make_gt: Make, make_results: Make) -> None:
    gt, a, b = random_data(make_gt, make_results, 6)
    assert str(compare(gt, a, b, bootstrap=270, seed=4)) == str(compare(gt, a, b, bootstrap=270, seed=4))
    assert str(compare(gt, a, b, bootstrap=270, seed=4)) != str(compare(gt, a, b, bootstrap=270, seed=5))


def test_order_of_the_predictions_in_a_file_does_not_shift_the_draws(make_gt: Make, make_results: Make) -> None:
    gt, a, b = random_data(make_gt, make_results, 7)
    values = [compare(gt, a, each, bootstrap=40).overall["HOTA"].high for each in (b, sorted(b, key=json.dumps))]
    assert values[0] == pytest.approx(values[1], abs=0.02)


def test_class_in_few_videos(make_gt: Make, make_results: Make) -> None:
    """Of one video there is no spread: an interval would be a point that is far too sure. Other classes have one."""
    gt = make_gt([(1, 1, [A] * 4, 0), *[(video, 2, [B] * 4, 0) for video in range(2, 7)]])
    gt["videos"] = gt["videos"][:6]
    results = make_results([(1, 1, 0.9, [A] * 4), (2, 2, 0.9, [B] * 4)])
    found = compare(gt, [], results, bootstrap=300)
    rare, frequent = (found.per_class[name]["AP"] for name in ("class1", "class2"))
    assert (rare.difference, rare.num_videos) == (pytest.approx(1), 1)
    assert 0 < rare.draws < 300
    assert np.isnan([rare.low, rare.high, rare.p]).all()
    assert frequent.num_videos == 5
    assert frequent.low < frequent.difference < frequent.high
    assert np.isnan(found.per_class["class5"]["AP"].difference)
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert content["per_class"]["class5"]["AP"]["a"] is None
    assert content["per_class"]["class1"]["AP"]["low"] is None
    lines = found.table().splitlines()
    assert not any(line.startswith("AP-class5") for line in lines)
    assert next(line for line in lines if line.startswith("AP-class1")).endswith("too few videos")


@pytest.mark.parametrize("options", [{"bootstrap": 0}, {"seed": -1}])
def test_bad_options(make_gt: Make, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 draw"):
        compare(make_gt([(7, 1, [A] * 4, 0)]), [], [], **options)


def test_average_precision_of_nothing() -> None:
    found = average_precision(np.zeros((2, 0)), np.zeros((2, 0)), np.array([3.0, 0.0]))
    assert found[0] == 0
    assert np.isnan(found[1])
