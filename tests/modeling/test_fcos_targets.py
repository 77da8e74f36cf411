"""Which locations answer for which instance, and the sums of the losses."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from vis.layers.effective_batch import EffectiveBatch
from vis.modeling.criterions.fcos import FCOSCriterion, assign_locations, centerness, id_probabilities, mass_centres
from vis.modeling.heads.fcos import FCOSOutputs, Locations, grid_locations

SIZES, STRIDES = ((11, 13), (6, 7)), (8, 16)
RANGES = (30.0, 1e8)
K, IDS, L = 5, 7, 11 * 13 + 6 * 7


def grid() -> Locations:
    return grid_locations(SIZES, STRIDES, "cpu")


def chosen(boxes: list[list[float]], centres: list[list[float]] | None = None) -> list[list[tuple[int, int]]]:
    """Of each instance, (level, x, y)s of its locations."""
    box = torch.tensor(boxes).view(-1, 4)
    middle = (box[:, :2] + box[:, 2:]) / 2 if centres is None else torch.tensor(centres)
    locations = grid()
    found = assign_locations(locations, box[None], middle[None], RANGES)[0][0]
    return [
        [(int(locations.levels[i]), *map(int, locations.points[i])) for i in (found == row).nonzero()[:, 0].tolist()]
        for row in range(len(boxes))
    ]


def frame(masks: Tensor, classes: list[int], ids: list[int]) -> Instances:
    target = Instances((88, 104))
    bits = BitMasks(masks)
    target.gt_masks, target.gt_boxes = bits, bits.get_bounding_boxes()
    target.gt_classes, target.gt_head_ids = torch.tensor(classes).long(), torch.tensor(ids).long()
    return target


def rectangle(x0: int, y0: int, x1: int, y1: int) -> Tensor:
    mask = torch.zeros(88, 104, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_locations_are_the_middle_of_cells() -> None:
    locations = grid()
    assert locations.points.shape == (L, 2)
    assert locations.points[0].tolist() == [4, 4]
    assert locations.points[12].tolist() == [100, 4]  # the end of the first row
    assert locations.points[13].tolist() == [4, 12]
    assert locations.points[143].tolist() == [8, 8]
    assert locations.points[-1].tolist() == [104, 88]
    assert locations.strides[[0, 142, 143]].tolist() == [8, 8, 16]


def test_positives_lie_around_the_centre_inside_the_box() -> None:
    # 1.5 strides of 8 to each side of 40: 28 < x < 52
    around = {(0, x, y) for x in (36, 44) for y in (36, 44)}
    assert set(chosen([[24, 24, 56, 56]])[0]) == around
    # centre of mass at a corner: the region is cut by the box
    assert set(chosen([[24, 24, 56, 56]], [[26.0, 30.0]])[0]) == {(0, 28, 28), (0, 28, 36), (0, 36, 28), (0, 36, 36)}


def test_sides_of_the_region_and_of_the_box_are_outside() -> None:
    assert (0, 28, 44) not in chosen([[20, 20, 60, 60]], [[40.0, 40.0]])[0]  # 12 pixels from the centre
    assert chosen([[36, 36, 44, 44]])[0] == []  # locations at the sides alone


def test_ends_of_ranges_belong_to_both_levels() -> None:
    # the farthest side of (40, 40) is 30 away
    assert {level for level, *_ in chosen([[10, 30, 50, 50]], [[40.0, 40.0]])[0]} == {0, 1}
    assert {level for level, *_ in chosen([[4, 4, 92, 76]])[0]} == {1}
    assert {level for level, *_ in chosen([[30, 30, 50, 50]])[0]} == {0}


def test_the_smaller_box_wins_where_instances_overlap() -> None:
    large, small = chosen([[20, 20, 60, 60], [30, 30, 50, 50]])
    assert (0, 36, 36) in small
    assert (0, 36, 36) not in large
    first, second = chosen([[24, 24, 56, 56], [24, 24, 56, 56]])
    assert first
    assert second == []


def test_distances_and_centerness() -> None:
    box, middle = torch.tensor([[[24.0, 30.0, 56.0, 58.0]]]), torch.tensor([[[40.0, 44.0]]])
    found = assign_locations(grid(), box, middle, RANGES)[1][0]
    at = int((grid().points[:143] == torch.tensor([36.0, 44.0])).all(dim=1).nonzero())
    assert found[at].tolist() == [12, 14, 20, 14]
    assert centerness(found[at : at + 1]).item() == pytest.approx((12 / 20 * 14 / 14) ** 0.5)


def test_centres_of_mass() -> None:
    masks = torch.stack(
        [rectangle(10, 20, 13, 25), rectangle(0, 0, 0, 0), rectangle(0, 0, 4, 1) | rectangle(6, 2, 7, 3)]
    )
    wanted = torch.tensor([[11.0, 22.0], [0.0, 0.0], [12 / 5, 2 / 5]])
    torch.testing.assert_close(mass_centres(masks), wanted)


def test_labels_and_ids_of_frames() -> None:
    masks = torch.stack([rectangle(24, 24, 56, 56), rectangle(60, 10, 84, 34)])
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES)
    frames = [frame(masks, [4, 1], [6, 2]), frame(masks[:0], [], []), frame(masks[1:], [3], [0])]
    found = criterion.assign(grid(), frames)
    assert found.labels.shape == (3, L)
    assert set(found.labels[0].tolist()) == {4, 1, K}
    assert set(found.ids[0].tolist()) == {6, 2, IDS}
    assert torch.equal(found.labels[0] == 1, found.ids[0] == 2)
    assert (found.labels[1] == K).all()
    assert (found.ids[1] == IDS).all()
    assert set(found.ids[2].tolist()) == {0, IDS}
    assert set(found.frames.tolist()) == {0, 2}
    assert (found.instances[found.frames == 2] == 0).all()
    assert torch.equal(found.labels[found.frames, found.locations] < K, torch.ones(len(found.frames), dtype=torch.bool))


def outputs(frames: int, seed: int = 0) -> FCOSOutputs:
    torch.manual_seed(seed)
    out = FCOSOutputs()
    for size, stride in zip(SIZES, STRIDES, strict=True):
        out.logits.append(torch.randn(frames, K, *size))
        out.boxes.append(torch.rand(frames, 4, *size) * 3 * stride)
        out.centerness.append(torch.randn(frames, 1, *size))
        out.params.append(torch.randn(frames, 169, *size) * 0.3)
        out.ids.append(torch.randn(frames, IDS, *size))
    return out


def of_frames(out: FCOSOutputs, rows: list[int]) -> FCOSOutputs:
    return FCOSOutputs(**{name: [x[rows] for x in maps] for name, maps in vars(out).items()})


FRAMES = [
    frame(torch.stack([rectangle(24, 24, 56, 56), rectangle(60, 10, 84, 34)]), [4, 1], [6, 2]),
    frame(rectangle(8, 40, 40, 80)[None], [0], [3]),
    frame(rectangle(0, 0, 0, 0)[None][:0], [], []),
    frame(rectangle(20, 4, 90, 84)[None], [2], [5]),
]


@pytest.mark.parametrize("id_loss", ["focal", "ce"])
def test_groups_are_normalised_as_if_they_came_one_after_the_other(id_loss: str) -> None:
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, id_loss=id_loss, strides=STRIDES, ranges=RANGES)
    out, features = outputs(4), torch.randn(4, 8, 11, 13)
    groups = torch.tensor([7, 2, 2, 0])
    together, _ = criterion(out, features, FRAMES, groups)
    parts = [
        criterion(of_frames(out, rows), features[rows], [FRAMES[i] for i in rows])[0] for rows in ([0], [1, 2], [3])
    ]
    assert set(together) == {"loss_cls", "loss_bbox", "loss_centerness", "loss_mask", "loss_id"}
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean())
    once, _ = criterion(out, features, FRAMES)
    assert abs(once["loss_cls"] - together["loss_cls"]) > 1e-3


def test_losses_of_frames_without_instances() -> None:
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES)
    out = outputs(2)
    for maps in vars(out).values():
        for x in maps:
            x.requires_grad_()
    features = torch.randn(2, 8, 11, 13, requires_grad=True)
    losses, found = criterion(out, features, [FRAMES[2], FRAMES[2]])
    assert len(found.frames) == 0
    assert [losses[name].item() for name in ("loss_bbox", "loss_centerness", "loss_mask")] == [0, 0, 0]
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    for x in [features, *(x for maps in vars(out).values() for x in maps)]:
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_cross_entropy_has_a_background_of_logit_zero() -> None:
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, id_loss="ce", strides=STRIDES, ranges=RANGES)
    out = outputs(1)
    for x in out.ids:
        x.zero_()
    losses, found = criterion(out, torch.randn(1, 8, 11, 13), FRAMES[:1])
    wanted = L * torch.tensor(float(IDS + 1)).log() / len(found.frames)
    torch.testing.assert_close(losses["loss_id"], wanted)
    probabilities = id_probabilities(torch.zeros(3, IDS), "ce")
    torch.testing.assert_close(probabilities, torch.full((3, IDS), 1 / (IDS + 1)))
    torch.testing.assert_close(id_probabilities(torch.zeros(3, IDS), "focal"), torch.full((3, IDS), 0.5))


def test_mask_loss_of_masks_that_are_known() -> None:
    """The last layer's bias alone speaks: every pixel of every mask is foreground, or background."""
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES)
    out = outputs(1)
    target, features = FRAMES[1], torch.randn(1, 8, 11, 13)
    for sign in (1.0, -1.0):
        for x in out.params:
            x.zero_()
            x[:, -1] = sign * 50.0
        loss = criterion(out, features, [target])[0]["loss_mask"]
        pixels, inside = 22 * 26, 8 * 10  # of 4 x 4 pixels; the mask has 32 x 40
        wanted = 1 - 2 * inside / (pixels + inside) if sign > 0 else 1.0
        assert loss.item() == pytest.approx(wanted, abs=1e-5)


def test_perfect_boxes_and_centerness_cost_nothing() -> None:
    criterion = FCOSCriterion(num_classes=K, strides=STRIDES, ranges=RANGES)
    out = outputs(1)
    out.ids = []
    found = criterion.assign(grid(), FRAMES[:1])
    boxes = torch.zeros(L, 4)
    boxes[found.locations] = found.boxes
    split = boxes.split([h * w for h, w in SIZES])
    out.boxes = [part.T.unflatten(1, size)[None] for part, size in zip(split, SIZES, strict=True)]
    losses, _ = criterion(out, torch.randn(1, 8, 11, 13), FRAMES[:1])
    assert "loss_id" not in losses
    assert losses["loss_bbox"].item() == pytest.approx(0, abs=1e-5)


def test_a_cap_keeps_the_best_positives_of_every_instance() -> None:
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES, max_positives=4)
    out = outputs(4)
    found = criterion.assign(grid(), FRAMES)
    kept = criterion._capped(out, found)
    counts = {
        (f, i): int((kept & (found.frames == f) & (found.instances == i)).sum()) for f, i in ((0, 0), (0, 1), (1, 0))
    }
    assert counts == {(0, 0): 2, (0, 1): 2, (1, 0): 4}
    logits = torch.cat([x.flatten(2) for x in out.logits], dim=2)
    center = torch.cat([x.flatten(2) for x in out.centerness], dim=2)[:, 0]
    scores = (logits.amax(dim=1).sigmoid() * center.sigmoid())[found.frames, found.locations]
    rows = (found.frames == 1) & (found.instances == 0)
    assert scores[rows & kept].min() >= scores[rows & ~kept].max()
    all_of_them = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES, max_positives=1000)
    assert all_of_them._capped(out, found).all()
    features = torch.randn(4, 8, 11, 13)
    free = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES)
    results = [one(out, features, FRAMES)[0] for one in (free, all_of_them, criterion)]
    assert results[0]["loss_mask"] == results[1]["loss_mask"] != results[2]["loss_mask"]
    assert results[0]["loss_cls"] == results[2]["loss_cls"]
    assert len(criterion._capped(out, criterion.assign(grid(), [FRAMES[2]] * 4))) == 0


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValueError, match="id loss is 'softmax'"):
        FCOSCriterion(num_classes=K, num_ids=IDS, id_loss="softmax")
    with pytest.raises(ValueError, match="MAX_POSITIVES is -1"):
        FCOSCriterion(num_classes=K, max_positives=-1)


def test_normalisers_are_means_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has no positive at all: sums here are divided by half of the own numbers."""
    from detectron2.utils import comm

    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES)
    out, features = outputs(1), torch.randn(1, 8, 11, 13)
    alone, found = criterion(out, features, FRAMES[:1])
    assert len(found.frames) > 2
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values)
    shared, _ = criterion(out, features, FRAMES[:1])
    for name in ("loss_cls", "loss_id", "loss_centerness", "loss_bbox"):
        torch.testing.assert_close(shared[name], 2 * alone[name])
    assert shared["loss_mask"] == alone["loss_mask"]


def test_a_batch_in_parts_has_the_losses_of_the_whole() -> None:
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES)
    out, features = outputs(4), torch.randn(4, 8, 11, 13)
    rows = ([0, 1], [2, 3])
    groups = torch.tensor([3, 4])

    def part(index: list[int]) -> dict[str, Tensor]:
        return criterion(of_frames(out, index), features[index], [FRAMES[i] for i in index], groups)[0]

    whole = criterion(out, features, FRAMES, groups.repeat(2))[0]
    for exact in (False, True):
        batch = EffectiveBatch(steps=2, exact=exact)
        for index in rows:
            with batch.counting() as counted:
                part(index)
            announced = criterion.target_counts([FRAMES[i] for i in index], SIZES, groups)
            for name, count in announced.items():
                torch.testing.assert_close(counted[name], count)
        batch.agree(torch.device("cpu"))
        with batch.active():
            parts = [part(index) for index in rows]
        for name, value in whole.items():
            if exact or name != "loss_mask":
                torch.testing.assert_close(torch.stack([losses[name] for losses in parts]).mean(), value, msg=name)


def test_half_precision() -> None:
    criterion = FCOSCriterion(num_classes=K, num_ids=IDS, strides=STRIDES, ranges=RANGES)
    out, features = outputs(4), torch.randn(4, 8, 11, 13)
    wanted = criterion(out, features, FRAMES)[0]
    half = FCOSOutputs(**{name: [x.bfloat16() for x in maps] for name, maps in vars(out).items()})
    half.boxes = out.boxes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion(half, features.bfloat16(), FRAMES)[0]
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=0.02)
