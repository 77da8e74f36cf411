"""VITA's losses on tracklets and the similarity loss, beside plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vis.layers.points import sample_points
from vis.modeling.criterions.vita import VitaCriterion
from vis.modeling.matchers.hungarian import Pairs
from vis.modeling.transformer_decoders.vita import VitaOutput
from vis.structures import ClipTargets

DEPTH, COPIES, FRAMES, QUERIES, FRAME_QUERIES, CLASSES, WIDTH, MASK, HEIGHT, SIDE = 2, 3, 4, 6, 5, 7, 10, 8, 5, 9
POINTS = 40


def criterion(**changes: Any) -> VitaCriterion:
    options: dict[str, Any] = {
        "num_classes": CLASSES,
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 3.0,
        "no_object_weight": 0.1,
        "num_points": POINTS,
        "oversample_ratio": 3.0,
        "importance_ratio": 0.75,
        "sim_weight": 0.5,
        "sim_use_clip": True,
    }
    return VitaCriterion(**{**options, **changes})


def output(clips: int, seed: int = 0) -> VitaOutput:
    torch.manual_seed(seed)
    return VitaOutput(
        pred_logits=torch.randn(DEPTH, COPIES, clips, QUERIES, CLASSES + 1, requires_grad=True),
        mask_embeds=torch.randn(DEPTH, COPIES, clips, QUERIES, MASK, requires_grad=True),
        clip_embeds=torch.randn(COPIES, clips, QUERIES, WIDTH, requires_grad=True),
        frame_embeds=torch.randn(COPIES, clips, FRAMES, FRAME_QUERIES, WIDTH, requires_grad=True),
    )


def maps(clips: int, *, flat: bool = False) -> Tensor:
    """Mask features; ``flat``: the same everywhere in a frame, so that losses do not depend on the points."""
    torch.manual_seed(5)
    x = torch.randn(clips, FRAMES, MASK, 1, 1) if flat else torch.randn(clips, FRAMES, MASK, HEIGHT, SIDE)
    return x.expand(-1, -1, -1, HEIGHT, SIDE).contiguous().requires_grad_(True)


def target(labels: list[int], seed: int = 0, *, flat: bool = False) -> ClipTargets:
    """Instances; the second is absent in the first frame. ``flat``: every mask is all of the picture."""
    torch.manual_seed(seed + 50)
    n = len(labels)
    ids = torch.arange(n)[:, None].expand(-1, FRAMES).clone() * 3 + 11
    if n > 1:
        ids[1, 0] = -1
    masks = torch.ones(n, FRAMES, 4 * HEIGHT, 4 * SIDE, dtype=torch.bool) if flat else None
    masks = torch.rand(n, FRAMES, 4 * HEIGHT, 4 * SIDE) > 0.5 if masks is None else masks
    masks &= (ids != -1)[..., None, None]
    return ClipTargets(torch.tensor(labels, dtype=torch.int64), ids, masks)


def frame_matches(targets: list[ClipTargets], seed: int = 0) -> list[list[Pairs]]:
    """Of all layers but one more than there are copies: other queries for each."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for clip in targets:
        for t in range(FRAMES):
            seen = int((clip.ids[:, t] != -1).sum())
            layers = [torch.randperm(FRAME_QUERIES, generator=generator)[:seen] for _ in range(COPIES + 1)]
            result.append([(queries, torch.arange(seen).flip(0)) for queries in layers])
    return result


def run(video: VitaOutput, features: Tensor, targets: list[ClipTargets], **changes: Any) -> dict[str, Tensor]:
    return criterion(**changes)(video, features, targets, frame_matches(targets))


def test_names_and_gradients() -> None:
    video, features, targets = output(2), maps(2), [target([3, 1, 5]), target([2], 1)]
    losses = run(video, features, targets)
    assert set(losses) == {
        *(f"loss_vita_{kind}{suffix}" for kind in ("ce", "mask", "dice") for suffix in ("", "_0")),
        "loss_vita_sim",
    }
    sum(losses.values()).backward()
    for x in (*vars(video).values(), features):
        assert torch.isfinite(x.grad).all()
        assert (x.grad != 0).any()


def test_a_clip_without_instances_gives_zeros_and_gradients() -> None:
    video, features = output(1), maps(1)
    losses = run(video, features, [target([])])
    for name, loss in losses.items():
        assert (float(loss.detach()) == 0) is not name.startswith("loss_vita_ce")
    expected = F.cross_entropy(video.pred_logits[-1].flatten(0, 2), torch.full((COPIES * QUERIES,), CLASSES))
    torch.testing.assert_close(losses["loss_vita_ce"], 2.0 * expected)  # one class only: its weight is no matter
    sum(losses.values()).backward()
    assert all(x.grad is not None for x in (*vars(video).values(), features))


@torch.no_grad()
def test_matching_is_that_of_dense_masks_at_the_same_points_of_every_frame() -> None:
    video, features, clip, built = output(2), maps(2), target([3, 1, 5]), criterion()
    torch.manual_seed(3)
    found = built._match(video, features[1], 1, clip)
    torch.manual_seed(3)
    points = torch.rand(1, POINTS, 2)
    for d in range(DEPTH):
        for c in range(COPIES):
            dense = torch.einsum("qc,tchw->qthw", video.mask_embeds[d, c, 1], features[1])
            logits, wanted = (
                torch.cat([sample_points(x[:, t].float()[None], points)[0] for t in range(FRAMES)], dim=1)
                for x in (dense, clip.masks)
            )
            p = video.pred_logits[d, c, 1].softmax(-1)
            cost = torch.zeros(QUERIES, 3)
            for q in range(QUERIES):
                for n in range(3):
                    bce = F.binary_cross_entropy_with_logits(logits[q], wanted[n])
                    s = logits[q].sigmoid()
                    dice = 1 - (2 * (s * wanted[n]).sum() + 1) / (s.sum() + wanted[n].sum() + 1)
                    cost[q, n] = 5 * bce + 3 * dice - 2 * p[q, clip.labels[n]]
            rows, columns = linear_sum_assignment(cost.numpy())
            assert [x.tolist() for x in found[d * COPIES + c]] == [rows.tolist(), columns.tolist()]


def by_hand(video: VitaOutput, features: Tensor, targets: list[ClipTargets]) -> dict[str, float]:
    """The losses of flat masks in plain loops: a point is like any other."""
    built, totals = criterion(), {}
    count = max(1, COPIES * sum(len(t.labels) for t in targets))
    for d in range(DEPTH):
        suffix = "" if d == DEPTH - 1 else f"_{d}"
        mask = dice = weights = ce = 0.0
        for b, clip in enumerate(targets):
            for c in range(COPIES):
                queries, instances = built._match(video, features[b], b, clip)[d * COPIES + c]
                classes = torch.full((QUERIES,), CLASSES)
                classes[queries] = clip.labels[instances]
                w = torch.where(classes == CLASSES, 0.1, 1.0)
                ce += float((F.cross_entropy(video.pred_logits[d, c, b], classes, reduction="none") * w).sum())
                weights += float(w.sum())
                for q, n in zip(queries.tolist(), instances.tolist(), strict=True):
                    x = torch.einsum("c,tc->t", video.mask_embeds[d, c, b, q], features[b, :, :, 0, 0])
                    y = (clip.ids[n] != -1).float()
                    mask += float(F.binary_cross_entropy_with_logits(x, y))
                    s = x.sigmoid()
                    top, bottom = 2 * POINTS * float((s * y).sum()), POINTS * float((s + y).sum())
                    dice += 1 - (top + 1) / (bottom + 1)
        totals |= {f"loss_vita_ce{suffix}": 2 * ce / weights, f"loss_vita_mask{suffix}": 5 * mask / count}
        totals[f"loss_vita_dice{suffix}"] = 3 * dice / count
    return totals


def only(video: VitaOutput, b: int) -> VitaOutput:
    assert video.frame_embeds is not None
    logits, embeds = video.pred_logits[:, :, b, None], video.mask_embeds[:, :, b, None]
    return VitaOutput(logits, embeds, video.clip_embeds[:, b, None], video.frame_embeds[:, b, None])


@torch.no_grad()
def test_clips_of_one_process_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class loss over all clips, mask losses over all instances."""
    # every point in the middle: near the border samples fade to zero, and flat masks would not be flat
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, 0.5))
    video, features = output(2), maps(2, flat=True)
    targets = [target([3, 1, 5], flat=True), target([2, 6], 1, flat=True)]
    both = run(video, features, targets)
    for name, value in by_hand(video, features, targets).items():
        assert float(both[name]) == pytest.approx(value, rel=1e-4), name
    alone = [run(only(video, b), features[b, None], [clip]) for b, clip in enumerate(targets)]
    for name, loss in both.items():
        if "mask" in name or "dice" in name:
            torch.testing.assert_close(loss, (3 * alone[0][name] + 2 * alone[1][name]) / 5)


@pytest.mark.parametrize("use_clip", [True, False])
@torch.no_grad()
def test_similarity_is_that_of_a_loop_over_pairs(use_clip: bool) -> None:
    video, features, targets = output(2), maps(2), [target([3, 1, 5]), target([2, 6], 1)]
    targets[1].ids[targets[1].ids != -1] += 5000  # further apart than the released code can tell
    torch.manual_seed(9)
    built, pairs = criterion(sim_use_clip=use_clip), frame_matches(targets)
    found = built(video, features, targets, pairs)["loss_vita_sim"]
    torch.manual_seed(9)
    matches = [built._match(video, features[b], b, clip) for b, clip in enumerate(targets)]
    entries: list[tuple[Any, int, Tensor]] = []
    for b, clip in enumerate(targets):
        for c in range(COPIES):
            for t in range(FRAMES):
                ids = [i for i in clip.ids[:, t].tolist() if i != -1]
                queries, rows = pairs[b * FRAMES + t][1 + c]  # the last COPIES of COPIES + 1 layers
                entries += [
                    ((b, c), ids[n], video.frame_embeds[c, b, t, q])  # type: ignore[index]
                    for q, n in zip(queries.tolist(), rows.tolist(), strict=True)
                ]
            if use_clip:
                queries, rows = matches[b][(DEPTH - 1) * COPIES + c]
                entries += [
                    ((b, c), int(clip.ids[n].max()), video.clip_embeds[c, b, q])
                    for q, n in zip(queries.tolist(), rows.tolist(), strict=True)
                ]
    total, count = 0.0, 0
    for group, owner, embed in entries:
        for other_group, other, other_embed in entries:
            if group == other_group:
                same = torch.tensor(float(owner == other))
                total += float(F.binary_cross_entropy_with_logits(embed @ other_embed, same))
                count += 1
    assert float(found) == pytest.approx(0.5 * total / count, rel=1e-4)


def test_weight_of_the_published_trainings() -> None:
    video, features, targets = output(1), maps(1), [target([3, 1])]
    torch.manual_seed(0)
    ours = run(video, features, targets)["loss_vita_sim"]
    torch.manual_seed(0)
    torch.testing.assert_close(run(video, features, targets, sim_weight=1.0)["loss_vita_sim"], 2 * ours)
