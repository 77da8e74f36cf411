"""Identities: of a training clip, and of detections of a video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from vis.modeling.criterions.iai import clip_identities, frame_targets, identity_maps, paint
from vis.modeling.trackers.identity import (
    NO_CHANNEL,
    IdentityState,
    IdentityTracker,
    exclusive,
    identity_map,
    overlap_scores,
    remember_boxes,
    visible_parts,
)

N = 20


def ids_of(*frames: tuple[int, ...], slots: tuple[int, ...]) -> Tensor:
    """(T, n) ids: the slots that are in a frame, -1 for the others."""
    return torch.tensor([[slot if slot in frame else -1 for slot in slots] for frame in frames])


def heads(gt_ids: Tensor, num_ids: int = N) -> list[list[int]]:
    """Targets of the id head of the visible slots of each frame."""
    found = clip_identities(gt_ids, num_ids)
    return [found.head[t][found.visible[t]].tolist() for t in range(len(gt_ids))]


def test_head_names_channels_and_new_objects() -> None:
    gt_ids = ids_of((7, 31), (7, 9, 31), (9,), (7, 9), slots=(7, 9, 31))
    assert heads(gt_ids) == [[19, 19], [0, 19, 2], [1], [0, 1]]
    found = clip_identities(gt_ids, N)
    assert found.channels[found.visible[0]].tolist() == [0, 2]
    assert found.new.tolist() == [True, True, False, False]


def test_channels_follow_the_ids_and_not_the_slots() -> None:
    gt_ids = ids_of((31, 7), (7,), slots=(31, 4, 7))
    assert clip_identities(gt_ids, N).channels.tolist() == [1, -1, 0]
    assert heads(gt_ids) == [[19, 19], [0]]


def test_new_objects_beside_high_ids() -> None:
    # of frames with few objects and ids from 8 on the release marks the wrong one, since it follows a set's order
    everyone = tuple(range(12))
    gt_ids = ids_of(tuple(i for i in everyone if i != 1), (1, 8), (1, 8, 11), slots=everyone)
    assert heads(gt_ids)[1:] == [[19, 8], [1, 8, 11]]


def test_instances_beyond_the_channels_are_left_out() -> None:
    gt_ids = ids_of((1, 2, 3, 4), (2, 3, 4), (3, 4, 5), slots=(1, 2, 3, 4, 5))
    found = clip_identities(gt_ids, 4)  # three objects and "new"
    assert found.channels.tolist() == [-1, 0, 1, 2, -1]
    assert found.visible.sum(dim=0).tolist() == [0, 2, 3, 3, 0]
    assert found.head[found.visible].tolist() == [3, 3, 3, 0, 1, 2, 1, 2]
    assert not found.new[2]


def test_shuffled_channels_are_distinct_and_repeat_with_the_seed() -> None:
    gt_ids = ids_of((7, 31), (7, 9, 31), slots=(7, 9, 31))

    def draw(seed: int) -> list[int]:
        return clip_identities(gt_ids, 6, torch.Generator().manual_seed(seed)).channels.tolist()

    drawn = [draw(seed) for seed in range(40)]
    assert drawn == [draw(seed) for seed in range(40)]
    assert all(len(set(channels)) == 3 for channels in drawn)
    assert {channel for channels in drawn for channel in channels} == {0, 1, 2, 3, 4}
    shuffled = clip_identities(gt_ids, 6, torch.Generator().manual_seed(1))
    assert shuffled.head[0, 0] == 5  # new, whatever its channel
    assert shuffled.head[1, 0] == shuffled.channels[0]


def block(y: slice, x: slice, height: int = 20, width: int = 30) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y, x] = True
    return mask


def test_smaller_masks_lie_above() -> None:
    large, small = block(slice(0, 10), slice(0, 10)), block(slice(5, 12), slice(5, 8))
    for masks, channels in (([large, small], [3, 1]), ([small, large], [1, 3])):
        labels = paint(torch.stack(masks), torch.tensor(channels), N)
        assert (labels[small] == 1).all()
        assert (labels[large & ~small] == 3).all()
        assert (labels[~(large | small)] == N).all()
    same = paint(torch.stack([small, small]), torch.tensor([4, 2]), N)
    assert (same[small] == 4).all()


def instances(masks: Tensor, ids: list[int]) -> Instances:
    return Instances(
        tuple(masks.shape[1:]),
        gt_ids=torch.tensor(ids),
        gt_classes=torch.arange(len(ids)) + 3,
        gt_masks=BitMasks(masks),
        gt_boxes=BitMasks(masks).get_bounding_boxes(),
    )


def test_padding_of_mixed_sizes_is_background() -> None:
    masks = torch.stack([block(slice(0, 20), slice(0, 30)), block(slice(2, 4), slice(1, 9))])
    gt_ids = torch.tensor([[5, 6], [5, -1]])
    found = clip_identities(gt_ids, N)
    clip = [instances(masks, [5, 6]), instances(masks, [5, -1])]
    labels = identity_maps(clip, found, N, (32, 64))
    assert labels.shape == (2, 32, 64)
    assert labels.dtype == torch.uint8
    assert (labels[:, 20:] == N).all()
    assert (labels[:, :, 30:] == N).all()
    assert (labels[0][:20, :30][masks[1]] == 1).all()
    assert (labels[1][:20, :30] == 0).all()  # the second is absent
    target = frame_targets(clip[1], found, 1, (32, 64), torch.device("cpu"))
    assert isinstance(target.gt_boxes, Boxes)
    assert target.gt_masks.tensor.shape == (1, 32, 64)
    assert target.gt_classes.tolist() == [3]
    assert target.gt_head_ids.tolist() == [0]
    assert target.image_size == (20, 30)


def test_better_masks_take_their_pixels_even_when_dropped() -> None:
    masks = torch.stack(
        [
            block(slice(0, 10), slice(0, 10)),
            block(slice(0, 10), slice(1, 11)),  # a tenth is left
            block(slice(0, 10), slice(2, 12)),  # the tenth that is left is the column after that
            block(slice(0, 10), slice(10, 11)),  # taken by the second
            block(slice(0, 0), slice(0, 0)),
        ]
    )
    kept, visible = visible_parts(masks, 0.1)
    assert kept.tolist() == [0, 1, 2]
    assert visible.flatten(1).sum(dim=1).tolist() == [100, 10, 10, 0, 0]
    kept, _ = visible_parts(masks, 0.11)
    assert kept.tolist() == [0]
    assert int(visible.sum(dim=0).max()) == 1
    assert exclusive(masks[:0]).shape == (0, 20, 30)


def scores_of(*rows: dict[int, float], num_ids: int = 5) -> Tensor:
    scores = torch.full((len(rows), num_ids), 0.01)
    for row, values in zip(scores, rows, strict=True):
        for column, value in values.items():
            row[column] = value
    return scores


def run(tracker: IdentityTracker, *frames: Tensor) -> tuple[list[list[int]], list[bool], IdentityState]:
    state, ids, new = IdentityState(), [], []
    for scores in frames:
        found, state = tracker.step(scores, state)
        ids.append(found.ids)
        new.append(found.new)
    return ids, new, state


def test_first_frame_is_new_and_later_ones_are_assigned() -> None:
    first = scores_of({2: 0.9}, {2: 0.9})  # whatever the head says
    second = scores_of({4: 0.8}, {0: 0.7, 1: 0.6}, {0: 0.9})
    ids, new, state = run(IdentityTracker(num_ids=5), first, second)
    # two prefer the first: the sum decides
    assert ids == [[0, 1], [2, 1, 0]]
    assert new == [True, True]
    assert (state.next_id, state.length) == (3, 2)


def test_several_detections_can_be_new() -> None:
    ids, _, _ = run(IdentityTracker(num_ids=6), scores_of({}, num_ids=6), scores_of(*[{5: 0.9}] * 3, num_ids=6))
    assert ids == [[0], [1, 2, 3]]


def test_ids_that_nobody_has_are_not_offered() -> None:
    frames = (scores_of({}), scores_of({3: 0.99, 0: 0.3}))
    ids, _, _ = run(IdentityTracker(num_ids=5), *frames)
    assert ids == [[0], [0]]
    ids, new, _ = run(IdentityTracker(num_ids=5, released_unassigned=True), *frames)
    assert ids == [[0], [1]]
    assert new == [True, True]


def test_identities_that_run_out() -> None:
    frames = (scores_of({}, {}, {}), scores_of({4: 0.9}, {4: 0.8}, {4: 0.7}), scores_of({4: 0.9}, {0: 0.8}))
    ids, new, state = run(IdentityTracker(num_ids=5), *frames)
    assert ids == [[0, 1, 2], [3, -1, -1], [-1, 0]]
    assert new == [True, True, False]
    assert (state.next_id, state.left_out) == (4, 3)
    assert IdentityTracker(num_ids=5).exported == 4
    released = IdentityTracker(num_ids=5, released_overflow=True, released_unassigned=True)
    ids, new, state = run(released, *frames)
    assert ids == [[0, 1, 2], [3, 3, 3], [3, 0]]
    assert new == [True, False, False]
    assert state.next_id == released.exported == 3


@pytest.mark.parametrize("released", [False, True])
def test_ids_of_a_frame_are_unique(released: bool) -> None:
    torch.manual_seed(0)
    tracker = IdentityTracker(num_ids=40, released_unassigned=released)
    state, known = IdentityState(), 0
    for t in range(20):
        found, state = tracker.step(torch.rand(1 + t % 4, 40), state)
        assert len(set(found.ids)) == len(found.ids)
        assert state.next_id >= known
        known = state.next_id


def test_permuted_channels_and_permuted_detections_give_the_same() -> None:
    torch.manual_seed(1)
    tracker, state = IdentityTracker(num_ids=8), IdentityState(next_id=5, length=3)
    scores = torch.rand(4, 8)
    scores[:, 7] = 0.2
    before = tracker.step(scores, state)[0].ids
    order = torch.tensor([2, 0, 4, 1, 3, 5, 6, 7])
    permuted = scores.clone()
    permuted[:, order] = scores
    assert tracker.step(permuted, state)[0].ids == [int(order[i]) for i in before]
    rows = torch.tensor([3, 1, 0, 2])
    assert tracker.step(scores[rows], state)[0].ids == [before[i] for i in rows.tolist()]


def test_empty_frames() -> None:
    nobody = torch.zeros(0, 5)
    ids, new, state = run(
        IdentityTracker(num_ids=5), nobody, scores_of({0: 0.9}, {0: 0.8}), nobody, scores_of({1: 0.9})
    )
    assert ids == [[], [0, 1], [], [1]]
    assert new == [False, True, False, False]
    assert state.length == 4


def test_map_of_identities() -> None:
    masks = torch.stack(
        [block(slice(0, 5), slice(0, 5)), block(slice(6, 9), slice(0, 5)), block(slice(10, 12), slice(3, 9))]
    )
    labels = identity_map(masks, [2, -1, 0], 4)
    assert [int((labels == i).sum()) for i in range(5)] == [12, 0, 25, 0, 600 - 37]
    # the slot that is written twice: pixels of the earlier are of no channel
    labels = identity_map(masks, [3, 1, 3], 4)
    assert (labels[masks[0]] == NO_CHANNEL).all()
    assert (labels[masks[2]] == 3).all()
    assert (identity_map(masks[:0], [], 4) == 4).all()


def test_objects_are_linked_by_boxes_without_a_head() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    state = remember_boxes(boxes, torch.tensor([1, 2]), [0, 1], IdentityState(next_id=2, length=1))
    later = torch.tensor([[21.0, 0, 31, 10], [2, 0, 12, 10], [60, 60, 70, 70], [1, 0, 11, 10]])
    scores = overlap_scores(later, torch.tensor([2, 1, 1, 2]), state, num_ids=5, threshold=0.3)
    np.testing.assert_allclose(scores[0], [0, 9 / 11, 0, 0, 0.3], rtol=1e-6)
    np.testing.assert_allclose(scores[1], [8 / 12, 0, 0, 0, 0.3], rtol=1e-6)
    assert IdentityTracker(num_ids=5).step(scores, state)[0].ids == [1, 0, 2, 3]  # the last is of another class


def test_numbers_of_channels_that_cannot_be() -> None:
    for number in (1, 255):
        with pytest.raises(ValueError, match="NUM_IDS"):
            IdentityTracker(num_ids=number)
