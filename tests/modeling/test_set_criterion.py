"""The criterion against a naive one that makes every dense mask and draws the same random points."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vis.modeling.criterions import MaskTargets, SetCriterion
from vis.modeling.transformer_decoders.masked import DecoderOutput

IMAGES, Q, K, C, LAYERS = 3, 7, 4, 6, 3
SMALL, PADDED = (5, 9), (20, 36)
POINTS, OVERSAMPLE, IMPORTANT = 24, 3.0, 0.75
WEIGHTS = {"ce": 2.0, "mask": 5.0, "dice": 3.0}
COUNTS = (2, 0, 3)


def criterion(no_object_weight: float = 0.1) -> SetCriterion:
    return SetCriterion(
        num_classes=K,
        class_weight=WEIGHTS["ce"],
        mask_weight=WEIGHTS["mask"],
        dice_weight=WEIGHTS["dice"],
        no_object_weight=no_object_weight,
        num_points=POINTS,
        oversample_ratio=OVERSAMPLE,
        importance_ratio=IMPORTANT,
    )


def outputs(images: int = IMAGES, layers: int = LAYERS) -> DecoderOutput:
    torch.manual_seed(11)
    predictions = [
        {
            "pred_logits": torch.randn(images, Q, K + 1, requires_grad=True),
            "mask_embeds": torch.randn(images, Q, C, requires_grad=True),
        }
        for _ in range(layers)
    ]
    features = torch.randn(images, C, *SMALL, requires_grad=True)
    return {**predictions[-1], "mask_features": features, "aux_outputs": predictions[:-1]}  # type: ignore[typeddict-item]


def leaves(output: DecoderOutput) -> list[Tensor]:
    layers = [*output["aux_outputs"], output]
    return [x for layer in layers for x in (layer["pred_logits"], layer["mask_embeds"])] + [output["mask_features"]]


def targets(counts: tuple[int, ...] = COUNTS) -> list[MaskTargets]:
    torch.manual_seed(12)
    found = []
    for count in counts:
        masks = torch.zeros(count, *PADDED, dtype=torch.bool)
        for mask in masks:
            top, left = int(torch.randint(0, 10, ())), int(torch.randint(0, 20, ()))
            mask[top : top + 8, left : left + 14] = True
        found.append(MaskTargets(torch.randint(0, K, (count,)), masks))
    return found


def read(maps: Tensor, points: Tensor) -> Tensor:
    """(R, h, w) at (R, P, 2)."""
    return F.grid_sample(maps[:, None], points[:, None] * 2 - 1, align_corners=False)[:, 0, 0]


def bce(x: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, t)


def dice(x: Tensor, t: Tensor) -> Tensor:
    s = x.sigmoid()
    return 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)


def naive_match(logits: Tensor, masks: Tensor, target: MaskTargets, points: Tensor) -> tuple[list[int], list[int]]:
    """One layer of one image: logits (Q, K+1), masks (Q, h, w)."""
    cost = torch.zeros(Q, len(target.labels))
    for q in range(Q):
        for n, label in enumerate(target.labels):
            x, t = read(masks[q, None], points)[0], read(target.masks[n, None].float(), points)[0]
            cost[q, n] = WEIGHTS["mask"] * bce(x, t) + WEIGHTS["dice"] * dice(x, t)
            cost[q, n] -= WEIGHTS["ce"] * logits[q].softmax(-1)[label]
    queries, instances = linear_sum_assignment(cost.detach().numpy())
    return queries.tolist(), instances.tolist()


def naive(output: DecoderOutput, wanted: list[MaskTargets], no_object_weight: float = 0.1) -> dict[str, Tensor]:
    layers = [*output["aux_outputs"], output]
    dense = [torch.einsum("nqc,nchw->nqhw", layer["mask_embeds"], output["mask_features"]) for layer in layers]
    matches = {}
    for i, target in enumerate(wanted):
        if len(target.labels):
            points = torch.rand(1, POINTS, 2)
            for j, layer in enumerate(layers):
                matches[i, j] = naive_match(layer["pred_logits"][i], dense[j][i], target, points)
    num_masks = max(sum(len(target.labels) for target in wanted), 1)
    losses = {name: [output["mask_features"].new_zeros(()) for _ in layers] for name in WEIGHTS}
    for i, target in enumerate(wanted):
        pairs = [
            (j, q, n) for j in range(len(layers)) if (i, j) in matches for q, n in zip(*matches[i, j], strict=True)
        ]
        if not pairs:
            continue
        drawn = torch.rand(len(pairs), int(POINTS * OVERSAMPLE), 2)
        fresh = torch.rand(len(pairs), POINTS - int(POINTS * IMPORTANT), 2)
        for row, (j, q, n) in enumerate(pairs):
            mask = dense[j][i, q, None]
            order = read(mask, drawn[row, None])[0].abs().argsort()[: int(POINTS * IMPORTANT)]
            points = torch.cat([drawn[row, order], fresh[row]])[None]
            x, t = read(mask, points)[0], read(target.masks[n, None].float(), points)[0]
            losses["mask"][j] = losses["mask"][j] + bce(x, t) / num_masks
            losses["dice"][j] = losses["dice"][j] + dice(x, t) / num_masks
    for j, layer in enumerate(layers):
        total, share = layer["pred_logits"].new_zeros(()), 0.0
        for i, target in enumerate(wanted):
            classes = dict.fromkeys(range(Q), K)
            for q, n in zip(*matches.get((i, j), ([], [])), strict=True):
                classes[q] = int(target.labels[n])
            for q, label in classes.items():
                weight = no_object_weight if label == K else 1.0
                total = total - weight * layer["pred_logits"][i, q].log_softmax(-1)[label]
                share += weight
        losses["ce"][j] = total / share
    last = len(layers) - 1
    return {
        f"loss_{name}" + ("" if j == last else f"_{j}"): WEIGHTS[name] * losses[name][j]
        for name in WEIGHTS
        for j in range(len(layers))
    }


@pytest.mark.parametrize("counts", [COUNTS, (0, 1, 0), (3, 3, 2)])
def test_equals_the_dense_computation(counts: tuple[int, ...]) -> None:
    output, wanted = outputs(), targets(counts)
    torch.manual_seed(13)
    expected = naive(output, wanted)
    torch.manual_seed(13)
    found = criterion()(output, wanted)
    assert set(found) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(
            found[name], loss, rtol=2e-5, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )
    inputs = leaves(output)
    torch.testing.assert_close(
        torch.autograd.grad(sum(found.values()), inputs),
        torch.autograd.grad(sum(expected.values()), inputs),
        rtol=1e-3,
        atol=1e-6,
    )


def test_names() -> None:
    found = criterion()(outputs(), targets())
    assert sorted(found) == sorted(f"loss_{name}{end}" for name in WEIGHTS for end in ("", "_0", "_1"))
    assert sorted(criterion()(outputs(layers=1), targets())) == ["loss_ce", "loss_dice", "loss_mask"]


def test_class_loss_by_hand() -> None:
    """One query takes the instance, the other is no object with its small weight: sum of w*l over sum of w."""
    features = torch.zeros(1, 1, *SMALL)
    features[0, 0, :, :4] = 9.0
    features[0, 0, :, 4:] = -9.0
    mask = torch.zeros(1, *PADDED, dtype=torch.bool)
    mask[0, :, :16] = True
    logits = torch.tensor([[[0.0, 2.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]])
    output: DecoderOutput = {
        "pred_logits": logits,
        "mask_embeds": torch.tensor([[[-1.0], [1.0]]]),
        "mask_features": features,
        "aux_outputs": [],
    }
    found = criterion(no_object_weight=0.25)(output, [MaskTargets(torch.tensor([0]), mask)])
    matched = -math.log(math.e / (math.e + 4))
    unmatched = math.log(math.exp(2) + 4)
    assert float(found["loss_ce"]) == pytest.approx(2.0 * (matched + 0.25 * unmatched) / 1.25, rel=1e-5)
    assert float(found["loss_mask"]) < 1.5  # a good mask but for the points between two cells


def test_no_instance_at_all() -> None:
    output = outputs()
    losses = criterion()(output, targets((0, 0, 0)))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(float(loss.detach()) == 0 for name, loss in losses.items() if "ce" not in name)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves(output))
    assert float(output["pred_logits"].grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(output["mask_features"].grad.abs().sum()) == 0  # type: ignore[union-attr]
    expected = naive(output, targets((0, 0, 0)))
    torch.testing.assert_close(losses["loss_ce_1"], expected["loss_ce_1"])


def test_order_of_the_instances_does_not_matter() -> None:
    wanted = targets((4,))
    turned = [MaskTargets(wanted[0].labels.flip(0), wanted[0].masks.flip(0))]
    output = outputs(images=1)
    losses = []
    for target in (wanted, turned):
        torch.manual_seed(2)
        losses.append(criterion()(output, target))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-6)


def test_losses_do_not_depend_on_other_images_but_for_the_means() -> None:
    """An empty image beside: the same mask terms, since N counts instances and not images."""
    wanted, output = targets((3,)), outputs(images=1)
    empty = targets((0,))
    doubled: DecoderOutput = {
        "pred_logits": output["pred_logits"].expand(2, -1, -1),
        "mask_embeds": output["mask_embeds"].expand(2, -1, -1),
        "mask_features": output["mask_features"].expand(2, -1, -1, -1),
        "aux_outputs": [],
    }
    alone: DecoderOutput = {**output, "aux_outputs": []}
    torch.manual_seed(3)
    first = criterion()(alone, wanted)
    torch.manual_seed(3)
    second = criterion()(doubled, [*wanted, *empty])
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(first[name], second[name])
    assert not torch.allclose(first["loss_ce"], second["loss_ce"])


def test_unmatched_queries_get_no_mask_gradient() -> None:
    output = outputs(images=1, layers=1)
    losses = criterion()(output, targets((2,)))
    (grad,) = torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], [output["mask_embeds"]])
    assert int((grad[0].abs().sum(dim=1) > 0).sum()) == 2


def test_padding_is_background() -> None:
    """The padded area is background: a prediction that fills it is worse than one that does not."""
    wanted = MaskTargets(torch.tensor([1]), torch.zeros(1, *PADDED, dtype=torch.bool))
    wanted.masks[:, :, :18] = True  # right half: padding
    losses = []
    for fill in (8.0, -8.0):
        features = torch.full((1, 1, *SMALL), 8.0)
        features[..., 5:] = fill
        output: DecoderOutput = {
            "pred_logits": torch.zeros(1, 1, K + 1),
            "mask_embeds": torch.ones(1, 1, 1),
            "mask_features": features,
            "aux_outputs": [],
        }
        torch.manual_seed(5)
        losses.append(float(criterion()(output, [wanted])["loss_mask"]))
    assert losses[0] > 2 * losses[1]


def test_empty_weight_is_the_only_state() -> None:
    state = criterion(0.3).state_dict()
    assert list(state) == ["empty_weight"]
    assert state["empty_weight"].tolist() == pytest.approx([1, 1, 1, 1, 0.3])


def test_overflown_masks_are_an_error() -> None:
    output = outputs()
    with torch.no_grad():
        output["mask_features"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        criterion()(output, targets())


@pytest.mark.parametrize(
    ("points", "oversample", "important"), [(0, 3.0, 0.75), (8, 0.5, 0.75), (8, 3.0, 1.5), (8, 3.0, -1.0)]
)
def test_settings_are_checked(points: int, oversample: float, important: float) -> None:
    with pytest.raises(ValueError, match=f"TRAIN_NUM_POINTS {points} .*IMPORTANCE_SAMPLE_RATIO {important} "):
        SetCriterion(
            num_classes=K,
            class_weight=1.0,
            mask_weight=1.0,
            dice_weight=1.0,
            no_object_weight=0.1,
            num_points=points,
            oversample_ratio=oversample,
            importance_ratio=important,
        )
