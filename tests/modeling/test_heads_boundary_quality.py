"""Boundary and quality heads against their formulas, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.modeling.heads.boundary import BoundaryHead, boundary_of, boundary_targets, squared_dice
from vis.modeling.heads.build import Heads, HeadTargets
from vis.modeling.heads.quality import QualityHead, mask_iou, shrink

FRAMES, Q, C, CM = 3, 7, 6, 16
SMALL, PADDED = (5, 9), (20, 36)
SIZES = [(20, 36), (17, 30), (20, 33)]
NUM_MASKS = 4.0


def boundary(**changes: Any) -> BoundaryHead:
    torch.manual_seed(0)
    options = {"dice_weight": 3.0, "ce_weight": 0.5, "positive_weight": 2.0, "threshold": 0.0}
    return BoundaryHead(embed_dim=C, feature_dim=CM, **{**options, **changes})


def quality(**changes: Any) -> QualityHead:
    torch.manual_seed(1)
    return QualityHead(**{"embed_dim": C, "weight": 2.0, "score_power": 0.0, **changes})


def outputs() -> dict[str, Tensor]:
    torch.manual_seed(2)
    embeds, features = torch.randn(FRAMES, Q, C), torch.randn(FRAMES, CM, *SMALL)
    return {"pred_embeds": embeds.requires_grad_(), "mask_features": features.requires_grad_()}


def targets(pairs: list[list[tuple[int, int]]]) -> HeadTargets:
    """``pairs``: for each frame (query, instance); three instances per frame, the last too small to be seen small."""
    torch.manual_seed(3)
    masks = torch.zeros(FRAMES, 3, *PADDED, dtype=torch.bool)
    masks[0, 0, :9, 4:15] = masks[0, 1, 6:18, 12:27] = masks[1, 0, 3:17, 2:30] = masks[1, 1, 8:12, 8:12] = True
    masks[:, 2, 5, 6] = masks[2, :2, 11:20, 20:33] = True
    logits = torch.randn(FRAMES, Q, *SMALL)
    columns = [torch.tensor(frame, dtype=torch.int64).view(-1, 2).unbind(1) for frame in pairs]
    return HeadTargets(columns, list(masks), SIZES, NUM_MASKS, lambda i: logits[i][columns[i][0]])  # type: ignore[arg-type]


PAIRS = [[(4, 1), (0, 0)], [], [(6, 2), (1, 0), (3, 1)]]


def square(size: int, top: int, left: int, height: int = 13, width: int = 17) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_boundary_of_a_square() -> None:
    """Both sides of the edge: 4s - 4 pixels inside, 4s + 4 outside, corners included."""
    mask, edge = square(5, 3, 4), boundary_of(square(5, 3, 4)[None])[0]
    assert int((edge & mask).sum()) == 4 * 5 - 4
    assert int((edge & ~mask).sum()) == 4 * 5 + 4
    assert not edge[5:6, 6:7].any()
    assert not edge[:2].any()
    # The Laplacian is 5 in a corner, 3 at a side; outside 1 off a corner, 2 beside one and 3 at a side.
    assert int(boundary_of(mask[None], threshold=4)[0].sum()) == 4
    assert boundary_of(mask[None], threshold=4)[0, 3, 4]


def test_a_picture_ends_without_a_boundary() -> None:
    assert not boundary_of(torch.ones(1, 7, 9, dtype=torch.bool)).any()
    edge = boundary_of(square(20, 0, 6)[None])[0]  # goes over the lower and right border
    assert edge[:, 5:7].all()
    assert int(edge.sum()) == 2 * 13
    assert boundary_of(torch.zeros(0, 7, 9, dtype=torch.bool)).shape == (0, 7, 9)


def test_boundary_against_neighbours() -> None:
    masks = torch.rand(4, 11, 13, generator=torch.Generator().manual_seed(1)) < 0.7
    near = F.unfold(F.pad(masks[:, None].float(), (1, 1, 1, 1), mode="replicate"), 3).unflatten(2, (11, 13))
    assert torch.equal(boundary_of(masks), near.amax(dim=1) != near.amin(dim=1))


def test_boundary_targets_know_where_the_picture_ends() -> None:
    masks = torch.zeros(1, *PADDED, dtype=torch.bool)
    masks[0, :17, 12:30] = True  # fills the picture, (17, 30), to its right and lower end
    found = boundary_targets(masks, (17, 30), SMALL, 0.0)[0]
    assert found[:, 2:4].sum() == 2 * 5  # columns 11 and 12 lie in cells 2 and 3
    assert found.sum() == 2 * 5
    assert boundary_targets(masks, PADDED, SMALL, 0.0)[0, 4, 5]  # with padding in the picture it has an edge there
    assert boundary_targets(masks[:0], PADDED, SMALL, 0.0).shape == (0, *SMALL)


def test_boundary_loss() -> None:
    head, out, wanted = boundary(), outputs(), targets(PAIRS)
    entries = head(out)
    assert {name: tuple(x.shape) for name, x in entries.items()} == {
        "boundary_embeds": (FRAMES, Q, CM),
        "boundary_features": (FRAMES, CM, *SMALL),
    }
    total = torch.zeros(())
    for frame, pairs in enumerate(PAIRS):
        for query, instance in pairs:
            logits = torch.einsum(
                "c,chw->hw", entries["boundary_embeds"][frame, query], entries["boundary_features"][frame]
            )
            mask = wanted.masks[frame][instance, : SIZES[frame][0], : SIZES[frame][1]]
            edge = torch.zeros(PADDED)
            edge[: SIZES[frame][0], : SIZES[frame][1]] = boundary_of(mask[None])[0]
            q, p = F.max_pool2d(edge[None], 4)[0], logits.sigmoid()
            ce = -(2.0 * q * p.log() + (1 - q) * (1 - p).log()).mean()
            dice = 1 - 2 * (p * q).sum() / ((p * p).sum() + (q * q).sum() + 1)
            total = total + 3.0 * dice + 0.5 * ce
    found = head.losses({**out, **entries}, wanted)
    assert list(found) == ["loss_boundary"]
    torch.testing.assert_close(found["loss_boundary"], total / NUM_MASKS)


def test_squared_dice() -> None:
    q = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    assert squared_dice(q, q).tolist() == pytest.approx([1 - 4 / 5, 1])
    assert float(squared_dice(torch.full((1, 4), 0.5), q[:1])) == pytest.approx(1 - 2 / (1 + 2 + 1))


def test_quality_loss() -> None:
    head, out, wanted = quality(), outputs(), targets(PAIRS)
    entries = head(out)
    assert entries["pred_quality"].shape == (FRAMES, Q)
    total = torch.zeros(())
    for frame, pairs in enumerate(PAIRS):
        for row, (query, instance) in enumerate(pairs):
            inside = wanted.matched_logits(frame)[row] > 0
            mask = F.avg_pool2d(wanted.masks[frame][instance][None].float(), 4)[0] >= 0.5
            iou = float((inside & mask).sum()) / float((inside | mask).sum())
            first, second = head.embed.layers
            hidden = F.relu(first.weight @ out["pred_embeds"][frame, query] + first.bias)
            total = total + (torch.sigmoid(second.weight @ hidden + second.bias)[0] - iou) ** 2
    found = head.losses({**out, **entries}, wanted)
    assert list(found) == ["loss_quality"]
    torch.testing.assert_close(found["loss_quality"], 2.0 * total / NUM_MASKS)


def test_quality_target() -> None:
    masks = torch.zeros(2, 8, 12, dtype=torch.bool)
    masks[0, :4, :6] = masks[1, 0, 0] = True
    small = shrink(masks, (2, 3))
    assert small.tolist() == [[[True, True, False], [False] * 3], [[False] * 3] * 2]
    assert mask_iou(small, small).tolist() == [1, 0]
    assert mask_iou(small[:1], ~small[:1]).tolist() == [0]
    assert shrink(masks[:0], (2, 3)).shape == (0, 2, 3)
    assert mask_iou(small[:0], small[:0]).shape == (0,)


@pytest.mark.parametrize("pairs", [PAIRS, [[], [], []]])
def test_every_parameter_has_a_gradient(pairs: list[list[tuple[int, int]]]) -> None:
    heads, out = Heads([boundary(), quality()]), outputs()
    losses = heads.losses(out, targets(pairs))
    assert list(losses) == ["loss_boundary", "loss_quality"]
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for tensor in (*heads.parameters(), *out.values()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert bool(tensor.grad.any()) == any(pairs)
    if not any(pairs):
        assert all(float(loss.detach()) == 0 for loss in losses.values())
    else:
        rows = out["pred_embeds"].grad.abs().sum(dim=2) > 0  # type: ignore[union-attr]
        assert sorted(map(tuple, rows.nonzero().tolist())) == sorted((f, q) for f in (0, 2) for q, _ in pairs[f])


def test_reid_embeddings_behind_the_queries_are_not_read() -> None:
    out = outputs()
    longer = {**out, "pred_embeds": torch.cat([out["pred_embeds"], torch.randn(FRAMES, Q, C)], dim=2)}
    for head in (boundary(), quality()):
        for name, entry in head(out).items():
            torch.testing.assert_close(head(longer)[name], entry)


def test_factors_of_the_class_scores() -> None:
    out = outputs()
    assert Heads([boundary(), quality()]).score_factors(out) is None
    head = quality(score_power=0.5)
    expected = head(out)["pred_quality"].sqrt()
    torch.testing.assert_close(Heads([boundary(), head]).score_factors(out), expected)
    with pytest.raises(ValueError, match=r"SCORE_POWER is -1"):
        quality(score_power=-1.0)
