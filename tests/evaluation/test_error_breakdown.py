"""Error breakdown: one constructed case per kind, precedence, what mending does, and agreement with the AP itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from vis.evaluation import evaluate_ytvis
from vis.evaluation.error_breakdown import BOUNDS, KINDS, ErrorBreakdown, error_breakdown
from vis.evaluation.ytvis_io import check_results, load_ground_truth

Make = Callable[..., Any]
A, B, C = (1, 1, 5, 5), (6, 6, 10, 10), (1, 8, 5, 12)  # 16 pixels each, no two touch
QUARTER = (1, 1, 3, 3)  # of A: IoU 0.25
SLIVER = (1, 1, 2, 2)  # IoU 1/16, below the foreground


@pytest.fixture
def breakdown(make_gt: Make, make_results: Make) -> Callable[..., ErrorBreakdown]:
    """Objects and predictions -> breakdown; its APs are those of the evaluation."""

    def run(objects: Sequence[Any], predictions: Sequence[Any], length: int = 4) -> ErrorBreakdown:
        gt, results = make_gt([(*each, 0) if len(each) == 3 else each for each in objects], length), predictions
        results = make_results(predictions)
        truth = load_ground_truth(gt)
        found = error_breakdown(truth, check_results(results, truth))
        expected = evaluate_ytvis(gt, results)
        assert found.ap == pytest.approx(expected.stats[0], rel=0, abs=1e-12)
        assert found.ap50 == pytest.approx(expected.stats[1], rel=0, abs=1e-12)
        return found

    return run


def only(found: ErrorBreakdown, kind: str, lost50: float, count: int = 1) -> None:
    """This kind alone occurs, and loses this AP at 0.5."""
    assert {k: v for k, v in found.count50.items() if v and k in KINDS} == {kind: count}
    assert {k: pytest.approx(v) for k, v in found.lost50.items() if v and k in KINDS} == {kind: lost50}


def test_no_errors(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown(
        [(7, 1, [A, A, None, B]), (9, 5, [B] * 4), (9, 5, [C] * 4)],
        [(7, 1, 0.4, [A, A, None, B]), (9, 5, 0.9, [B] * 4), (9, 5, 0.2, [C] * 4)],
    )
    assert (found.ap50, found.ap) == pytest.approx((1, 1))
    for numbers in (found.lost50, found.lost, found.count50):
        assert numbers == dict.fromkeys((*KINDS, *BOUNDS), 0)


def test_wrong_class(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown([(7, 1, [A] * 4)], [(7, 2, 0.9, [A] * 4)])
    only(found, "wrong_class", 1.0)
    assert found.lost["wrong_class"] == pytest.approx(1)
    assert (found.lost50["false_positive"], found.lost50["false_negative"]) == (0, pytest.approx(1))


def test_wrong_class_leaves_its_own_class_too(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """The wrong prediction ranks before a right one of class 2: mending wins in both classes."""
    found = breakdown([(7, 1, [A] * 4), (7, 2, [B] * 4)], [(7, 2, 0.9, [A] * 4), (7, 2, 0.5, [B] * 4)])
    assert found.ap50 == pytest.approx((0 + 0.5) / 2)
    only(found, "wrong_class", 0.75)


def test_poor_mask(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown([(7, 1, [A] * 4)], [(7, 1, 0.9, [QUARTER] * 4)])
    only(found, "poor_mask", 1.0)


def test_lost_object_is_a_poor_mask(breakdown: Callable[..., ErrorBreakdown]) -> None:
    only(breakdown([(7, 1, [A] * 4)], [(7, 1, 0.9, [A, None, None, None])]), "poor_mask", 1.0)


def test_poor_mask_only_at_strict_thresholds(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """IoU 12/16 = 0.75: wrong at the four thresholds above."""
    found = breakdown([(7, 1, [A] * 4)], [(7, 1, 0.9, [(1, 1, 4, 5)] * 4)])
    assert found.lost50 == dict.fromkeys((*KINDS, *BOUNDS), 0)
    assert found.lost["poor_mask"] == pytest.approx(0.4)
    assert [found.lost[kind] for kind in KINDS if kind != "poor_mask"] == [0] * 6


def test_identity_switch(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """Two tracks that swap: each is mended for another object."""
    objects = [(7, 1, [A] * 4), (7, 1, [B] * 4)]
    only(breakdown(objects, [(7, 1, 0.9, [A, A, B, B]), (7, 1, 0.8, [B, B, A, A])]), "identity_switch", 1.0, 2)


def test_identity_switch_across_a_gap(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """Where nothing is predicted, the object followed before counts: 3 of 4 frames are good."""
    objects = [(7, 1, [A] * 4), (7, 1, [B] * 4)]
    found = breakdown(objects, [(7, 1, 0.9, [A, None, B, B]), (7, 1, 0.8, [None, B, A, A])])
    only(found, "identity_switch", 1.0, 2)


def test_identity_switch_to_another_class(breakdown: Callable[..., ErrorBreakdown]) -> None:
    objects = [(7, 1, [A] * 4), (7, 5, [B] * 4)]
    only(breakdown(objects, [(7, 1, 0.9, [A, A, B, B]), (7, 5, 0.8, [B, B, A, A])]), "identity_switch", 1.0, 2)


def test_losing_most_frames_is_no_identity_switch(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """Both objects are touched, but five of eight frames are lost: no association would mend that."""
    objects = [(7, 1, [A] * 8), (7, 1, [B] * 8)]
    found = breakdown(objects, [(7, 1, 0.9, [A, A, B, *[None] * 5]), (7, 1, 0.8, [B] * 8)], 8)
    assert {k: v for k, v in found.count50.items() if v and k in KINDS} == {"poor_mask": 1}


def test_duplicate(breakdown: Callable[..., ErrorBreakdown]) -> None:
    objects = [(7, 1, [A] * 4), (7, 1, [B] * 4)]
    found = breakdown(objects, [(7, 1, 0.9, [A] * 4), (7, 1, 0.8, [A] * 4), (7, 1, 0.7, [B] * 4)])
    only(found, "duplicate", 1 - (51 + 50 * 2 / 3) / 101)
    assert found.lost50["false_positive"] == pytest.approx(found.lost50["duplicate"])


def test_duplicate_below_all_right_ones_costs_nothing(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown([(7, 1, [A] * 4)], [(7, 1, 0.9, [A] * 4), (7, 1, 0.8, [A] * 4)])
    assert (found.count50["duplicate"], found.lost50["duplicate"]) == (1, 0)


def test_background(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown([(7, 1, [A] * 4)], [(7, 1, 0.9, [B] * 4), (7, 1, 0.5, [A] * 4)])
    only(found, "background", 0.5)
    only(breakdown([(7, 1, [A] * 4)], [(7, 1, 0.9, [SLIVER] * 4), (7, 1, 0.5, [A] * 4)]), "background", 0.5)


def test_class_and_mask(breakdown: Callable[..., ErrorBreakdown]) -> None:
    objects = [(7, 1, [A] * 4), (7, 2, [B] * 4)]
    found = breakdown(objects, [(7, 2, 0.9, [QUARTER] * 4), (7, 1, 0.8, [A] * 4), (7, 2, 0.7, [B] * 4)])
    only(found, "class_and_mask", 0.25)


def test_missed(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown([(7, 1, [A] * 4), (7, 1, [B] * 4)], [(7, 1, 0.9, [A] * 4)])
    only(found, "missed", 1 - 51 / 101)
    assert found.lost50["false_negative"] == found.lost50["missed"]


def test_missed_class(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """Nothing of class 5 is found: without its objects the class counts as solved."""
    only(breakdown([(7, 1, [A] * 4), (7, 5, [B] * 4)], [(7, 1, 0.9, [A] * 4)]), "missed", 0.5)


def test_object_behind_another_error_is_not_missed(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown([(7, 1, [A] * 4), (7, 1, [B] * 4)], [(7, 1, 0.9, [QUARTER] * 4)])
    assert (found.count50["missed"], found.count50["false_negative"]) == (1, 2)
    assert found.lost50["poor_mask"] == pytest.approx(51 / 101)


def test_of_several_poor_masks_the_best_score_is_mended(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """One becomes right, the other is removed: nothing stands before the first."""
    found = breakdown([(7, 1, [A] * 4)], [(7, 1, 0.3, [QUARTER] * 4), (7, 1, 0.9, [(3, 3, 5, 5)] * 4)])
    only(found, "poor_mask", 1.0, 2)


@pytest.mark.parametrize(
    ("boxes", "kind"),
    [
        ([A] * 4, "duplicate"),
        ([C] * 4, "wrong_class"),
        ([A, A, C, C], "identity_switch"),
        ([QUARTER] * 4, "poor_mask"),
        ([(1, 8, 3, 10)] * 4, "class_and_mask"),
        ([B] * 4, "background"),
    ],
)
def test_kinds_beside_a_right_prediction(breakdown: Callable[..., ErrorBreakdown], boxes: Any, kind: str) -> None:
    """Class 1 has A, class 2 has C; the faulty prediction is of class 1 and cannot be mended, as both are found."""
    objects = [(7, 1, [A] * 4), (7, 2, [C] * 4)]
    found = breakdown(objects, [(7, 1, 0.9, [A] * 4), (7, 2, 0.8, [C] * 4), (7, 1, 0.7, boxes)])
    assert {k: v for k, v in found.count50.items() if v} == {kind: 1, "false_positive": 1}
    assert found.lost50 == dict.fromkeys((*KINDS, *BOUNDS), 0)


def test_crowds_are_no_errors(breakdown: Callable[..., ErrorBreakdown]) -> None:
    objects = [(7, 1, [B] * 4, 1), (7, 1, [A] * 4, 0), (9, 5, [C] * 4, 1)]
    found = breakdown(objects, [(7, 1, 0.9, [B] * 4), (7, 1, 0.8, [A] * 4)])
    assert found.count50 == dict.fromkeys((*KINDS, *BOUNDS), 0)
    assert found.ap == pytest.approx(1)


def test_crowds_alone_and_empty_results(breakdown: Callable[..., ErrorBreakdown]) -> None:
    found = breakdown([(7, 1, [A] * 4, 1)], [(7, 1, 0.9, [B] * 4)])
    assert (found.ap, found.lost["background"], found.count50["background"]) == (-1, 0, 1)
    found = breakdown([(7, 1, [A] * 4)], [])
    only(found, "missed", 1.0)


def random_boxes(rng: np.random.Generator, length: int) -> list[Any]:
    y, x = rng.integers(0, 7), rng.integers(0, 9)
    shifts = rng.integers(-1, 2, (length, 2)).cumsum(0)
    tops, lefts = np.clip(y + shifts[:, 0], 0, 7).tolist(), np.clip(x + shifts[:, 1], 0, 9).tolist()
    boxes = [(top, left, top + 4, left + 4) for top, left in zip(tops, lefts, strict=True)]
    return [box if rng.random() < 0.85 else None for box in boxes]


def test_random_results_lose_nothing_by_mending(breakdown: Callable[..., ErrorBreakdown]) -> None:
    """Removing all wrong predictions is worth what removing those of one kind is, at least; so with objects."""
    rng = np.random.Generator(np.random.PCG64(4))
    objects, predictions = [], []
    for video in range(12):
        for _ in range(4):
            boxes = random_boxes(rng, 6)
            objects.append((video, int(rng.choice([1, 2, 5])), boxes, int(rng.random() < 0.1)))
            other = objects[rng.integers(len(objects) - 4, len(objects))] if len(objects) > 4 else objects[-1]
            if rng.random() < 0.3:
                continue  # nothing is predicted for this one
            mixed = boxes[:3] + (other[2] if other[0] == video else boxes)[3:]
            for copy in (boxes, mixed, random_boxes(rng, 6)):
                category = objects[-1][1] if rng.random() < 0.7 else 2
                jitter = [box and (box[0] + int(rng.integers(0, 2)), *box[1:]) for box in copy]
                predictions.append((video, category, round(rng.random(), 1), jitter))
    found = breakdown(objects, predictions, 6)
    assert all(found.count50[kind] > 0 for kind in KINDS if kind != "class_and_mask"), found.count50
    assert sum(found.count50[kind] for kind in KINDS[:-1]) == found.count50["false_positive"]
    for lost, ap in ((found.lost, found.ap), (found.lost50, found.ap50)):
        assert min(lost.values()) >= 0
        assert max(lost.values()) + ap <= 1 + 1e-12
        for kind in ("duplicate", "class_and_mask", "background"):
            assert lost[kind] <= lost["false_positive"] + 1e-12
        assert lost["missed"] <= lost["false_negative"] + 1e-12
    assert json.loads(json.dumps(found.as_dict()))["lost50"].keys() == found.lost50.keys()
    assert found.table().count("\n") == 10
