"""Mask R-CNN as a detector: detectron2's losses, groups of frames, identities, NMS, masks at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor

from vis.config import CfgNode
from vis.engine.config import load_cfg
from vis.layers.paste_masks import paste_masks
from vis.modeling.detectors import FrameDetections, MaskRCNN, build_detector

CLASSES, IDS, EMBED = 5, 7, 12
SIZE, PADDED = (60, 90), (64, 96)
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
    "MODEL.MASK_RCNN.CHANNELS": 16,
    "MODEL.MASK_RCNN.ID_HEAD.FC_DIM": 24,
    "MODEL.MASK_RCNN.TRACK_HEAD.FC_DIM": 20,
    "MODEL.MASK_RCNN.NMS_BY_CLASS": False,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 28,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
}
# So many samples that every anchor and every proposal is one.
ALL = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 20000,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4000,
}


@pytest.fixture(scope="module")
def detector_cfg(project_root: Path) -> Callable[..., CfgNode]:
    def load(changes: dict[str, Any] | None = None) -> CfgNode:
        opts = [part for pair in {**SMALL, **(changes or {})}.items() for part in pair]
        return load_cfg(str(project_root / "configs/_base_/models/masktrack_rcnn_tiny.yaml"), opts)

    return load


@pytest.fixture(scope="module")
def build(detector_cfg: Callable[..., CfgNode]) -> Callable[..., Any]:
    def make(changes: dict[str, Any] | None = None, **heads: int) -> Any:
        torch.manual_seed(0)
        detector = build_detector(detector_cfg(changes), **heads)
        for module in detector.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():  # so that maps are of usual size, and classes, ids and boxes of proposals differ
            detector.train().bottom_up(torch.randn(2, 3, *PADDED))
            for name, parameter in detector.roi_heads.named_parameters():
                if name.endswith(("cls_score.weight", "id_head.predictor.weight")):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return detector.eval()

    return make


def pyramid_of(detector: Any, frames: int = 1, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return detector.top_down(detector.bottom_up(torch.randn(frames, 3, *PADDED)))


def target(*rows: tuple[tuple[int, int, int, int], int, int]) -> Instances:
    """(box, class, id) each; a mask is the box without its corner."""
    masks = torch.zeros(len(rows), *PADDED, dtype=torch.bool)
    for mask, ((x0, y0, x1, y1), _, _) in zip(masks, rows, strict=True):
        mask[y0:y1, x0:x1] = True
        mask[y0 : y0 + 5, x0 : x0 + 5] = False
    out = Instances(SIZE)
    out.gt_boxes = Boxes(torch.tensor([box for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4))
    out.gt_classes = torch.tensor([label for _, label, _ in rows], dtype=torch.int64)
    out.gt_masks = BitMasks(masks)
    out.gt_head_ids = torch.tensor([number for _, _, number in rows], dtype=torch.int64)
    return out


TARGETS = [
    target(((3, 4, 40, 30), 1, 6), ((30, 20, 80, 58), 4, 6)),
    target(((5, 6, 50, 44), 0, 2)),
    target(),
    target(((8, 9, 70, 50), 3, 0), ((1, 2, 30, 58), 1, 1), ((60, 8, 88, 40), 2, 6)),
]


def test_names_and_losses_are_those_of_detectron2(detector_cfg: Callable[..., CfgNode], build: Any) -> None:
    detector = build(ALL).train()
    theirs = detector_cfg(ALL).clone()
    theirs.defrost()
    theirs.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    theirs.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    theirs.MODEL.FPN.OUT_CHANNELS = 16
    theirs.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    theirs.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    reference = GeneralizedRCNN(theirs).train()
    reference.load_state_dict(detector.state_dict())

    images = torch.randn(4, 3, *PADDED)
    pyramid = reference.backbone(images)
    own = detector.top_down(detector.bottom_up(images))
    assert list(own) == list(pyramid)
    for name, level in own.items():
        torch.testing.assert_close(level, pyramid[name])
    with EventStorage():
        listed = ImageList(images, [SIZE] * 4)
        proposals, losses = reference.proposal_generator(listed, pyramid, TARGETS)
        losses |= reference.roi_heads(listed, pyramid, proposals, TARGETS)[1]
    found = detector.losses(own, TARGETS, PADDED)
    assert set(found) == set(losses)
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, msg=name)


def mean_of_losses(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


@pytest.mark.parametrize("numbers", [[0, 0, 1, 1], [0, 1, 2, 3], [5, 2, 2, 2]])
def test_a_batch_in_groups_is_the_mean_of_its_groups(build: Any, numbers: list[int]) -> None:
    detector = build(ALL, num_ids=IDS).train()
    pyramid = pyramid_of(detector, 4)
    groups = torch.tensor(numbers)
    whole = detector.losses(pyramid, TARGETS, PADDED, groups=groups)
    parts = []
    for number in sorted(set(numbers)):
        rows = (groups == number).nonzero()[:, 0].tolist()
        of_group = {name: level[rows] for name, level in pyramid.items()}
        parts.append(detector.losses(of_group, [TARGETS[row] for row in rows], PADDED))
    for name, loss in mean_of_losses(parts).items():
        torch.testing.assert_close(whole[name], loss, msg=name)
    together = detector.losses(pyramid, TARGETS, PADDED)
    assert not torch.allclose(together["loss_mask"], whole["loss_mask"])


def test_identities_are_named_by_positive_regions_and_background_by_the_others(build: Any) -> None:
    detector = build(ALL, num_ids=IDS).train()
    pyramid = pyramid_of(detector, 4)
    seen: list[Tensor] = []
    hook = detector.roi_heads.id_head.register_forward_hook(lambda _, __, out: seen.append(out))
    losses, positives = detector.losses_and_positives(pyramid, TARGETS, PADDED)
    with EventStorage():
        proposals, _ = detector._propose(pyramid, TARGETS, None)
        regions = detector.roi_heads._sample(proposals, TARGETS, None)
    hook.remove()
    logits = seen[0]
    assert logits.shape == (len(regions.labels), IDS + 1)
    overlaps = [_ious(box, TARGETS[int(frame)]) for box, frame in zip(regions.boxes, regions.frames, strict=True)]
    for row, ious in enumerate(overlaps):
        best = max(ious, default=0.0)
        expected = IDS if best < 0.5 else int(TARGETS[int(regions.frames[row])].gt_head_ids[ious.index(best)])
        assert int(regions.ids[row]) == expected
    assert int((regions.ids != IDS).sum()) == len(positives.frames)
    assert float(losses["loss_id"].detach()) > 0
    names = {int(TARGETS[frame].gt_head_ids[i]) for frame, i in zip(positives.frames, positives.instances, strict=True)}
    assert names == {6, 2, 0, 1}


def _ious(box: Tensor, of: Instances) -> list[float]:
    return pairwise_iou(Boxes(box[None]), of.gt_boxes)[0].tolist()


def test_every_parameter_has_a_gradient_without_an_instance(build: Any) -> None:
    detector = build(num_ids=IDS, embed_dim=EMBED).train()
    pyramid = detector.top_down(detector.bottom_up(torch.randn(2, 3, *PADDED)))
    losses, positives = detector.losses_and_positives(pyramid, [target(), target()], PADDED)
    assert positives.embeds.shape == (0, EMBED)
    total = sum(losses.values()) + positives.embeds.sum()
    assert torch.isfinite(total)
    assert float(losses["loss_mask"].detach()) == 0
    total.backward()
    frozen = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert frozen == []


def test_positives_carry_the_embeddings_of_their_regions(build: Any) -> None:
    detector = build(embed_dim=EMBED).train()
    pyramid = pyramid_of(detector, 4)
    _, positives = detector.losses_and_positives(pyramid, TARGETS, PADDED)
    assert positives.embeds.shape == (len(positives.frames), EMBED)
    assert set(positives.frames.tolist()) == {0, 1, 3}
    # instances themselves are among the proposals, so each is a positive of its own
    exact = detector.embed_boxes(pyramid, [x.gt_boxes.tensor for x in TARGETS])
    assert exact.shape == (6, EMBED)
    distances = torch.cdist(exact, positives.embeds)
    assert float(distances.amin(dim=1).max().detach()) < 1e-4


def test_a_shared_hidden_layer(build: Any) -> None:
    detector = build({"MODEL.MASK_RCNN.ID_HEAD.SHARED_FC": True}, num_ids=IDS)
    assert detector.roi_heads.id_head.predictor.weight.shape == (IDS + 1, SMALL["MODEL.ROI_BOX_HEAD.FC_DIM"])
    assert "roi_heads.id_head.fc.weight" not in detector.state_dict()
    own = build(num_ids=IDS)
    assert own.roi_heads.id_head.fc.weight.shape == (24, 16 * 7 * 7)
    assert len(detector.train().losses(pyramid_of(detector, 4), TARGETS, PADDED)) == 6


@torch.no_grad()
def naive(detector: Any, pyramid: dict[str, Tensor], weights: tuple[float, float]) -> list[tuple[float, list[float]]]:
    """(rank, box), one proposal at a time."""
    proposals, _ = detector.proposal_generator(ImageList(pyramid["p2"], [SIZE]), pyramid, None)
    probs, boxes, ids = detector.roi_heads.predict(pyramid, proposals[0].proposal_boxes)
    found = []
    for row in range(len(probs)):
        label, number = int(probs[row].argmax()), int(ids[row].argmax())
        box = Boxes(boxes[row, label][None].clone())
        box.clip(SIZE)
        if probs[row, label] > detector.class_threshold and ids[row, number] > detector.id_threshold:
            rank = weights[0] * probs[row, label] + weights[1] * ids[row, number]
            found.append((float(rank), box.tensor[0].tolist(), row))
    found.sort(key=lambda each: -each[0])
    kept: list[tuple[float, list[float]]] = []
    for rank, box, _ in found:
        one = Instances(SIZE, gt_boxes=Boxes(torch.tensor([other for _, other in kept]).reshape(-1, 4)))
        if all(iou <= detector.nms for iou in _ious(torch.tensor(box), one)):
            kept.append((rank, box))
    return kept[: detector.max_detections]


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.5, 1.0)])
def test_detections_by_class_and_id(build: Any, weights: tuple[float, float]) -> None:
    detector = build(
        {"MODEL.DETECTOR.CLS_THR": 0.15, "MODEL.DETECTOR.ID_THR": 0.12, "MODEL.DETECTOR.TOPK": 6}, num_ids=IDS
    )
    pyramid = pyramid_of(detector)
    with torch.no_grad():
        found = detector.detect(pyramid, SIZE, weights=weights)
    expected = naive(detector, pyramid, weights)
    assert 1 < len(expected) <= 6
    assert found.scores.tolist() == pytest.approx([rank for rank, _ in expected], abs=1e-5)
    torch.testing.assert_close(found.boxes, torch.tensor([box for _, box in expected]), rtol=1e-4, atol=1e-3)
    assert found.class_probs.shape == (len(found), CLASSES)
    assert found.id_probs is not None
    assert found.id_probs.shape == (len(found), IDS)
    assert float(found.id_probs.sum(dim=1).max()) < 1  # the rest is background's
    assert found.candidates >= len(found)


def test_nms_of_each_class_lets_a_box_be_several_detections(build: Any) -> None:
    one = build({"MODEL.DETECTOR.CLS_THR": 0.05, "MODEL.DETECTOR.TOPK": 50})
    each = build({"MODEL.DETECTOR.CLS_THR": 0.05, "MODEL.DETECTOR.TOPK": 50, "MODEL.MASK_RCNN.NMS_BY_CLASS": True})
    pyramid = pyramid_of(one)
    with torch.no_grad():
        single, several = one.detect(pyramid, SIZE), each.detect(pyramid, SIZE)
    assert len(several) > len(single)
    assert ((several.class_probs > 0).sum(dim=1) == 1).all()
    torch.testing.assert_close(several.class_probs.amax(dim=1), several.scores)
    assert several.class_probs.argmax(dim=1).tolist() == several.mask_inputs["labels"].tolist()
    assert (several.scores.diff() <= 0).all()
    for label in range(CLASSES):
        boxes = Boxes(several.boxes[several.mask_inputs["labels"] == label])
        for row in range(1, len(boxes)):
            assert max(_ious(boxes.tensor[row], Instances(SIZE, gt_boxes=Boxes(boxes.tensor[:row])))) <= one.nms


@pytest.mark.parametrize("by_class", [False, True])
def test_no_detection(build: Any, by_class: bool) -> None:
    detector = build(
        {"MODEL.DETECTOR.CLS_THR": 0.999, "MODEL.MASK_RCNN.NMS_BY_CLASS": by_class}, num_ids=IDS, embed_dim=EMBED
    )
    pyramid = pyramid_of(detector)
    with torch.no_grad():
        found = detector.detect(pyramid, SIZE)
        assert found.embeds is not None
        assert (len(found), found.candidates, *found.embeds.shape) == (0, 0, 0, EMBED)
        assert detector.mask_probs(found, pyramid, PADDED).shape == (0, *PADDED)


def test_another_scale_ranks_alike(build: Any) -> None:
    detector = build()
    pyramid = pyramid_of(detector)
    with torch.no_grad():
        a, b = detector.detect(pyramid, SIZE), detector.detect(pyramid, SIZE, scale=(0.5, 0.5))
    torch.testing.assert_close(a.boxes, b.boxes)


def test_a_replaced_map_reaches_the_pyramid(build: Any) -> None:
    detector = build()
    assert isinstance(detector, MaskRCNN)
    with torch.no_grad():
        maps = detector.bottom_up(torch.randn(1, 3, *PADDED))
        assert maps["res5"].shape[1] == detector.res5_channels
        before = detector.top_down(maps)
        after = detector.top_down({**maps, "res5": maps["res5"] + 1})
    assert all(not torch.equal(before[name], after[name]) for name in ("p2", "p3", "p4", "p5", "p6"))


def test_masks_are_pasted_as_detectron2_does() -> None:
    torch.manual_seed(1)
    crops = torch.rand(4, 14, 14)
    boxes = torch.tensor([[3.2, 4.7, 40.1, 30.3], [-5.0, 2.0, 20.5, 70.0], [10.0, 10.0, 12.0, 13.0], [80, 50, 99, 66]])
    size = (61, 90)
    own = paste_masks(crops, boxes, size)
    assert own.shape == (4, *size)
    expected = paste_masks_in_image(crops, Boxes(boxes), size, threshold=0.5)
    assert int(((own >= 0.5) != expected).sum()) <= 2
    ys = (torch.arange(size[0]) + 0.5 - boxes[0, 1]) / (boxes[0, 3] - boxes[0, 1]) * 2 - 1
    xs = (torch.arange(size[1]) + 0.5 - boxes[0, 0]) / (boxes[0, 2] - boxes[0, 0]) * 2 - 1
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
    torch.testing.assert_close(own[0], F.grid_sample(crops[:1, None], grid[None], align_corners=False)[0, 0])


def test_masks_at_another_size_are_those_of_the_input_seen_larger(build: Any) -> None:
    detector = build()
    pyramid = pyramid_of(detector)
    labels = torch.tensor([1, 3])
    found = FrameDetections(
        boxes=torch.tensor([[4.0, 6.0, 44.0, 46.0], [30.0, 10.0, 90.0, 60.0]]),
        scores=torch.ones(2),
        class_probs=F.one_hot(labels, CLASSES).float(),
        id_probs=None,
        embeds=None,
        mask_inputs={"labels": labels},
        candidates=2,
    )
    with torch.no_grad():
        small = detector.mask_probs(found, pyramid, PADDED)
        large = detector.masks_at(found, pyramid, (SIZE[0] * 2, SIZE[1] * 3), (3.0, 2.0))
    assert small.shape == (2, *PADDED)
    middle = large[:, :, 1::3][:, 0::2].add(large[:, :, 1::3][:, 1::2]) / 2
    assert float((middle - small[:, : SIZE[0], : SIZE[1]]).abs()[:, 12:40, 36:42].max()) < 0.02


def test_losses_that_it_does_not_have_are_refused(build: Any) -> None:
    for key, value in (("USE_SIGMOID_CE", True), ("BBOX_REG_LOSS_TYPE", "giou")):
        with pytest.raises(ValueError, match="smooth L1"):
            build({f"MODEL.ROI_BOX_HEAD.{key}": value})
    with pytest.raises(ValueError, match="MASK_ON"):
        build({"MODEL.MASK_ON": False})
