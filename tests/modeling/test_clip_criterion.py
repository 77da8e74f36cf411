"""Criterions of tracker and refiner: who answers for whom, and losses against naive dense ones with the same points."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.modeling.criterions import RefinerCriterion, TrackerCriterion
from vis.modeling.criterions.clip_matching import (
    first_frames,
    match_by_first_appearance,
    sample_stack,
    stack_logits,
)
from vis.modeling.matchers import HungarianMatcher
from vis.structures import ClipTargets, RefinerOutput, SegmenterClip, TrackerOutput

LAYERS, T, Q, K, C, CM = 3, 5, 7, 4, 8, 6
SMALL, PADDED = (5, 9), (20, 36)
POINTS = 24
OPTIONS = {
    "num_classes": K,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 3.0,
    "no_object_weight": 0.1,
    "num_points": POINTS,
    "oversample_ratio": 3.0,
    "importance_ratio": 0.75,
}
# Instance 0 stays, 1 leaves after frame 1, 2 enters in frame 2 and is away in frame 3.
IDS = torch.tensor([[0, 0, 0, 0, 0], [1, 1, -1, -1, -1], [-1, -1, 2, -1, 2]])


def targets(ids: Tensor = IDS, seed: int = 3) -> ClipTargets:
    torch.manual_seed(seed)
    masks = torch.zeros(len(ids), ids.shape[1], *PADDED, dtype=torch.bool)
    for n, t in (ids != -1).nonzero().tolist():
        top, left = int(torch.randint(0, 10, ())), int(torch.randint(0, 20, ()))
        masks[n, t, top : top + 8, left : left + 14] = True
    return ClipTargets(torch.tensor([2, 0, 3])[: len(ids)], ids, masks)


def tracked(videos: int = 1, layers: int = LAYERS) -> tuple[TrackerOutput, SegmenterClip]:
    torch.manual_seed(11)
    tracker = TrackerOutput(
        pred_logits=torch.randn(layers, videos, T, Q, K + 1, requires_grad=True),
        mask_embeds=torch.randn(layers, videos, T, Q, CM, requires_grad=True),
        mask_features=torch.randn(videos, T, CM, *SMALL, requires_grad=True),
        pred_embeds=torch.randn(videos, T, Q, C),
        references=torch.randn(videos, T, Q, C, requires_grad=True),
        order=torch.stack([torch.stack([torch.randperm(Q) for _ in range(T)]) for _ in range(videos)]),
    )
    segmenter = SegmenterClip(
        pred_logits=torch.randn(videos, T, Q, K + 1),
        pred_embeds=torch.randn(videos, T, Q, C),
        raw_embeds=None,
        mask_embeds=torch.randn(videos, T, Q, CM),
        mask_features=torch.randn(videos, T, CM, *SMALL),
    )
    return tracker, segmenter


def refined(videos: int = 1) -> RefinerOutput:
    torch.manual_seed(17)
    return RefinerOutput(
        pred_logits=torch.randn(LAYERS, videos, Q, K + 1, requires_grad=True),
        mask_embeds=torch.randn(LAYERS, videos, T, Q, CM, requires_grad=True),
        pred_embeds=torch.randn(videos, T, Q, C, requires_grad=True),
        mask_features=torch.randn(videos, T, CM, *SMALL),
    )


def video(tracker: TrackerOutput, segmenter: SegmenterClip, b: int) -> tuple[TrackerOutput, SegmenterClip]:
    layered = {"pred_logits", "mask_embeds"}
    one = {k: v[:, b, None] if k in layered else v[b, None] for k, v in vars(tracker).items()}
    return TrackerOutput(**one), SegmenterClip(
        **{k: v if v is None else v[b, None] for k, v in vars(segmenter).items()}
    )


def read(maps: Tensor, points: Tensor) -> Tensor:
    """(R, h, w) at (R, P, 2)."""
    return F.grid_sample(maps[:, None], points[:, None] * 2 - 1, align_corners=False)[:, 0, 0]


def naive_masks(logits: Tensor, masks: Tensor, num_points: int, keep: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Summed mask and dice loss of dense logits (R, h, w) and masks (R, H, W) over the rows ``keep``.

    Points are drawn as the criterion does, for all rows together.
    """
    drawn = torch.rand(len(logits), int(num_points * 3.0), 2)
    fresh = torch.rand(len(logits), num_points - int(num_points * 0.75), 2)
    mask, dice = torch.zeros(()), torch.zeros(())
    for row in range(len(logits))[keep]:
        order = read(logits[row, None], drawn[row, None])[0].abs().argsort()[: int(num_points * 0.75)]
        points = torch.cat([drawn[row, order], fresh[row]])[None]
        x, t = read(logits[row, None], points)[0], read(masks[row, None].float(), points)[0]
        s = x.sigmoid()
        mask = mask + F.binary_cross_entropy_with_logits(x, t)
        dice = dice + 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
    return mask, dice


def naive_ce(logits: Tensor, queries: list[int], labels: list[int]) -> Tensor:
    """(images, Q, K+1): the same classes in every image."""
    wanted = torch.full((Q,), K)
    wanted[queries] = torch.tensor(labels)
    weight = torch.ones(K + 1)
    weight[K] = 0.1
    return F.cross_entropy(logits.flatten(0, 1), wanted.repeat(len(logits)), weight)


def easy_clip(queries: dict[int, int], target: ClipTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (1, T, Q, K+1), embeds and features with which query ``queries[n]`` is instance n, others empty."""
    features = F.interpolate(target.masks.transpose(0, 1).float(), size=SMALL, mode="area") * 40 - 20
    features = torch.cat([features, torch.full((T, 1, *SMALL), -20.0)], dim=1)  # (T, N+1, h, w)
    embeds = torch.zeros(1, T, Q, features.shape[1])
    embeds[..., -1] = 1.0
    logits = torch.zeros(1, T, Q, K + 1)
    for n, q in queries.items():
        embeds[0, :, q] = 0.0
        embeds[0, :, q, n] = 1.0
        logits[0, :, q, target.labels[n]] = 9.0
    return logits, embeds, features


MATCHER = HungarianMatcher(class_weight=2.0, mask_weight=5.0, dice_weight=3.0)


def assigned(arguments: tuple[Tensor, Tensor, Tensor], target: ClipTargets, **options: bool) -> dict[int, int]:
    torch.manual_seed(0)
    ((queries, instances),) = match_by_first_appearance(*arguments, target, matcher=MATCHER, num_points=400, **options)
    return dict(zip(instances.tolist(), queries.tolist(), strict=True))


def test_first_frames() -> None:
    ids = torch.tensor([[0, 0, -1], [-1, -1, 5], [-1, -1, -1], [-1, 3, -1]])
    assert first_frames(ids).tolist() == [0, 2, -1, 1]
    assert first_frames(ids[:0]).tolist() == []


def test_an_instance_keeps_the_query_of_its_first_frame() -> None:
    """Instance 2 enters in frame 2; what its query says of frames 0, 1 and 3 has no say in the matching."""
    target = targets()
    logits, embeds, features = easy_clip({0: 5, 1: 2, 2: 4}, target)
    embeds[0, 3:, 4], embeds[0, 3:, 6] = embeds[0, 3:, 6].clone(), embeds[0, 3:, 4].clone()  # query 6 has it later
    assert assigned((logits, embeds, features), target) == {0: 5, 1: 2, 2: 4}


def test_a_used_query_is_blocked() -> None:
    target = targets()
    logits, embeds, features = easy_clip({0: 5, 1: 2, 2: 4}, target)
    # From frame 2 on query 2, which belongs to instance 1, shows instance 2; query 4 is second best, by its class.
    embeds[0, 2:, 2] = embeds[0, 2:, 4]
    logits[0, 2:, 2] = logits[0, 2:, 4] * 2
    embeds[0, 2:, 4] *= 0.5
    assert assigned((logits, embeds, features), target) == {0: 5, 1: 2, 2: 4}
    assert assigned((logits, embeds, features), target, block_used=False) == {0: 5, 1: 2, 2: 2}


def test_more_instances_than_queries() -> None:
    ids = torch.zeros(Q + 2, T, dtype=torch.int64)
    ids[Q - 1 :, 0] = -1  # six at first, then three for the one query that is left
    masks = torch.ones(Q + 2, T, *PADDED, dtype=torch.bool) & (ids != -1)[..., None, None]
    target = ClipTargets(torch.zeros(Q + 2, dtype=torch.int64), ids, masks)
    tracker, segmenter = tracked()
    losses = TrackerCriterion(**OPTIONS)(tracker, segmenter, [target], guided=False)
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("guided", [True, False])
def test_tracker_equals_the_dense_formula(guided: bool) -> None:
    tracker, segmenter = tracked()
    target, criterion = targets(), TrackerCriterion(**OPTIONS)
    torch.manual_seed(5)
    found = criterion(tracker, segmenter, [target], guided=guided)

    torch.manual_seed(5)
    features, order = tracker.mask_features[0], tracker.order[0]
    if guided:
        sources = [
            (
                torch.stack([segmenter.pred_logits[0, t, order[t]] for t in range(T)]),
                torch.stack([segmenter.mask_embeds[0, t, order[t]] for t in range(T)]),
                segmenter.mask_features[0],
            )
        ]
    else:
        sources = [(tracker.pred_logits[i, 0], tracker.mask_embeds[i, 0], features) for i in range(LAYERS)]
    points = {t: torch.rand(1, POINTS, 2) for t in (0, 2)}
    pairs = [naive_clip_match(*source, target, points) for source in sources]
    pairs = pairs * (LAYERS // len(pairs))
    masks, dices = [torch.zeros(())] * LAYERS, [torch.zeros(())] * LAYERS
    for t in range(T):
        dense = [torch.einsum("qc,chw->qhw", tracker.mask_embeds[i, 0, t], features[t]) for i in range(LAYERS)]
        rows = torch.cat([dense[i][list(pairs[i].values())] for i in range(LAYERS)])
        wanted = torch.cat([target.masks[list(pairs[i]), t] for i in range(LAYERS)])
        torch_state = torch.get_rng_state()
        for i in range(LAYERS):  # every layer reads its rows of one common draw
            torch.set_rng_state(torch_state)
            keep = slice(3 * i, 3 * i + 3)
            mask, dice = naive_masks(rows, wanted, POINTS, keep)
            masks[i], dices[i] = masks[i] + mask, dices[i] + dice
    for i in range(LAYERS):
        end = "" if i == LAYERS - 1 else f"_{i}"
        labels = [int(target.labels[n]) for n in pairs[i]]
        ce = naive_ce(tracker.pred_logits[i, 0], list(pairs[i].values()), labels)
        torch.testing.assert_close(found[f"loss_ce{end}"], 2 * ce, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"loss_mask{end}"], 5 * masks[i] / (3 * T), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(found[f"loss_dice{end}"], 3 * dices[i] / (3 * T), rtol=2e-5, atol=1e-6)
    assert len(found) == 3 * LAYERS


def naive_clip_match(
    logits: Tensor, embeds: Tensor, features: Tensor, target: ClipTargets, points: dict[int, Tensor]
) -> dict[int, int]:
    """instance -> query: frame by frame the cheapest of all assignments of the new instances to unused queries."""
    chosen: dict[int, int] = {}
    for t, new in ((0, [0, 1]), (2, [2])):
        masks = torch.einsum("qc,chw->qhw", embeds[t], features[t])
        x, wanted = read(masks, points[t].expand(Q, -1, -1)), target.masks[new, t].float()
        cost = MATCHER.cost(logits[t], x, target.labels[new], read(wanted, points[t].expand(len(new), -1, -1)))
        cost[list(chosen.values())] = 1e6
        options = torch.cartesian_prod(*[torch.arange(Q)] * len(new)).reshape(-1, len(new))
        options = options[[len(set(option.tolist())) == len(new) for option in options]]
        totals = sum(cost[options[:, i], i] for i in range(len(new)))
        best = options[int(torch.as_tensor(totals).argmin())]
        pairs = sorted(zip(best.tolist(), new, strict=True))  # in the order of the queries, as the solver gives them
        chosen.update({n: q for q, n in pairs})
    return chosen


def test_absent_frames_want_the_class_and_an_empty_mask() -> None:
    """A query that is right in every frame has no loss; one that goes on showing an object that left has."""
    target = targets()
    logits, embeds, features = easy_clip({0: 5, 1: 2, 2: 4}, target)
    logits = logits * 3
    logits[..., K] = torch.where(logits.amax(dim=-1) > 0, 0.0, 27.0)
    found = []
    for ghost in (False, True):
        shown = embeds.clone()
        if ghost:  # query 2 shows instance 0 after its own has left
            shown[0, 2:, 2] = shown[0, 2:, 5]
        tracker = replace(tracked()[0], pred_logits=logits[:, None], mask_embeds=shown[:, None], references=None)
        tracker.mask_features = features[None]
        torch.manual_seed(1)
        found.append(TrackerCriterion(**OPTIONS)(tracker, tracked()[1], [target], guided=False))
    assert float(found[0]["loss_ce"]) < 1e-4
    assert float(found[1]["loss_ce"]) < 1e-4
    assert float(found[1]["loss_mask"]) > 2 * float(found[0]["loss_mask"])
    wrong = logits.clone()
    wrong[0, 2:, 2] = 0.0
    wrong[0, 2:, 2, K] = 27.0  # "no object" once the instance has left
    tracker = replace(tracker, pred_logits=wrong[:, None], mask_embeds=embeds[:, None])
    correct, released = (
        TrackerCriterion(released_labels=flag, **OPTIONS)(tracker, tracked()[1], [target], guided=False)
        for flag in (False, True)
    )
    assert float(correct["loss_ce"]) > 5  # the class is to be kept
    assert float(released["loss_ce"]) < float(correct["loss_ce"])


def test_released_labels() -> None:
    for kind in (TrackerCriterion, RefinerCriterion):
        assert kind(released_labels=True, **OPTIONS)._labels(targets()).tolist() == [2, K, 3]
        assert kind(**OPTIONS)._labels(targets()).tolist() == [2, 0, 3]


def test_the_released_matcher_changes_no_label() -> None:
    """It lets a query be used twice; of instances that enter together, as here, it changes nothing."""
    tracker, segmenter = tracked()
    found = []
    for flag in (False, True):
        torch.manual_seed(6)
        criterion = TrackerCriterion(released_matcher=flag, **OPTIONS)
        found.append(criterion(tracker, segmenter, [targets(IDS[:2])], guided=True))
    assert {k: v.tolist() for k, v in found[0].items()} == {k: v.tolist() for k, v in found[1].items()}


@pytest.mark.parametrize("guided", [True, False])
def test_videos_are_averaged(guided: bool) -> None:
    """Two videos of different numbers of instances: the mean of the losses of each alone."""
    tracker, segmenter = tracked(videos=2)
    both = [targets(), targets(IDS[:1], seed=8)]
    state = torch.Generator().manual_seed(3).get_state()
    criterion = TrackerCriterion(contrastive_weight=2.0, **OPTIONS)
    torch.set_rng_state(state)
    together = criterion(tracker, segmenter, both, guided=guided)
    torch.set_rng_state(state)
    alone = [criterion(*video(tracker, segmenter, b), [both[b]], guided=guided) for b in range(2)]
    for name, loss in together.items():
        torch.testing.assert_close(loss, (alone[0][name] + alone[1][name]) / 2, msg=lambda m, name=name: f"{name} {m}")
    assert "loss_reid" in together


def test_guided_reads_the_segmenter_and_own_does_not() -> None:
    tracker, segmenter = tracked()
    other = replace(segmenter, mask_embeds=segmenter.mask_embeds.flip(2))
    losses = {}
    for guided in (True, False):
        for name, clip in (("one", segmenter), ("other", other)):
            torch.manual_seed(2)
            found = TrackerCriterion(**OPTIONS)(tracker, clip, [targets()], guided=guided)
            losses[guided, name] = found["loss_mask"].detach()
    assert float(losses[True, "one"]) != float(losses[True, "other"])
    assert float(losses[False, "one"]) == float(losses[False, "other"])


def test_guided_follows_the_order() -> None:
    """The same slots, whatever order the segmenter had its queries in."""
    tracker, segmenter = tracked()
    shuffle = torch.stack([torch.randperm(Q) for _ in range(T)])
    inverse = shuffle.argsort(dim=1)
    shuffled = replace(
        segmenter,
        pred_logits=torch.stack([segmenter.pred_logits[0, t, shuffle[t]] for t in range(T)])[None],
        mask_embeds=torch.stack([segmenter.mask_embeds[0, t, shuffle[t]] for t in range(T)])[None],
    )
    order = torch.stack([inverse[t, tracker.order[0, t]] for t in range(T)])[None]
    losses = []
    for clip, led in ((segmenter, tracker), (shuffled, replace(tracker, order=order))):
        torch.manual_seed(2)
        losses.append(TrackerCriterion(**OPTIONS)(led, clip, [targets()], guided=True))
    assert {k: v.tolist() for k, v in losses[0].items()} == {k: v.tolist() for k, v in losses[1].items()}


def test_stack_samples_are_those_of_the_tall_image() -> None:
    torch.manual_seed(4)
    embeds, features = torch.randn(T, Q, CM), torch.randn(T, CM, *SMALL)
    points = torch.rand(1, 500, 2)
    tall = torch.einsum("tqc,tchw->qthw", embeds, features).flatten(1, 2)
    expected = read(tall, points.expand(Q, -1, -1))
    found = stack_logits(embeds, sample_stack(features, points), points.shape[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guided", [True, False])
def test_refiner_equals_the_tall_image(guided: bool) -> None:
    tracker, _ = tracked()
    refiner, target = refined(), targets()
    torch.manual_seed(9)
    found = RefinerCriterion(**OPTIONS)(refiner, tracker, [target], guided=guided)

    torch.manual_seed(9)
    points = torch.rand(1, POINTS * T, 2)
    assert refiner.mask_features is not None
    features, tall_masks = refiner.mask_features[0], target.masks.flatten(1, 2)
    wanted = read(tall_masks.float(), points.expand(3, -1, -1))
    if guided:
        sources = [(tracker.pred_logits[-1, 0].mean(dim=0), tracker.mask_embeds[-1, 0], tracker.mask_features[0])]
    else:
        sources = [(refiner.pred_logits[i, 0], refiner.mask_embeds[i, 0], features) for i in range(LAYERS)]
    pairs = []
    for logits, embeds, read_by in sources:
        tall = torch.einsum("tqc,tchw->qthw", embeds, read_by).flatten(1, 2)
        x = read(tall, points.expand(Q, -1, -1))
        ((queries, instances),) = MATCHER(logits[None], x[None], target.labels, wanted)
        pairs.append((queries.tolist(), instances.tolist()))
    pairs = pairs * (LAYERS // len(pairs))
    for i, (queries, instances) in enumerate(pairs):
        end = "" if i == LAYERS - 1 else f"_{i}"
        tall = torch.einsum("tqc,tchw->qthw", refiner.mask_embeds[i, 0], features).flatten(1, 2)
        mask, dice = naive_masks(tall[queries], tall_masks[instances], POINTS * T)
        ce = naive_ce(refiner.pred_logits[i], queries, target.labels[instances].tolist())
        torch.testing.assert_close(found[f"loss_ce{end}"], 2 * ce, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"loss_mask{end}"], 5 * mask / 3, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[f"loss_dice{end}"], 3 * dice / 3, rtol=1e-3, atol=1e-5)


def test_refiner_averages_videos_and_remembers_classes() -> None:
    tracker, segmenter = tracked(videos=2)
    refiner, both = refined(videos=2), [targets(), targets(IDS[:1], seed=8)]
    plain, contrastive = RefinerCriterion(**OPTIONS), RefinerCriterion(contrastive_weight=2.0, **OPTIONS)
    state = torch.Generator().manual_seed(3).get_state()
    torch.set_rng_state(state)
    together = plain(refiner, tracker, both, guided=True)
    torch.set_rng_state(state)
    parts = []
    for b in range(2):
        one = RefinerOutput(
            refiner.pred_logits[:, b, None], refiner.mask_embeds[:, b, None], refiner.pred_embeds[b, None]
        )
        one.mask_features = refiner.mask_features[b, None]  # type: ignore[index]
        parts.append(plain(one, video(tracker, segmenter, b)[0], [both[b]], guided=True))
    for name, loss in together.items():
        torch.testing.assert_close(loss, (parts[0][name] + parts[1][name]) / 2)
    for name, loss in contrastive(refiner, tracker, both, guided=True).items():
        assert name == "loss_reid" or torch.isfinite(loss)
    assert set(contrastive.state_dict()) == {"empty_weight"}


def test_the_refiner_remembers_single_frames_of_earlier_videos() -> None:
    """A second item for each frame of a track whose class is known; of a class a random 20 frames stay."""
    tracker, _ = tracked()
    refiner, target = refined(), targets(IDS[:1])
    criterion = RefinerCriterion(contrastive_weight=2.0, **OPTIONS)
    losses = []
    for _ in range(6):
        torch.manual_seed(3)  # the same points, so the same query
        losses.append(float(criterion(refiner, tracker, [target], guided=True)["loss_reid"].detach()) / 2)
        if len(losses) == 1:
            (label, kept), *_ = criterion._memory.items()
    embeds = refiner.pred_embeds[0].detach()  # (T, Q, C)
    (query,) = (q for q in range(Q) if torch.equal(kept, embeds[:, q]))
    assert (label, len(criterion._memory)) == (2, 1)

    def item(t: int, negatives: Tensor) -> Tensor:
        pairs = (negatives @ embeds[t, query])[:, None] - embeds[:, query] @ embeds[t, query]
        return torch.log1p(pairs.exp().sum())

    in_frame = [item(t, embeds[t, [q for q in range(Q) if q != query]]) for t in range(T)]
    in_memory = [item(t, kept) for t in range(T)]
    assert losses[0] == pytest.approx(float(torch.stack(in_frame).mean()), rel=1e-5)
    assert losses[1] == pytest.approx(float(torch.stack(in_frame + in_memory).mean()), rel=1e-5)

    left = criterion._memory[2]
    assert left.shape == (20, C)  # of 6 * T = 30
    assert all((left[i] == kept).all(dim=1).any() for i in range(20))
    counts = (left[:, None] == kept).all(dim=2).sum(dim=0).tolist()
    assert counts != [4] * T  # a random subset, not the last twenty


@pytest.mark.parametrize("guided", [True, False])
def test_no_instance(guided: bool) -> None:
    tracker, segmenter = tracked()
    refiner, none = refined(), targets(IDS[:0])
    losses = TrackerCriterion(contrastive_weight=1.0, **OPTIONS)(tracker, segmenter, [none], guided=guided)
    more = RefinerCriterion(contrastive_weight=1.0, **OPTIONS)(refiner, tracker, [none], guided=guided)
    for each, leaves in (
        (losses, [tracker.pred_logits, tracker.mask_embeds, tracker.mask_features, tracker.references]),
        (more, [refiner.pred_logits, refiner.mask_embeds, refiner.pred_embeds]),
    ):
        assert all(torch.isfinite(loss) for loss in each.values())
        assert all(float(loss.detach()) == 0 for name, loss in each.items() if "ce" not in name)
        grads = torch.autograd.grad(sum(each.values()), leaves)  # type: ignore[arg-type]
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert float(grads[0].abs().sum()) > 0


def test_a_tracker_without_references_has_no_contrastive_loss() -> None:
    tracker, segmenter = tracked()
    with pytest.raises(ValueError, match="TRACKER_CONTRASTIVE"):
        TrackerCriterion(contrastive_weight=1.0, **OPTIONS)(
            replace(tracker, references=None), segmenter, [targets()], guided=False
        )


@pytest.mark.parametrize("guided", [True, False])
def test_mixed_precision(guided: bool) -> None:
    """Predictions in half precision: losses in float32, near those of the same numbers in float32."""

    def half(part: object, dtype: torch.dtype) -> dict[str, Tensor | None]:
        values = vars(part).items()
        return {k: v.to(torch.bfloat16).to(dtype) if v is not None and v.is_floating_point() else v for k, v in values}

    tracker, segmenter = tracked()
    refiner = refined()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        parts = [type(part)(**half(part, dtype)) for part in (tracker, segmenter, refiner)]
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = TrackerCriterion(contrastive_weight=1.0, **OPTIONS)(*parts[:2], [targets()], guided=guided)
            more = RefinerCriterion(contrastive_weight=1.0, **OPTIONS)(parts[2], parts[0], [targets()], guided=guided)
        found.append({**losses, **{f"refined {name}": loss for name, loss in more.items()}})
    for name, loss in found[0].items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, found[1][name], rtol=0.05, atol=0.02, msg=lambda m, name=name: f"{name} {m}")


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [True, False])
def test_on_a_gpu(guided: bool) -> None:
    tracker, segmenter = tracked(videos=2)
    refiner = refined(videos=2)
    parts = [
        type(part)(**{k: None if v is None else v.detach().cuda() for k, v in vars(part).items()})
        for part in (tracker, segmenter, refiner)
    ]
    clips = [ClipTargets(*(x.cuda() for x in vars(clip).values())) for clip in (targets(), targets(IDS[:1], seed=8))]
    leaves = [parts[0].pred_logits, parts[0].mask_embeds, parts[0].references, parts[2].mask_embeds]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.autocast("cuda", dtype=torch.float16):
        losses = TrackerCriterion(contrastive_weight=1.0, **OPTIONS).cuda()(*parts[:2], clips, guided=guided)
        criterion = RefinerCriterion(contrastive_weight=1.0, **OPTIONS).cuda()
        more = criterion(parts[2], parts[0], clips, guided=guided)
    assert all(loss.is_cuda and torch.isfinite(loss) for loss in (*losses.values(), *more.values()))
    grads = torch.autograd.grad(sum((*losses.values(), *more.values())), leaves)  # type: ignore[arg-type]
    assert all(torch.isfinite(grad).all() and grad.any() for grad in grads)
