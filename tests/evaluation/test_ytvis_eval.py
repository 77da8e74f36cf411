"""YouTube-VIS AP and AR: the recorded official numbers, cases computed by hand, and an independent implementation."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vis.engine.benchmarks.pairwise_evaluation import pairwise_evaluation
from vis.evaluation import NoGroundTruth, ResultsError, evaluate_ytvis
from vis.evaluation.ytvis_eval import AREA_RANGES, NAMES
from vis.structures.rle import run_lengths

A, B = (1, 1, 5, 5), (6, 6, 10, 12)  # two boxes that do not touch
Make = Callable[..., Any]


@pytest.mark.parity
def test_official_numbers(shared_dir: Path) -> None:
    folder = shared_dir / "parity" / "ytvis_eval"
    result = evaluate_ytvis(str(folder / "gt.json"), str(folder / "res.json"))
    np.testing.assert_allclose(result.stats, json.loads((folder / "stats.json").read_text()), rtol=0, atol=1e-12)


def stats(gt: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    return dict(zip(NAMES, evaluate_ytvis(gt, results).stats, strict=True))


def test_perfect(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A, A, None, B], 0), (9, 5, [B] * 4, 0)])
    result = evaluate_ytvis(gt, make_results([(7, 1, 0.3, [A, A, None, B]), (9, 5, 0.9, [B] * 4)]))
    assert result.stats == pytest.approx([1, 1, 1, 1, -1, -1, 1, 1, 1, 1, -1, -1])
    assert result.per_class == pytest.approx({"class1": 1.0, "class2": -1.0, "class5": 1.0})
    assert "nan" not in result.table() + result.copypaste()
    assert result.copypaste().splitlines()[1].startswith("copypaste: AP,AP50,AP75,APs,APm,APl,AR1,AR10")
    assert result.percent()["AP"] == pytest.approx(100)
    assert result.class_percent()["AP-class2"] == -1


@pytest.mark.parametrize("boxes", [[A, A, None, None], [(1, 1, 3, 5)] * 4], ids=["half the frames", "half the area"])
def test_half_iou_counts_at_the_lowest_threshold_only(make_gt: Make, make_results: Make, boxes: Any) -> None:
    found = stats(make_gt([(7, 1, [A] * 4, 0)]), make_results([(7, 1, 0.5, boxes)]))
    assert (found["AP"], found["AP50"], found["AP75"]) == pytest.approx((0.1, 1, 0))


def test_frames_without_object_count_in_the_union(make_gt: Make, make_results: Make) -> None:
    found = stats(make_gt([(7, 1, [A, None, None, None], 0)]), make_results([(7, 1, 0.5, [A, A, A, None])]))
    assert found["AP50"] == 0  # IoU 1/3


def test_duplicate_costs_precision(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0), (7, 1, [B] * 4, 0)])
    results = make_results([(7, 1, 0.9, [A] * 4), (7, 1, 0.8, [A] * 4), (7, 1, 0.7, [B] * 4)])
    found = stats(gt, results)
    assert found["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (found["AR1"], found["AR10"]) == (0.5, 1.0)


def test_wrong_class(make_gt: Make, make_results: Make) -> None:
    result = evaluate_ytvis(make_gt([(7, 1, [A] * 4, 0)]), make_results([(7, 2, 0.9, [A] * 4)]))
    assert result.stats[0] == 0
    assert result.per_class == {"class1": 0.0, "class2": -1.0, "class5": -1.0}


def test_identity_switch_fails_both_tracks(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0), (7, 1, [(6, 6, 10, 10)] * 4, 0)])
    a, b = A, (6, 6, 10, 10)
    found = stats(gt, make_results([(7, 1, 0.9, [a, a, b, b]), (7, 1, 0.8, [b, b, a, a])]))
    assert found["AP50"] == 0  # each IoU is 2 / 6


def test_right_shape_in_the_wrong_video(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0), (9, 1, [B] * 4, 0)])
    assert stats(gt, make_results([(9, 1, 0.9, [A] * 4), (7, 1, 0.9, [B] * 4)]))["AP"] == 0


def test_detection_on_a_crowd_is_neither_hit_nor_miss(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [B] * 4, 1), (7, 1, [A] * 4, 0)])
    two_on_crowd = [(7, 1, 0.9, [B] * 4), (7, 1, 0.8, [B] * 4), (7, 1, 0.7, [A] * 4)]
    assert stats(gt, make_results(two_on_crowd))["AP"] == pytest.approx(1)


def test_areas_in_the_file_decide_the_size_class(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0)])
    gt["annotations"][0]["areas"] = [200**2, 200**2, None, 0]
    found = stats(gt, make_results([(7, 1, 0.9, [A] * 4)]))
    assert (found["APs"], found["APm"], found["APl"]) == pytest.approx((-1, 1, -1))


def test_empty_results_are_zero_with_a_line(make_gt: Make, caplog: pytest.LogCaptureFixture) -> None:
    result = evaluate_ytvis(make_gt([(7, 1, [A] * 4, 0)]), [])
    assert result.stats == [0, 0, 0, 0, -1, -1, 0, 0, 0, 0, -1, -1]
    assert "AP is 0" in caplog.text


def test_missing_videos(make_gt: Make, make_results: Make, caplog: pytest.LogCaptureFixture) -> None:
    gt, results = make_gt([(7, 1, [A] * 4, 0), (9, 1, [A] * 4, 0)]), make_results([(7, 1, 0.9, [A] * 4)])
    assert evaluate_ytvis(gt, results).stats[8] == 0.5
    assert "1 of 2 videos" in caplog.text
    with pytest.raises(ResultsError, match="1 of 2 videos"):
        evaluate_ytvis(gt, results, allow_missing=False)


@pytest.mark.parametrize("annotations", ["absent", None, []])
def test_no_annotations(make_gt: Make, annotations: Any) -> None:
    gt = make_gt([])
    del gt["annotations"]
    if annotations != "absent":
        gt["annotations"] = annotations
    with pytest.raises(NoGroundTruth, match="no annotations"):
        evaluate_ytvis(gt, [])


def test_order_of_the_file_breaks_ties(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0)])
    good, bad = (7, 1, 0.5, [A] * 4), (7, 1, 0.5, [B] * 4)
    assert stats(gt, make_results([good, bad]))["AP"] == pytest.approx(1)
    assert stats(gt, make_results([bad, good]))["AP"] == pytest.approx(0.5)


def test_of_equally_good_objects_the_last_is_taken(make_gt: Make, make_results: Make) -> None:
    left, right = (1, 1, 5, 5), (1, 5, 5, 9)
    gt = make_gt([(7, 1, [left] * 4, 0), (7, 1, [right] * 4, 0)])
    for entry in gt["annotations"]:
        entry["id"] += 1
    both = (7, 1, 0.9, [(1, 1, 5, 9)] * 4)
    for second, recall in ((left, 0.55), (right, 0.5)):
        results = make_results([both, (7, 1, 0.5, [second] * 4)])
        assert stats(gt, results)["AR10"] == pytest.approx(recall)
        assert pairwise_evaluation(gt, results)[0] == pytest.approx(evaluate_ytvis(gt, results).stats, rel=0, abs=1e-12)


def random_rectangles(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, 3)):
        y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[y : y + rng.integers(10, 290), x : x + rng.integers(10, 390)] = 1
    return mask


@pytest.mark.parametrize("seed", [0, 1])
def test_single_frames_equal_coco(seed: int) -> None:
    """pycocotools' COCOeval on images: same numbers as on videos of one frame, ties and all area ranges included."""
    rng = np.random.default_rng(seed)
    height, width, categories = 301, 413, (1, 3, 4, 9)
    images = [{"id": int(i), "height": height, "width": width} for i in rng.permutation(20) + 1]
    objects, predictions = [], []
    for image in images:
        for _ in range(rng.integers(0, 7)):
            mask = random_rectangles(rng, height, width)
            category = int(rng.choice(categories[:3]))
            rle = mask_utils.encode(np.asfortranarray(mask))
            objects.append((image["id"], category, rle))
            for _ in range(rng.integers(0, 4)):
                shifted = np.roll(mask, tuple(rng.integers(-12, 13, 2)), (0, 1))
                guess = int(rng.choice(categories)) if rng.random() < 0.2 else category
                score = float(rng.integers(0, 8)) / 8
                predictions.append((image["id"], guess, score, mask_utils.encode(np.asfortranarray(shifted))))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = coco_stats(images, categories, objects, predictions)
    gt = {
        "videos": [{**image, "length": 1} for image in images],
        "categories": [{"id": c, "name": str(c)} for c in categories],
        "annotations": [
            {"id": n + 1, "video_id": i, "category_id": c, "segmentations": [rle]}
            for n, (i, c, rle) in enumerate(objects)
        ],
    }
    results = [{"video_id": i, "category_id": c, "score": s, "segmentations": [rle]} for i, c, s, rle in predictions]
    found = evaluate_ytvis(gt, results).stats
    assert 0 < found[0] < 1
    assert min(found) >= 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def coco_stats(images: Any, categories: Any, objects: Any, predictions: Any) -> np.ndarray:
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": images,
        "categories": [{"id": c, "name": str(c)} for c in categories],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": c, "segmentation": rle, "iscrowd": 0}
            | {"area": int(mask_utils.area(rle)), "bbox": mask_utils.toBbox(rle).tolist()}
            for n, (i, c, rle) in enumerate(objects)
        ],
    }
    coco.createIndex()
    found = [{"image_id": i, "category_id": c, "score": s, "segmentation": rle} for i, c, s, rle in predictions]
    evaluation = COCOeval(coco, coco.loadRes(found), "segm")
    evaluation.params.areaRng = AREA_RANGES.tolist()
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A ground truth and results with everything that the format allows and that happens."""
    rng = np.random.default_rng(seed)
    height, width = (311, 297) if seed % 3 else (37, 41)  # with objects of all sizes, or quick
    many = seed % 5 == 0  # over 100 predictions of a category in a video
    categories = sorted(rng.choice(90, 5, replace=False).tolist(), reverse=bool(seed % 2))
    videos = (rng.permutation(4) * 7 + 3).tolist()
    lengths = {video: int(rng.integers(1, 5)) for video in videos}
    pool: list[dict[str, Any]] = []
    for _ in range(12):
        mask = np.zeros((height, width), np.uint8)
        for _ in range(rng.integers(0, 3)):  # with none it has no pixel
            y, x = rng.integers(0, height), rng.integers(0, width)
            mask[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] = 1
        pool.append(mask_utils.encode(np.asfortranarray(mask)))

    def masks(length: int) -> list[Any]:
        missing = rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1])
        first = rng.integers(len(pool))
        chosen = [pool[first if rng.random() < 0.7 else rng.integers(len(pool))] for _ in range(length)]
        return [None if rng.random() < missing else mask for mask in chosen]

    def stored(mask: Any) -> Any:
        kind = rng.integers(4) if mask else 0
        if kind == 1:
            return {"size": [height, width], "counts": run_lengths(mask).tolist()}
        return {"size": [height, width], "counts": mask["counts"].decode()} if kind == 2 else mask

    def polygon() -> list[list[float]]:
        return [rng.uniform(0, 30, 6).tolist()]

    annotations, results = [], []
    for video in videos[1:]:  # one without objects
        for _ in range(rng.integers(0, 9)):
            tube = masks(lengths[video])
            entry: dict[str, Any] = {
                "id": len(annotations) + 1,
                "video_id": video,
                "category_id": int(rng.choice(categories[1:])),  # one without objects
                "segmentations": [polygon() if mask and rng.random() < 0.05 else stored(mask) for mask in tube],
            }
            if rng.random() < 0.8:
                entry["iscrowd"] = int(rng.random() < 0.2)
            if rng.random() < 0.6:
                areas = [None if mask is None else int(mask_utils.area(mask)) for mask in tube]
                entry["areas"] = [None, areas, [(area or 0) * 1.7 for area in areas]][rng.integers(3)]
            annotations.append(entry)
    for video in videos[:-1]:  # one without predictions
        for _ in range(240 if many else rng.integers(0, 25)):
            near = [a for a in annotations if a["video_id"] == video]
            copy = rng.choice(near) if near and rng.random() < 0.4 else None  # type: ignore[arg-type]
            tube = masks(lengths[video])
            if copy is not None:
                tube = [
                    old if isinstance(old, dict) and isinstance(old["counts"], bytes) and rng.random() < 0.8 else new
                    for old, new in zip(copy["segmentations"], tube, strict=True)
                ]
            category = rng.choice(categories[:2] if many else categories)
            score = rng.integers(0, 6) / 6 if seed % 2 else rng.random()
            results.append(
                {"video_id": video, "category_id": int(category if copy is None else copy["category_id"])}
                | {"score": float(score), "segmentations": tube}
            )
    gt = {
        "videos": [{"id": v, "height": height, "width": width, "length": lengths[v]} for v in videos],
        "categories": [{"id": c, "name": f"class{c}"} for c in categories],
        "annotations": annotations,
    }
    return gt, results


@pytest.mark.parametrize("start", range(0, 60, 10))
def test_random_cases_equal_the_step_by_step_evaluation(start: int) -> None:
    """Crowds, ties, empty videos and categories, over 100 predictions, missing frames, masks of no pixel, areas that
    are null or foreign, ids with gaps and in any order, RLE of every form, polygons."""
    measured = 0
    for seed in range(start, start + 10):
        gt, results = random_case(seed)
        if not gt["annotations"]:
            continue
        expected, per_class = pairwise_evaluation(gt, results)
        found = evaluate_ytvis(gt, results)
        np.testing.assert_allclose(found.stats, expected, rtol=0, atol=1e-12, err_msg=f"seed {seed}")
        wanted = {f"class{category}": value for category, value in per_class.items()}
        assert found.per_class == pytest.approx(wanted, rel=0, abs=1e-12), seed
        assert list(found.per_class) == list(wanted)
        measured += expected[0] > 0
    assert measured >= 5


@pytest.mark.parity
def test_step_by_step_evaluation_is_the_official_one(shared_dir: Path) -> None:
    folder = shared_dir / "parity" / "ytvis_eval"
    gt, results, stats = (json.loads((folder / f"{name}.json").read_text()) for name in ("gt", "res", "stats"))
    np.testing.assert_allclose(pairwise_evaluation(gt, results)[0], stats, rtol=0, atol=1e-12)
