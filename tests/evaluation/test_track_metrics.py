"""Track metrics: equal to TrackEval's on random tracks and on drawn videos, and cases computed by hand."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vis.data.synthetic.presets import PRESETS
from vis.data.synthetic.render import render_frame
from vis.data.synthetic.writer import video_scene
from vis.evaluation.track_metrics import (
    COUNT_NAMES,
    NUM_COUNTS,
    Frame,
    TrackMetrics,
    class_average,
    sequence_counts,
    summarize,
    track_counts,
    track_metrics,
)
from vis.evaluation.ytvis_io import check_results, load_ground_truth
from vis.structures.rle import area, encode, run_lengths

REASON = "TrackEval is not installed (make setup installs it): nothing to compare with"
A, B, C = (1, 1, 5, 5), (6, 6, 10, 10), (1, 8, 5, 12)  # three squares of 16 pixels that do not touch
Make = Callable[..., Any]
ARRAYS = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA")
SINGLE = ("IDF1", "IDR", "IDP", "MOTA", "MOTP", *COUNT_NAMES)


class Reference:
    """TrackEval's metrics on the same frames."""

    def __init__(self) -> None:
        trackeval = pytest.importorskip("trackeval", reason=REASON)
        with contextlib.redirect_stdout(io.StringIO()):
            self.metrics = [trackeval.metrics.HOTA(), trackeval.metrics.Identity(), trackeval.metrics.CLEAR()]

    def sequence(self, frames: list[Frame], num_objects: int, num_tracks: int) -> list[dict[str, Any]]:
        data = {
            "num_timesteps": len(frames),
            "num_gt_ids": num_objects,
            "num_tracker_ids": num_tracks,
            "num_gt_dets": sum(len(frame.objects) for frame in frames),
            "num_tracker_dets": sum(len(frame.tracks) for frame in frames),
            "gt_ids": [frame.objects for frame in frames],
            "tracker_ids": [frame.tracks for frame in frames],
            "similarity_scores": [frame.similarity for frame in frames],
        }
        return [metric.eval_sequence(data) for metric in self.metrics]

    def combine(self, how: str, parts: list[list[dict[str, Any]]], **options: Any) -> list[dict[str, Any]]:
        named = [{str(i): part[m] for i, part in enumerate(parts)} for m in range(len(self.metrics))]
        return [getattr(metric, how)(each, **options) for metric, each in zip(self.metrics, named, strict=True)]


def assert_equal(mine: dict[str, Any], theirs: list[dict[str, Any]]) -> None:
    merged = {**theirs[0], **theirs[1], **theirs[2]}
    for name in (*ARRAYS, *SINGLE):
        expected = np.mean(merged[name]) if name in ARRAYS else merged[name]
        assert float(mine[name]) == pytest.approx(float(expected), rel=0, abs=1e-12), name


def random_sequence(seed: int) -> tuple[list[Frame], int, int]:
    """Objects that leave and return, and tracks that follow one of them, lose it, follow another, or none."""
    rng = np.random.Generator(np.random.PCG64(seed))
    length, num_objects, num_tracks = int(rng.integers(9, 40)), int(rng.integers(1, 7)), int(rng.integers(1, 9))
    present = rng.random((length, num_objects)) < 0.8
    found = rng.random((length, num_tracks)) < 0.85
    follows = rng.integers(-1, num_objects, num_tracks)
    frames = []
    for t in range(length):
        switch = rng.random(num_tracks) < 0.12
        follows = np.where(switch, rng.integers(-1, num_objects, num_tracks), follows)
        objects, tracks = np.flatnonzero(present[t]), np.flatnonzero(found[t])
        similarity = rng.random((len(objects), len(tracks))) * (rng.random((len(objects), len(tracks))) < 0.4) * 0.6
        own = objects[:, None] == follows[tracks][None]
        similarity = np.where(own, rng.uniform(0.35, 1.0, similarity.shape), similarity)
        frames.append(Frame(objects, tracks, similarity))
    seen = np.unique(np.concatenate([frame.objects for frame in frames]))
    used = np.unique(np.concatenate([frame.tracks for frame in frames]))
    for frame in frames:
        frame.objects, frame.tracks = np.searchsorted(seen, frame.objects), np.searchsorted(used, frame.tracks)
    return frames, len(seen), len(used)


@pytest.mark.parametrize("seed", range(12))
def test_random_sequence_equals_trackeval(seed: int) -> None:
    sequence = random_sequence(seed)
    counts = sequence_counts(*sequence)
    assert counts.shape == (NUM_COUNTS,)
    assert_equal(summarize(counts), Reference().sequence(*sequence))


def test_random_sequences_hold_what_they_claim() -> None:
    rows = [summarize(sequence_counts(*random_sequence(seed))) for seed in range(12)]
    for name in ("IDSW", "Frag", "CLR_FN", "CLR_FP", "MT", "ML", "PT"):
        assert sum(row[name] for row in rows) > 0, name


def empty_cases() -> dict[str, tuple[list[Frame], int, int]]:
    one, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
    return {
        "no prediction": ([Frame(one, none, np.zeros((1, 0)))] * 3, 1, 0),
        "no object": ([Frame(none, one, np.zeros((0, 1)))] * 3, 0, 1),
        "never together": ([Frame(one, none, np.zeros((1, 0))), Frame(none, one, np.zeros((0, 1)))], 1, 1),
        "no overlap": ([Frame(one, one, np.zeros((1, 1)))] * 3, 1, 1),
    }


@pytest.mark.parametrize("case", sorted(empty_cases()))
def test_empty_cases_equal_trackeval(case: str) -> None:
    frames, num_objects, num_tracks = empty_cases()[case]
    reference = Reference()
    combined = reference.combine("combine_sequences", [reference.sequence(frames, num_objects, num_tracks)])
    assert_equal(summarize(sequence_counts(frames, num_objects, num_tracks)), combined)


def test_videos_and_classes_combine_as_in_trackeval() -> None:
    reference = Reference()
    sequences = [random_sequence(seed) for seed in range(20, 29)]
    mine = [sequence_counts(*sequence) for sequence in sequences]
    theirs = [reference.sequence(*sequence) for sequence in sequences]
    classes = [reference.combine("combine_sequences", theirs[k : k + 3]) for k in (0, 3, 6)]
    rows = np.stack([np.sum(mine[k : k + 3], axis=0) for k in (0, 3, 6)])
    for row, expected in zip(rows, classes, strict=True):
        assert_equal(summarize(row), expected)
    assert_equal(summarize(rows.sum(0)), reference.combine("combine_classes_det_averaged", classes))
    assert_equal(class_average(rows), reference.combine("combine_classes_class_averaged", classes))
    empty = reference.combine("combine_sequences", [reference.sequence(*empty_cases()["no prediction"])])
    with_empty = np.concatenate([rows, sequence_counts(*empty_cases()["no prediction"])[None]])
    expected = reference.combine("combine_classes_class_averaged", [*classes, empty])
    assert_equal(class_average(with_empty), expected)


def drawn_video(index: int, videos: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """A video of the OVIS-like preset; the predictions are its objects with faults."""
    scene = video_scene(PRESETS["synthetic_ovis"], 3, "val", index)
    masks = np.stack([render_frame(scene, t).masks for t in range(0, scene.length, 2)], axis=1)  # (N, T, H, W)
    rng = np.random.Generator(np.random.PCG64(index))
    length = masks.shape[1]
    videos["videos"].append({"id": index, "height": scene.height, "width": scene.width, "length": length})

    def codes(track: np.ndarray) -> list[dict[str, Any] | None]:
        return [encode(mask) if mask.any() else None for mask in track]

    for category, each in enumerate(masks):
        entry = {"id": len(videos["annotations"]) + 1, "video_id": index, "category_id": category % 2 + 1}
        videos["annotations"].append({**entry, "iscrowd": 0, "segmentations": codes(each)})
    found = np.roll(masks, (1, 2), axis=(2, 3))  # a bit off
    found[:, rng.random(length) < 0.15] = False  # missed
    cut = length // 2
    if len(found) > 2:
        found[0, cut:], found[2, cut:] = found[2, cut:].copy(), found[0, cut:].copy()  # an identity switch
    false = np.roll(found[:1], 31, axis=3)
    for k, each in enumerate(np.concatenate([found, false, found[:1]])):
        score = 0.2 if k == len(found) + 1 else 0.9
        category = 1 if k >= len(found) else k % 2 + 1
        results.append({"video_id": index, "category_id": category, "score": score, "segmentations": codes(each)})


@pytest.fixture(scope="module")
def drawn() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    names = ("odd", "even", "nothing")
    gt: dict[str, Any] = {"videos": [], "annotations": []}
    gt["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    results: list[dict[str, Any]] = []
    for index in (1, 2, 3):
        drawn_video(index, gt, results)
    return gt, results


def metrics_of(gt: dict[str, Any], results: list[dict[str, Any]], **options: Any) -> TrackMetrics:
    truth = load_ground_truth(gt)
    return track_metrics(truth, check_results(results, truth), **options)


def official_kit(gt: dict[str, Any], results: list[dict[str, Any]], root: Path) -> dict[str, list[dict[str, Any]]]:
    """TrackEval's own YouTube-VIS evaluation from files: class or average -> HOTA, Identity, CLEAR of all videos."""
    trackeval = pytest.importorskip("trackeval", reason=REASON)
    (root / "gt" / "youtube_vis_val").mkdir(parents=True)
    (root / "trackers" / "youtube_vis_val" / "mine" / "data").mkdir(parents=True)
    annotations = []
    for annotation in gt["annotations"]:  # it wants run lengths, areas and sizes
        masks = [m and {"size": m["size"], "counts": run_lengths(m).tolist()} for m in annotation["segmentations"]]
        areas = [m and area(m) for m in annotation["segmentations"]]
        height, width = next(m["size"] for m in masks if m)
        annotations.append({**annotation, "segmentations": masks, "areas": areas, "height": height, "width": width})
    videos = [{**v, "file_names": [f"v{v['id']}/{t}.jpg" for t in range(v["length"])]} for v in gt["videos"]]
    (root / "gt" / "youtube_vis_val" / "gt.json").write_text(
        json.dumps({**gt, "videos": videos, "annotations": annotations})
    )
    (root / "trackers" / "youtube_vis_val" / "mine" / "data" / "results.json").write_text(json.dumps(results))
    folders = {"GT_FOLDER": f"{root}/gt/", "TRACKERS_FOLDER": f"{root}/trackers/", "SPLIT_TO_EVAL": "val"}
    quiet = ("PRINT_RESULTS", "PRINT_CONFIG", "TIME_PROGRESS", "OUTPUT_SUMMARY", "OUTPUT_DETAILED", "PLOT_CURVES")
    with contextlib.redirect_stdout(io.StringIO()):
        config = {**dict.fromkeys(quiet, False), "USE_PARALLEL": False, "BREAK_ON_ERROR": True, "LOG_ON_ERROR": None}
        dataset = trackeval.datasets.YouTubeVIS(folders)
        output, _ = trackeval.Evaluator(config).evaluate([dataset], Reference().metrics)
    combined = output["YouTubeVIS"]["mine"]["COMBINED_SEQ"]
    return {name: [values["HOTA"], values["Identity"], values["CLEAR"]] for name, values in combined.items()}


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_drawn_videos_equal_the_official_kit(
    drawn: tuple[dict[str, Any], list[dict[str, Any]]], threshold: float, tmp_path: Path
) -> None:
    """The whole path, from the json files to the tables."""
    gt, results = drawn
    theirs = official_kit(gt, [r for r in results if r["score"] >= threshold], tmp_path)
    mine = metrics_of(gt, results, score_threshold=threshold, all_classes=True)
    for name in ("odd", "even", "nothing"):
        assert_equal(mine.per_class[name], theirs[name])
    assert_equal(mine.class_averaged, theirs["cls_comb_cls_av"])
    assert_equal(mine.detection_averaged, theirs["cls_comb_det_av"])
    for name in ("IDSW", "Frag", "CLR_FP", "CLR_FN"):
        assert mine.detection_averaged[name] > 0
    assert 0.1 < mine.detection_averaged["HOTA"] < 0.9


def test_classes_without_objects_are_left_out_of_the_average(
    drawn: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    """Predictions of such a class count in the average over detections alone."""
    gt, results = drawn
    false = {**results[0], "category_id": 3}
    one, all_three = (metrics_of(gt, [*results, false], all_classes=all_classes) for all_classes in (False, True))
    assert one.class_averaged["HOTA"] == pytest.approx(all_three.class_averaged["HOTA"] * 3 / 2)
    assert one.class_averaged["HOTA"] == metrics_of(gt, results).class_averaged["HOTA"]
    assert one.per_class["nothing"]["CLR_FP"] > 0
    assert one.detection_averaged == all_three.detection_averaged
    assert one.detection_averaged["HOTA"] < metrics_of(gt, results).detection_averaged["HOTA"]


def test_perfect(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A, A, None, B], 0), (9, 5, [B] * 4, 0)])
    found = metrics_of(gt, make_results([(7, 1, 0.3, [A, A, None, B]), (9, 5, 0.9, [B] * 4)]))
    assert (found.num_tracks, found.num_objects, found.score_threshold) == (2, 2, 0.3)
    for values in (found.class_averaged, found.detection_averaged, found.per_class["class1"]):
        assert [values[name] for name in (*ARRAYS, "IDF1", "MOTA", "MOTP")] == pytest.approx([1.0] * 11)
        assert (values["IDSW"], values["Frag"]) == (0, 0)
    assert found.detection_averaged["CLR_TP"] == 7
    table = found.table()
    assert "class average" in table
    assert "class2" not in table
    assert json.loads(json.dumps(found.as_dict()))["per_class"]["class5"]["HOTA"] == pytest.approx(1)


def test_swapped_identities(make_gt: Make, make_results: Make) -> None:
    """Detection is perfect, association half: each match has 2 of 6 frames in common with its pair."""
    gt = make_gt([(7, 1, [A] * 4, 0), (7, 1, [B] * 4, 0)])
    found = metrics_of(gt, make_results([(7, 1, 0.9, [A, A, B, B]), (7, 1, 0.8, [B, B, A, A])])).class_averaged
    assert (found["DetA"], found["AssA"], found["HOTA"]) == pytest.approx((1, 1 / 3, np.sqrt(1 / 3)))
    assert (found["IDSW"], found["Frag"], found["MOTA"]) == (2, 0, pytest.approx(6 / 8))
    assert (found["IDTP"], found["IDFP"], found["IDFN"], found["IDF1"]) == (4, 4, 4, 0.5)


def test_fragment(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0), (7, 1, [B] * 4, 0)])
    found = metrics_of(gt, make_results([(7, 1, 0.9, [A, None, A, A]), (7, 1, 0.8, [B] * 4)])).class_averaged
    assert (found["Frag"], found["IDSW"], found["CLR_FN"], found["CLR_FP"]) == (1, 0, 1, 0)


def test_low_scores_are_left_out(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0)])
    results = make_results([(7, 1, 0.9, [A] * 4), *[(7, 1, 0.29, [A] * 4)] * 5])
    assert metrics_of(gt, results).class_averaged["HOTA"] == pytest.approx(1)
    unselected = metrics_of(gt, results, score_threshold=0)
    assert unselected.num_tracks == 6
    assert unselected.class_averaged["DetA"] == pytest.approx(1 / 6)


def test_crowds(make_gt: Make, make_results: Make) -> None:
    """What lies in a crowd is left out, whole track or single frame, unless it matches an object."""
    crowd = (5, 5, 11, 11)  # around B
    gt = make_gt([(7, 1, [crowd] * 4, 1), (7, 1, [A] * 4, 0), (7, 1, [None, None, B, B], 0)])
    results = make_results([(7, 1, 0.9, [A] * 4), (7, 1, 0.8, [B] * 4), (7, 1, 0.7, [B, B, None, None])])
    found = metrics_of(gt, results)
    assert found.num_objects == 2
    assert (found.class_averaged["HOTA"], found.class_averaged["CLR_FP"]) == (pytest.approx(1), 0)
    half = metrics_of(gt, make_results([(7, 1, 0.8, [(1, 6, 9, 10)] * 4)]))  # half of it lies in the crowd: counts
    assert half.class_averaged["CLR_FP"] == 4


def test_classes_do_not_mix(make_gt: Make, make_results: Make) -> None:
    gt = make_gt([(7, 1, [A] * 4, 0)])
    found = metrics_of(gt, make_results([(7, 2, 0.9, [A] * 4)])).detection_averaged
    assert (found["HOTA"], found["CLR_FP"], found["CLR_FN"]) == (0, 4, 4)


def test_nothing_found(make_gt: Make) -> None:
    found = metrics_of(make_gt([(7, 1, [A, A, None, C], 0)]), [])
    assert (found.class_averaged["HOTA"], found.class_averaged["IDFN"], found.class_averaged["ML"]) == (0, 3, 1)
    assert found.num_tracks == 0


def test_counts_of_videos_add_up(drawn: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    gt, results = drawn
    truth = load_ground_truth(gt)
    counts = track_counts(truth, check_results(results, truth))
    odd = summarize(np.sum([row for (_, category), row in counts.items() if category == 1], axis=0))
    assert float(odd["HOTA"]) == metrics_of(gt, results).per_class["odd"]["HOTA"]
