"""CTVIS: what is compared with what, and a training step of the whole segmenter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from vis.config import CfgNode
from vis.modeling import build_model
from vis.modeling.criterions.ctvis import CTVISCriterion, matched_queries, running_averages
from vis.structures import ClipSample

T, Q, C = 4, 6, 5


def criterion(**changes: Any) -> CTVISCriterion:
    options = {
        "num_classes": 3,
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 5.0,
        "no_object_weight": 0.1,
        "num_points": 20,
        "oversample_ratio": 3.0,
        "importance_ratio": 0.75,
        "reid_weight": 2.0,
        "aux_reid_weight": 3.0,
        "num_negatives": 99,
        "momentum": False,
    }
    return CTVISCriterion(**{**options, **changes})


def formula(anchor: Tensor, positive: Tensor, negatives: list[Tensor]) -> tuple[float, float]:
    total = sum(math.exp(float(anchor @ minus - anchor @ positive)) for minus in negatives)
    cosines = [(float(F.cosine_similarity(anchor, positive, dim=0)) - 1) ** 2]
    cosines += [float(F.cosine_similarity(anchor, minus, dim=0)) ** 2 for minus in negatives]
    return math.log(1 + total), sum(cosines) / len(cosines)


def embeds() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(T, Q, C)


# Instance 0 is seen in frames 0, 1 and 3, instance 1 enters in frame 2, instance 2 is seen once, in frame 3.
VISIBLE = torch.tensor([[True, True, False, True], [False, False, True, True], [False, False, False, True]])
QUERIES = torch.tensor([[4, 0, 1], [2, 0, 1], [4, 5, 1], [3, 0, 1]])


def test_comparisons_by_hand() -> None:
    x = embeds()
    pairs = [
        (1, 2, (0, 4), (0, 4)),  # frame 1: the latest before is frame 0; negatives are the others of frame 0
        (3, 3, (1, 2), (2, 4)),  # frame 3: the latest before is frame 1; in frame 2 its (empty) query is 4
        (2, 5, (3, 0), (1, 0)),  # its first sight, not in frame 0: compared with the next one
        (3, 0, (2, 5), (2, 5)),
    ]  # frame, query, (frame, query) of the positive, (frame, own query) of the negatives
    terms = [formula(x[t, q], x[pos], [x[other, j] for j in range(Q) if j != own]) for t, q, pos, (other, own) in pairs]
    found = criterion()._reid(x, QUERIES, VISIBLE)
    expected = [sum(term[i] for term in terms) / len(terms) for i in range(2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_running_average() -> None:
    track = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0])]
    first, second, third = running_averages(track)
    share = math.sqrt(0.5)
    assert first.tolist() == [1.0, 0.0]
    assert second.tolist() == pytest.approx([1.0, share])
    assert third.tolist() == second.tolist()  # looks like nothing seen before: left out


def test_momentum_takes_part_in_half_of_the_comparisons() -> None:
    x, counts = embeds(), set()
    for seed in range(12):
        torch.manual_seed(seed)
        counts.add(round(float(criterion(momentum=True)._reid(x, QUERIES, VISIBLE)[0]), 5))
    assert len(counts) == 2  # one comparison has an average that differs from the latest embedding


def test_number_of_negatives() -> None:
    for number, expected in ((99, Q - 1), (2, 2)):
        drawn = criterion(num_negatives=number)._negatives(Q, 3)
        assert len(drawn) == len(set(drawn.tolist())) == expected
        assert 3 not in drawn
    assert len(criterion()._negatives(Q, -1)) == Q - 1
    with pytest.raises(ValueError, match="NUM_NEGATIVES is 0"):
        criterion(num_negatives=0)


def test_queries_of_instances() -> None:
    pairs = [(torch.tensor([3, 1]), torch.tensor([1, 0])), (torch.tensor([2]), torch.tensor([1]))]
    assert matched_queries(pairs, 3).tolist() == [[1, 3, -1], [-1, 2, -1]]


def test_nothing_to_compare() -> None:
    x = embeds().requires_grad_()
    losses = criterion()._reid(x, QUERIES[:, :0], VISIBLE[:0])
    assert losses.tolist() == [0.0, 0.0]
    losses.sum().backward()
    assert x.grad is not None


def sample(ids: Tensor, seed: int) -> ClipSample:
    """A clip of 3 frames of 40x56 with N instances, ids (N, 3)."""
    torch.manual_seed(seed)
    instances = []
    for t in range(3):
        masks = torch.zeros(len(ids), 40, 56, dtype=torch.bool)
        for n in range(len(ids)):
            masks[n, 5 + 3 * n : 25, 4 + 5 * t : 30] = bool(ids[n, t] != -1)
        instances.append(
            Instances(
                (40, 56),
                gt_classes=torch.arange(len(ids)),
                gt_ids=ids[:, t],
                gt_masks=BitMasks(masks),
                gt_boxes=Boxes(torch.zeros(len(ids), 4)),
            )
        )
    image = [torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8) for _ in range(3)]
    return ClipSample(image=image, instances=instances, height=40, width=56, length=3, video_id=seed)


CTVIS = {"MODEL.META_ARCHITECTURE": "CTVIS", "MODEL.MASK_FORMER.REID_BRANCH": True}


def test_training_step_and_evaluation(tiny_cfg: Callable[..., CfgNode]) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_cfg(CTVIS)).train()
    batch = [sample(torch.tensor([[0, 0, 0], [-1, 1, 1]]), 1), sample(torch.zeros(0, 3, dtype=torch.int64), 2)]
    losses = model(batch)
    assert {"loss_ce", "loss_mask_1", "loss_reid", "loss_aux_reid"} <= set(losses)
    assert float(losses["loss_reid"].detach()) > 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.sem_seg_head.predictor.reid_embed.parameters())
    model.eval()
    del batch[0]["instances"]
    (prediction,) = model(batch[:1])
    assert prediction.length == 3
    empty = model.train()(batch[1:])
    assert float(empty["loss_reid"].detach()) == 0


def test_the_reid_branch_is_needed(tiny_cfg: Callable[..., CfgNode]) -> None:
    with pytest.raises(ValueError, match="REID_BRANCH"):
        build_model(tiny_cfg({**CTVIS, "MODEL.MASK_FORMER.REID_BRANCH": False}))
