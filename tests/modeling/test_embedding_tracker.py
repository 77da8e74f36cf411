"""MaskTrack R-CNN's association on hand-made numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch

from vis.modeling.heads.track_embedding import MatchLogits
from vis.modeling.trackers.embedding import EmbeddingState, EmbeddingTracker, TrackedDetections, _greedy, _hungarian

HERE, THERE, FAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [50.0, 50.0, 60.0, 70.0]


def tracker(**options: Any) -> EmbeddingTracker:
    return EmbeddingTracker(**{"logits": MatchLogits(), **options})


def found(*rows: tuple[list[float], float, int, Sequence[float]]) -> TrackedDetections:
    """(box, score, class, embedding) each."""
    if not rows:
        return TrackedDetections(
            torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2)
        )
    boxes, scores, labels, embeds = zip(*rows, strict=True)
    return TrackedDetections(
        torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), torch.tensor(embeds, dtype=torch.float32)
    )


def run(model: EmbeddingTracker, frames: Sequence[TrackedDetections]) -> tuple[list[list[int]], EmbeddingState]:
    state, ids = None, []
    for frame in frames:
        of_frame, state = model(frame, state)
        ids.append(of_frame)
    return ids, state


def test_the_score_by_hand() -> None:
    _, state = run(tracker(), [found((HERE, 0.9, 2, [1.0, 2.0]), (FAR, 0.8, 5, [-1.0, 0.5]))])
    scores = tracker().scores(found((THERE, 0.6, 2, [0.5, 1.5])), state)
    logits = [0.0, 0.5 + 3.0, -0.5 + 0.75]
    log_sum = math.log(sum(math.exp(x) for x in logits))
    expected = [
        logits[0] - log_sum + math.log(0.6) + 0 + 10,
        logits[1] - log_sum + math.log(0.6) + 2 * 0.5 + 10,
        logits[2] - log_sum + math.log(0.6) + 0 + 0,
    ]
    torch.testing.assert_close(scores, torch.tensor([expected]))
    weighted = tracker(coefficients=(0.5, 3.0, 7.0)).scores(found((THERE, 0.6, 2, [0.5, 1.5])), state)
    assert float(weighted[0, 1]) == pytest.approx(logits[1] - log_sum + 0.5 * math.log(0.6) + 3 * 0.5 + 7)


def test_first_detections_are_new_and_embeddings_decide() -> None:
    first = found((HERE, 0.9, 0, [3.0, 0.0]), (HERE, 0.8, 0, [0.0, 3.0]))
    second = found((HERE, 0.9, 0, [0.0, 3.0]), (HERE, 0.8, 0, [3.0, 0.0]), (HERE, 0.7, 0, [-3.0, -3.0]))
    ids, state = run(tracker(), [found(), first, second])
    assert ids == [[], [0, 1], [1, 0, 2]]
    assert state.frame == 3
    assert sorted(state.objects) == [0, 1, 2]


def test_another_class_is_a_new_object() -> None:
    ids, _ = run(tracker(), [found((HERE, 0.9, 0, [1.0, 1.0])), found((HERE, 0.9, 1, [1.0, 1.0]))])
    assert ids == [[0], [1]]
    ids, _ = run(
        tracker(coefficients=(1.0, 2.0, 0.0)), [found((HERE, 0.9, 0, [1.0, 1.0])), found((HERE, 0.9, 1, [1.0, 1.0]))]
    )
    assert ids == [[0], [0]]


def test_two_want_one_object() -> None:
    first = found((HERE, 0.9, 0, [2.0, 2.0]))
    better_first = found((HERE, 0.9, 0, [2.0, 2.0]), (THERE, 0.8, 0, [2.0, 2.0]))
    ids, state = run(tracker(), [first, better_first])
    assert ids == [[0], [0, -1]]
    assert state.objects[0].box.tolist() == HERE
    # the second fits better although its detection score is lower: it takes the object over
    better_last = found((FAR, 0.5, 0, [2.0, 2.0]), (HERE, 0.45, 0, [3.0, 3.0]))
    ids, state = run(tracker(), [first, better_last])
    assert ids == [[0], [-1, 0]]
    assert state.objects[0].embed.tolist() == [3.0, 3.0]
    assert state.next_id == 1  # the dropped one becomes nothing


def test_greedy_settles_ties_and_chains() -> None:
    assert _greedy(torch.tensor([[0.0, 2.0], [0.0, 2.0]])) == [1, -1]  # not better is not enough
    scores = torch.tensor([[0.0, 1.0, 0.5], [0.0, 2.0, 1.9], [3.0, 2.5, 0.0], [0.0, 3.0, 0.0], [9.0, 0.0, 0.0]])
    assert _greedy(scores) == [-1, -1, 0, 1, 0]


def test_hungarian_is_the_best_sum() -> None:
    torch.manual_seed(0)
    for rows, known in ((1, 4), (3, 2), (4, 3)):
        scores = torch.randn(rows, 1 + known)
        columns = _hungarian(scores)
        total = sum(float(scores[row, column]) for row, column in enumerate(columns))
        choices = list(range(1, known + 1)) + [0] * rows
        best = max(
            sum(float(scores[row, column]) for row, column in enumerate(order))
            for order in set(permutations(choices, rows))
        )
        assert total == pytest.approx(best)
        assert len({column for column in columns if column}) == sum(column > 0 for column in columns)


def test_hungarian_gives_the_second_its_second_best() -> None:
    first = found((HERE, 0.9, 0, [2.0, 0.0]), (HERE, 0.9, 0, [1.5, 0.0]))
    second = found((HERE, 0.9, 0, [2.0, 0.0]), (HERE, 0.8, 0, [1.9, 0.0]))
    assert run(tracker(), [first, second])[0][1] == [0, -1]
    assert sorted(run(tracker(assignment="hungarian"), [first, second])[0][1]) == [0, 1]


def test_memory_is_of_the_last_detection() -> None:
    frames = [found((HERE, 0.9, 1, [2.0, 2.0])), found((THERE, 0.8, 2, [4.0, 2.0]))]
    loose = (1.0, 2.0, 0.0)
    _, state = run(tracker(coefficients=loose), frames)
    item = state.objects[0]
    assert (item.embed.tolist(), item.box.tolist(), item.label, item.last_frame) == ([4.0, 2.0], THERE, 1, 1)
    _, state = run(tracker(coefficients=loose, update_label=True, momentum=0.25), frames)
    item = state.objects[0]
    assert (item.embed.tolist(), item.label) == ([2.5, 2.0], 2)


@pytest.mark.parametrize(("missed", "same"), [(19, True), (20, False)])
def test_an_object_is_forgotten_after_twenty_frames(missed: int, same: bool) -> None:
    one = found((HERE, 0.9, 0, [2.0, 2.0]))
    frames = [one, *[found()] * missed, one]
    ids, _ = run(tracker(memory_frames=20), frames)
    assert ids[-1] == ([0] if same else [1])
    assert run(tracker(), frames)[0][-1] == [0]  # as published it is never forgotten


def test_a_forgotten_id_is_not_given_again() -> None:
    one, other = found((HERE, 0.9, 0, [2.0, 2.0])), found((FAR, 0.9, 1, [-2.0, 2.0]))
    ids, state = run(tracker(memory_frames=2), [one, other, other, one, one])
    assert ids == [[0], [1], [1], [2], [2]]
    assert sorted(state.objects) == [2]


def test_cosine_with_iou_within_the_class() -> None:
    model = tracker(score="cosine", threshold=0.4)
    _, state = run(model, [found((HERE, 0.9, 0, [3.0, 0.0]), (FAR, 0.9, 1, [3.0, 0.0]))])
    scores = model.scores(found((THERE, 0.3, 0, [5.0, 5.0])), state)
    assert scores[0, :2].tolist() == pytest.approx([0.4, math.sqrt(0.5) + 0.5])
    assert float(scores[0, 2]) < -1e5
    ids = [model(found((box, 0.9, 0, embed)), EmbeddingState(1, 1, dict(list(state.objects.items())[:1])))[0]
           for box, embed in ((FAR, [0.3, 1.0]), (FAR, [1.0, 1.0]))]  # fmt: skip
    assert ids == [[1], [0]]


def test_one_video_does_not_know_another() -> None:
    model = tracker()
    one, two = found((HERE, 0.9, 0, [2.0, 2.0])), found((HERE, 0.9, 0, [2.0, 2.0]), (FAR, 0.5, 3, [1.0, -1.0]))
    a, state_a = model(one, None)
    b, state_b = model(two, None)
    c, _ = model(one, state_a)
    d, _ = model(two, state_b)
    assert (a, b, c, d) == ([0], [0, 1], [0], [0, 1])
    assert not list(model.state_dict())


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"MODEL.MASKTRACK.ASSIGNMENT is 'best'"):
        tracker(assignment="best")
    with pytest.raises(ValueError, match=r"MODEL.MASKTRACK.SCORE is 'iou'"):
        tracker(score="iou")
    for options in ({"memory_frames": -1}, {"momentum": 0.0}):
        with pytest.raises(ValueError, match=r"MEMORY_FRAMES"):
            tracker(**options)
