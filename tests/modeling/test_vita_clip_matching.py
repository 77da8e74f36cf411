"""Windows of a video joined to tracks: identities, means over windows, candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vis.modeling.trackers.clip_matching import ClipMatcher, ClipState, Tracklets, soft_iou

CLASSES, HEIGHT, WIDTH, LENGTH, STRIDE = 5, 10, 14, 18, 3


def matcher(**changes: Any) -> ClipMatcher:
    options: dict[str, Any] = {
        "score": "ifc",
        "threshold": 0.05,
        "reid": 0.0,
        "topk": 4,
        "max_num": 6,
        "min_score": 0.01,
    }
    return ClipMatcher(**{**options, **changes})


def scene(frames: int, hidden: dict[int, range]) -> Tensor:
    """Three squares that move over a small picture, (T, 3, P) logits; ``hidden``: object -> frames it is not in."""
    logits = torch.full((frames, 3, HEIGHT, WIDTH), -8.0)
    for t in range(frames):
        for c in range(3):
            if t in hidden.get(c, ()):
                continue
            top, left = 3 * c, round((WIDTH - 4) * (0.5 + 0.5 * torch.sin(torch.tensor(0.1 * t + c)).item()))
            logits[t, c, top : top + 3, left : left + 4] = 8.0
    return logits.flatten(2)


def tracklets(seed: int, objects: list[int], *, extra: int = 1) -> Tracklets:
    """Objects in an order of the window's own and ``extra`` queries of no object; mask embeddings pick a channel."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(objects), generator=generator).tolist()
    chosen = [objects[i] for i in order]
    probabilities = torch.full((len(chosen) + extra, CLASSES + 1), 0.02)
    probabilities[:, -1] = 0.95
    for row, c in enumerate(chosen):
        probabilities[row] = 0.02
        probabilities[row, c + 1] = 0.9 - 0.1 * c
    embeds = torch.zeros(len(probabilities), 3)
    embeds[torch.arange(len(chosen)), chosen] = 1.0
    embeds[len(chosen) :] = -1.0  # negative where the objects are: near nothing
    sims = torch.zeros(len(probabilities), 4)
    sims[torch.arange(len(chosen)), chosen] = 3.0
    return Tracklets(probabilities, embeds, sims)


def starts(frames: int) -> list[int]:
    last = max(0, frames - LENGTH)
    return [*range(0, last, STRIDE), last]


def join(frames: int, hidden: dict[int, range], **changes: Any) -> tuple[ClipState, Tensor]:
    """All windows of a scene; an object is found in the windows where it can be seen."""
    joined, features, state = matcher(**{"topk": 0, **changes}), scene(frames, hidden), ClipState()
    for start in starts(frames):
        end = min(start + LENGTH, frames)
        there = [c for c in range(3) if any(t not in hidden.get(c, ()) for t in range(start, end))]
        found = joined.candidates(tracklets(start, there))
        assert len(found) == len(there)
        joined.join(state, found, start, end, features[start:end])
    return state, features


def objects_of(state: ClipState) -> list[int]:
    """Which object each track is, by its class."""
    return (state.class_probabilities().argmax(dim=1) - 1).tolist()


def presence(state: ClipState, track: int, frames: int) -> list[bool]:
    return [bool(state.mask_embeds(t, [track])[1][0]) for t in range(frames)]


@pytest.mark.parametrize("score", ["ifc", "masktrack"])
@pytest.mark.parametrize("frames", [7, 18, 19, 20, 21, 22, 61])
def test_objects_that_stay_keep_their_tracks(frames: int, score: str) -> None:
    state, features = join(frames, {}, score=score)
    assert sorted(objects_of(state)) == [0, 1, 2]
    assert len(state.windows) == 1 + max(0, -(-(frames - LENGTH) // STRIDE))
    for track, c in enumerate(objects_of(state)):
        assert all(presence(state, track, frames))
        for t in range(frames):
            embeds, _ = state.mask_embeds(t, [track])
            torch.testing.assert_close(embeds @ features[t], features[t, c][None])
        assert float(state.class_probabilities()[track, c + 1]) == pytest.approx(0.9 - 0.1 * c)


@pytest.mark.parametrize("score", ["ifc", "masktrack"])
def test_an_object_that_leaves_for_less_than_the_overlap_keeps_its_track(score: str) -> None:
    state, _ = join(50, {1: range(20, 25)}, score=score)
    assert sorted(objects_of(state)) == [0, 1, 2]


def test_an_object_that_leaves_for_longer_than_a_window_comes_back_as_another() -> None:
    frames, gone = 80, range(25, 55)
    state, _ = join(frames, {1: gone})
    found = objects_of(state)
    assert sorted(found) == [0, 1, 1, 2]
    first, second = (track for track, c in enumerate(found) if c == 1)
    before, after = presence(state, first, frames), presence(state, second, frames)
    assert all(before[:25])
    assert all(after[55:])
    assert not any(before[45:])
    assert not any(after[:35])
    stays = found.index(0)
    assert all(presence(state, stays, frames))


def test_or_is_known_again_where_likeness_is_asked() -> None:
    frames, gone = 80, range(25, 55)
    state, _ = join(frames, {1: gone}, reid=0.5)
    assert sorted(objects_of(state)) == [0, 1, 2]
    found = presence(state, objects_of(state).index(1), frames)
    assert all(found[:25])
    assert all(found[55:])
    # unlike things are not taken up
    assert sorted(objects_of(join(frames, {1: gone}, reid=1.0)[0])) == [0, 1, 1, 2]


def test_means_over_the_windows_of_a_frame() -> None:
    state = ClipState()
    embeds = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    p = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]])
    state.place(0, 5, Tracklets(p, embeds, embeds), torch.tensor([0, 1]))
    state.place(3, 8, Tracklets(p, embeds * 3, embeds), torch.tensor([1, 2]))
    torch.testing.assert_close(state.class_probabilities(), torch.tensor([[0.2, 0.3], [0.4, 0.2], [0.6, 0.1]]))
    found, there = state.mask_embeds(4, [2, 1, 0])
    assert there.tolist() == [True, True, True]
    torch.testing.assert_close(found, torch.stack([embeds[1] * 3, (embeds[1] + embeds[0] * 3) / 2, embeds[0]]))
    found, there = state.mask_embeds(7, [0, 2])
    assert there.tolist() == [False, True]
    assert state.mask_embeds(2, [])[0].shape == (0, 2)


def test_soft_iou_is_that_of_a_loop() -> None:
    a, b = torch.rand(3, 30), torch.rand(2, 30)
    for i in range(3):
        for j in range(2):
            expected = (a[i] * b[j]).sum() / (a[i] + b[j] - a[i] * b[j]).sum()
            assert float(soft_iou(a, b)[i, j]) == pytest.approx(float(expected), rel=1e-5)


def test_candidates() -> None:
    p = torch.tensor([[0.005, 0.001, 0.994], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3], [0.05, 0.04, 0.91], [0.45, 0.44, 0.11]])
    rows = torch.arange(5.0)[:, None]
    found = Tracklets(p, rows, rows)

    def chosen(**changes: Any) -> list[float]:
        return matcher(**changes).candidates(found).mask_embeds[:, 0].tolist()

    assert chosen(topk=0) == [2, 4]  # more likely some class than none, best first
    assert chosen(topk=4) == [2, 4, 1, 3]
    assert chosen(topk=5) == [2, 4, 1, 3]  # the last is below the lowest score
    assert chosen(topk=5, min_score=0.001) == [2, 4, 1, 3, 0]
    assert chosen(topk=5, max_num=3) == [2, 4, 1]
    assert chosen(min_score=1.1) == []


def test_windows_without_an_object() -> None:
    state, joined = ClipState(), matcher(min_score=1.1)
    for start in (0, 3):
        found = joined.candidates(tracklets(start, [0, 1]))
        joined.join(state, found, start, start + LENGTH, scene(40, {})[start : start + LENGTH])
    assert len(state) == 0
    assert state.class_probabilities().shape == (0, CLASSES)
    assert state.mask_embeds(5, [])[0].shape == (0, 3)


def test_unknown_score() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.VITA\.TEST\.MATCH is 'iou'"):
        matcher(score="iou")
