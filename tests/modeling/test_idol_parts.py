"""Parts of IDOL against formulas: encoder and decoder under padding, boxes, focal loss, contrast, NMS, results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from vis.layers.mlp import MLP
from vis.modeling.heads.contrastive import ContrastiveHead, key_reference_losses
from vis.modeling.heads.deformable_detr import DeformableTransformer
from vis.modeling.heads.dynamic_mask import MaskBranch, build_controller, dynamic_masks
from vis.modeling.inference.detections import mask_nms, select_queries
from vis.modeling.inference.growing import FrameSizes, GrowingTracks, ResultRules, encode_logits
from vis.modeling.losses.boxes import corners, giou_loss, l1_loss, overlaps
from vis.modeling.losses.focal import focal_cost, sigmoid_focal_loss
from vis.modeling.pixel_decoders.deformable_encoder import PaddedLevels, valid_position_encoding
from vis.modeling.transformer_decoders.deformable_detr import inverse_sigmoid

C = 16


def transformer(**changes: object) -> DeformableTransformer:
    torch.manual_seed(0)
    boxes = nn.ModuleList(MLP(input_dim=C, hidden_dim=C, output_dim=4) for _ in range(3))
    sizes = {"embed_dim": C, "feedforward_dim": 24, "num_heads": 2, "num_levels": 4, "dropout": 0.0}
    depth = {"num_encoder_layers": 2, "num_decoder_layers": 3, "num_encoder_points": 4, "num_decoder_points": 3}
    model = DeformableTransformer(**sizes, **depth, encoder_checkpoint=False, bbox_embed=boxes, **changes)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def levels(height: int, width: int, fill: float) -> list[Tensor]:
    sizes = [(height // s, width // s) for s in (8, 16, 32)] + [(-(-height // 64), -(-width // 64))]
    return [torch.full((2, C, *size), fill) for size in sizes]


def test_padding_changes_nothing_inside() -> None:
    """Junk around pictures of 64 x 96: boxes, queries and the valid part of the memory are those without it."""
    model, generator = transformer(), torch.Generator().manual_seed(1)
    tight = [torch.randn(x.shape, generator=generator) for x in levels(64, 96, 0.0)]
    loose = levels(128, 160, 3.0)
    for small, large in zip(tight, loose, strict=True):
        large[..., : small.shape[2], : small.shape[3]] = small
    queries, sizes = torch.randn(7, 2 * C, generator=generator), [(64, 96), (64, 96)]
    with torch.no_grad():
        expected, memory = model(tight, queries, sizes, (64, 96))
        found, padded = model(loose, queries, sizes, (128, 160))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.queries, theirs.queries, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.points, theirs.points, rtol=1e-4, atol=1e-5)
    for small, large in zip(memory, padded, strict=True):
        torch.testing.assert_close(large[..., : small.shape[2], : small.shape[3]], small, rtol=1e-4, atol=1e-4)


def test_layers_refine_boxes() -> None:
    """Each layer starts from the box before, without a gradient to it; the first has no size to start from."""
    model = transformer()
    maps = [torch.randn_like(x) for x in levels(64, 96, 0.0)]
    queries = torch.randn(7, 2 * C, requires_grad=True)
    decoded, _ = model(maps, queries, [(64, 96)] * 2, (64, 96))
    assert torch.equal(decoded[1].points, decoded[0].boxes[..., :2])
    heads = model.decoder.bbox_embed
    start = model.reference_points(queries[:, :C]).sigmoid()
    torch.testing.assert_close(decoded[0].points[0], start)
    for i, layer in enumerate(decoded):
        delta = heads[i](layer.queries)
        if i == 0:
            expected = torch.cat([delta[..., :2] + inverse_sigmoid(layer.points), delta[..., 2:]], -1).sigmoid()
        else:
            expected = (delta + inverse_sigmoid(decoded[i - 1].boxes)).sigmoid()
        torch.testing.assert_close(layer.boxes, expected)
    (gradient,) = torch.autograd.grad(decoded[2].boxes.sum(), [heads[0].layers[2].weight], allow_unused=True)
    assert gradient is None


def test_checkpointed_encoder_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = transformer()
        model.encoder.use_checkpoint = recompute
        maps = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in levels(64, 96, 0.0)]
        decoded, _ = model(maps, torch.linspace(-1, 1, 14 * C).view(7, 2 * C), [(64, 96), (48, 80)], (64, 96))
        decoded[-1].boxes.sum().backward()
        gradients.append(model.level_embed.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_valid_levels() -> None:
    shapes = [(8, 12), (4, 6), (2, 3), (1, 2)]
    found = PaddedLevels.of(shapes, [(64, 96), (40, 72)], (64, 96), torch.device("cpu"))
    assert found.valid_ratios[0].tolist() == [[1.0, 1.0]] * 4
    torch.testing.assert_close(found.valid_ratios[1, 0], torch.tensor([9 / 12, 5 / 8]))
    torch.testing.assert_close(found.valid_ratios[1, 1], torch.tensor([5 / 6, 3 / 4]))
    assert found.starts == [0, 96, 120, 126]
    assert found.padding is not None
    assert found.padding.sum(dim=1).tolist() == [0, 96 - 45 + 24 - 15 + 6 - 6 + 0]
    points = found.reference_points()
    assert points.shape == (2, 128, 4, 2)
    torch.testing.assert_close(points[0, 1, 0], torch.tensor([1.5 / 12, 0.5 / 8]))
    # The second cell of the first row, in shares of the valid part times that of the level that is looked at.
    torch.testing.assert_close(points[1, 1, 1], torch.tensor([1.5 / 9 * 5 / 6, 0.5 / 5 * 3 / 4]))
    assert PaddedLevels.of(shapes, [(64, 96)] * 2, (64, 96), torch.device("cpu")).padding is None


def test_position_encoding() -> None:
    """Rows and columns at their centres, over the valid part: (i + 0.5) / n * 2 pi."""
    inside = torch.zeros(1, 5, 7, dtype=torch.bool)
    inside[:, :4, :6] = True
    found = valid_position_encoding(inside, 8).view(5, 7, 8)
    for row, column in ((0, 0), (3, 5), (2, 1)):
        y, x = (row + 0.5) / 4 * 2 * math.pi, (column + 0.5) / 6 * 2 * math.pi
        expected = [f(angle / 10000 ** (k / 2)) for angle in (y, x) for k in (0, 1) for f in (math.sin, math.cos)]
        assert found[row, column].tolist() == pytest.approx(expected, abs=1e-5)


# Boxes and losses


def test_boxes() -> None:
    a, b = torch.tensor([0.3, 0.3, 0.2, 0.4]), torch.tensor([0.4, 0.4, 0.2, 0.2])
    assert corners(a).tolist() == pytest.approx([0.2, 0.1, 0.4, 0.5])
    inter, union, hull = 0.1 * 0.2, 0.08 + 0.04 - 0.02, 0.3 * 0.4
    iou, giou = overlaps(corners(a), corners(b))
    assert float(iou) == pytest.approx(inter / union, abs=1e-5)
    assert float(giou) == pytest.approx(inter / union - (hull - union) / hull, abs=1e-5)
    assert float(giou_loss(a[None], b[None])) == pytest.approx(1 - float(giou))
    assert float(l1_loss(a[None], b[None])) == pytest.approx(0.1 + 0.1 + 0.2)
    apart = overlaps(corners(a), torch.tensor([0.8, 0.8, 0.9, 0.9]))
    assert float(apart[0]) == 0
    assert float(apart[1]) < -0.5
    assert float(giou_loss(a[None][:0], b[None][:0])) == 0


def test_focal() -> None:
    for logit in (-2.0, 0.3, 4.0):
        p = 1 / (1 + math.exp(-logit))
        positive, negative = -0.25 * (1 - p) ** 2 * math.log(p), -0.75 * p**2 * math.log(1 - p)
        x = torch.tensor(logit)
        assert float(sigmoid_focal_loss(x, torch.tensor(1.0))) == pytest.approx(positive, rel=1e-4)
        assert float(sigmoid_focal_loss(x, torch.tensor(0.0))) == pytest.approx(negative, rel=1e-4)
        assert float(focal_cost(x)) == pytest.approx(positive - negative, rel=1e-4)


def test_contrastive_loss_is_the_double_sum() -> None:
    torch.manual_seed(0)
    anchor, keys = torch.randn(5), torch.randn(12, 5)
    positive, negative = torch.zeros(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
    positive[:3], negative[5:] = True, True  # 3 and 4 are neither
    pairs = [math.exp(float(anchor @ keys[n] - anchor @ keys[p])) for p in range(3) for n in range(5, 12)]
    contrastive, auxiliary = key_reference_losses(anchor, keys, positive, negative)
    assert float(contrastive) == pytest.approx(math.log(1 + sum(pairs)), rel=1e-5)
    # and so is its gradient
    leaf = anchor.clone().requires_grad_()
    ours = torch.autograd.grad(key_reference_losses(leaf, keys, positive, negative)[0], leaf)[0]
    sums = (1 + ((leaf @ keys[5:].T)[None] - (leaf @ keys[:3].T)[:, None]).exp().sum()).log()
    torch.testing.assert_close(ours, torch.autograd.grad(sums, leaf)[0], rtol=1e-4, atol=1e-6)
    cosines = F.cosine_similarity(anchor[None], keys, dim=1).tolist()
    expected = [(c - 1) ** 2 for c in cosines[:3]] + [c**2 for c in cosines[5:]]
    assert float(auxiliary) == pytest.approx(sum(expected) / 10, rel=1e-5)


def test_ten_random_negatives_for_a_positive() -> None:
    """Of 50 negatives, 20 beside two positives, others each time."""
    keys = torch.eye(53)
    anchor = keys[0] + torch.arange(53) / 53
    positive = torch.arange(53) < 2
    values = {float(key_reference_losses(anchor, keys, positive, ~positive)[1]) for _ in range(5)}
    assert len(values) > 1
    one = keys.clone()
    one[2:] = one[2]  # all negatives alike: the mean tells their number
    cosines = F.cosine_similarity(anchor[None], one[:3], dim=1).tolist()
    expected = ((1 - cosines[0]) ** 2 + (1 - cosines[1]) ** 2 + 20 * cosines[2] ** 2) / 22
    assert float(key_reference_losses(anchor, one, positive, ~positive)[1]) == pytest.approx(expected, rel=1e-5)
    nothing = key_reference_losses(anchor, keys, torch.zeros(53).bool(), torch.zeros(53).bool())
    assert nothing.tolist() == [0.0, 0.0]


def test_heads() -> None:
    """Names as released; the controller begins with xavier weights and no bias."""
    names = [name for name, _ in ContrastiveHead(embed_dim=C).named_parameters()]
    assert names == [f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    controller = build_controller(C)
    assert controller.layers[2].weight.shape == (169, C)
    assert all(float(layer.bias.detach().abs().max()) == 0 for layer in controller.layers)
    maps = [torch.randn(2, C, 8, 12), torch.randn(2, C, 4, 6), torch.randn(2, C, 2, 3)]
    features = MaskBranch(embed_dim=C)(maps)
    assert features.shape == (2, 8, 8, 12)
    assert float(features.detach().min()) >= 0
    assert dynamic_masks(features[0], torch.randn(3, 169), torch.rand(3, 2) * 64).shape == (3, 16, 24)


# One frame's detections


def test_select_queries() -> None:
    """Above the threshold, best first, box NMS within a class; a lone weak one where nothing is above."""
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 3 + [[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1]])
    boxes[1] += 0.001
    probabilities = torch.tensor([[0.6, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.05], [0.11, 0.0]])
    assert select_queries(probabilities, boxes, threshold=0.1, iou=0.9).tolist() == [1, 2, 4]
    assert select_queries(probabilities, boxes, threshold=0.1, iou=0.999).tolist() == [1, 2, 0, 4]
    assert select_queries(probabilities * 0.1, boxes, threshold=0.1, iou=0.9).tolist() == [1]


def test_mask_nms() -> None:
    """Greedy in order; what a dropped mask covers stays; of empty masks one stays."""
    masks = torch.full((6, 4, 10), -1.0)
    masks[0, :, :5] = 1
    masks[1, :, 2:7] = 1  # IoU 3/7 with the first
    masks[2, :, 4:9] = 1  # 1/9 with the first, 3/7 with the second
    masks[5, :, :4] = 1  # 4/5 with the first
    assert mask_nms(masks, 0.4).tolist() == [0, 2, 3]
    assert mask_nms(masks, 0.5).tolist() == [0, 1, 2, 3]
    assert mask_nms(masks, 0.9).tolist() == [0, 1, 2, 3, 5]
    assert mask_nms(masks[:1], 0.3).tolist() == [0]


# Results


@pytest.mark.parametrize("output_size", [(40, 72), (57, 101), (23, 31)])
def test_encoded_masks(output_size: tuple[int, int]) -> None:
    """The released way in full: four times as large, probabilities, cut, nearest, above one half."""
    torch.manual_seed(0)
    logits = torch.randn(11, 16, 24)
    logits[3] = -1.0
    sizes = FrameSizes(padded=(64, 96), input=(40, 72), output=output_size)
    found = encode_logits(logits, sizes)
    full = F.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=False).sigmoid()
    expected = F.interpolate(full[..., :40, :72], size=output_size, mode="nearest")[0] > 0.5
    for rle, mask in zip(found, expected.numpy(), strict=True):
        decoded = np.zeros(output_size, np.uint8) if rle is None else coco_mask.decode(rle)
        assert np.array_equal(decoded.astype(bool), mask)
    assert found[3] is None
    assert encode_logits(logits[:0], sizes) == []


RLE_A, RLE_B = {"size": [2, 2], "counts": "04"}, {"size": [2, 2], "counts": "13"}


def grown(frames: Sequence[dict[int, list[float]]], **rules: Any) -> GrowingTracks:
    """Tracks of frames {id: class probabilities}."""
    tracks = GrowingTracks(ResultRules(**rules))
    for frame in frames:
        rows = torch.tensor(list(frame.values())).reshape(len(frame), -1 if frame else 2)
        tracks.add(list(frame), rows, [RLE_A] * len(frame))
    return tracks


def listed(tracks: GrowingTracks) -> list[tuple[int, int, float]]:
    """(track, class, score), best first."""
    scores, labels, ids = (x.tolist() for x in tracks.results())
    return [(i, label, round(score, 4)) for i, label, score in zip(ids, labels, scores, strict=True)]


FRAMES = [{0: [0.8, 0.2]}, {}, {0: [0.6, 0.0], 1: [0.01, 0.04]}]


def test_growing_results() -> None:
    """Means over the frames of a track alone; every class above the threshold, or the best whatever it is."""
    assert listed(grown(FRAMES, threshold=0.05)) == [(0, 0, 0.7), (0, 1, 0.1)]
    assert listed(grown(FRAMES, threshold=0.05, max_num=1)) == [(0, 0, 0.7)]
    assert listed(grown(FRAMES, classes="best", threshold=0.05)) == [(0, 0, 0.7), (1, 1, 0.04)]
    maxima = [{4: [value, 1 - value]} for value in (0.3, 0.9, 0.5)]
    assert listed(grown(maxima, score_type="max")) == [(4, 0, 0.9), (4, 1, 0.7)]
    assert listed(grown([], threshold=0.05)) == []


def test_masks_of_a_growing_track() -> None:
    tracks = GrowingTracks(ResultRules())
    for ids, masks in (([0], [RLE_A]), ([], []), ([0, 1], [None, RLE_B])):
        tracks.add(ids, torch.ones(len(ids), 2), masks)
    assert (tracks.masks(0), tracks.masks(1)) == ([RLE_A, None, None], [None, None, RLE_B])


def test_means_over_the_video() -> None:
    """A frame without the track counts 0."""
    assert listed(grown(FRAMES, score_type="video", threshold=0.02)) == [(0, 0, 0.4667), (0, 1, 0.0667)]


def test_majority_of_frames() -> None:
    """The class that is best most often, with the mean of the frames' best; of equals the one that is surer."""
    frames = [{0: [0.9, 0.1], 1: [0.2, 0.7]}, {0: [0.3, 0.4], 1: [0.6, 0.5]}, {0: [0.3, 0.5]}]
    assert listed(grown(frames, classes="vote")) == [(1, 1, 0.65), (0, 1, 0.6)]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"score_type": "median"}, "TEMPORAL_SCORE_TYPE is 'median'"),
        ({"classes": "some"}, "'some', expected one of"),
        ({"max_num": -1}, "0 .all of them. or more"),
    ],
)
def test_rules_that_are_none(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResultRules(**rules)


def test_tracks_go_on_after_a_cut() -> None:
    """Scores and masks are of the part; whether a track is noise, of all frames."""
    first = grown([{0: [0.9], 1: [0.3]}, {0: [0.7], 1: [0.3]}] + [{0: [0.8]}] * 7 + [{0: [0.8], 2: [0.5]}])
    assert listed(first) == [(0, 0, 0.8), (2, 0, 0.5)], "two frames, and eight without: noise"
    second = first.continued()
    assert (len(second), listed(second)) == (0, [])
    for frame in ({0: 0.4}, {}, {}, {3: 0.6}):
        second.add(list(frame), torch.tensor(list(frame.values()))[:, None], [RLE_B] * len(frame))
    assert listed(second) == [(3, 0, 0.6), (0, 0, 0.4)], "one frame of this part, but ten before"
    assert second.masks(0) == [RLE_B, None, None, None]
    for _ in range(2):
        second.add([], torch.zeros(0, 1), [])
    assert listed(second) == [(0, 0, 0.4)], "track 3 is noise, though its part has not ten frames"


def test_noise_goes_from_the_tenth_frame_on() -> None:
    """A track of two frames that missed the last two is dropped, but not before there are ten frames."""
    tracks = GrowingTracks(ResultRules(threshold=0.5))
    score = torch.ones(1, 1)
    for frame in range(9):
        tracks.add([0] if frame < 2 else [], score[: int(frame < 2)], [None] * int(frame < 2))
    assert len(tracks.results()[0]) == 1
    tracks.add([], score[:0], [])
    assert len(tracks.results()[0]) == 0
    for frame in range(3):
        tracks.add([0, 1][: 1 + int(frame == 2)], score.expand(1 + int(frame == 2), 1), [None] * (1 + int(frame == 2)))
    for _ in range(5):
        tracks.add([], score[:0], [])
    assert tracks.results()[2].tolist() == [0], "three frames are no noise, one is"
