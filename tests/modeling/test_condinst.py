"""CondInst as a detector, and by itself as ``ImageDetector``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from vis.engine.config import load_cfg
from vis.layers.dynamic_conv import aligned_bilinear, split_parameters
from vis.layers.effective_batch import EffectiveBatch
from vis.modeling import build_model
from vis.modeling.detectors import CondInst, Detector, build_detector
from vis.modeling.detectors.masks import encode_found, original_masks
from vis.modeling.heads.condinst import WIDTHS, dynamic_logits
from vis.modeling.heads.fcos import FCOSHead, FCOSOutputs
from vis.structures import ClipSample
from vis.structures.rle import decode

K, IDS = 5, 7
SIZES = ((10, 14), (5, 7), (3, 4), (2, 2), (1, 1))
PADDED = (96, 128)


@pytest.fixture(scope="module")
def config(project_root: Path) -> Callable[..., Any]:
    def load(**changes: Any) -> Any:
        opts: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", K]
        for name, value in changes.items():
            opts += [f"MODEL.{name.replace('__', '.')}", value]
        return load_cfg(str(project_root / "configs/_base_/models/condinst_tiny.yaml"), opts)

    return load


@pytest.fixture
def detector(config: Callable[..., Any]) -> Detector:
    torch.manual_seed(0)
    return build_detector(config(), num_ids=IDS, embed_dim=6).eval()


def targets(counts: list[int], size: tuple[int, int] = PADDED) -> list[Instances]:
    made = []
    for frame, count in enumerate(counts):
        masks = torch.zeros(count, *size, dtype=torch.bool)
        for i in range(count):
            masks[i, 8 + 20 * i : 40 + 22 * i, 6 + 10 * frame + 25 * i : 50 + 12 * frame + 30 * i] = True
        target = Instances(size)
        target.gt_masks = BitMasks(masks)
        target.gt_boxes = target.gt_masks.get_bounding_boxes()
        target.gt_classes = torch.arange(count) + frame
        target.gt_head_ids = torch.arange(count) * 3
        made.append(target)
    return made


def pyramid(detector: Detector, frames: int) -> dict[str, Tensor]:
    torch.manual_seed(frames)
    return detector.top_down(detector.bottom_up(torch.randn(frames, 3, *PADDED)))


def test_the_interface(detector: Detector) -> None:
    assert isinstance(detector, CondInst)
    assert (detector.num_classes, detector.num_ids, detector.size_divisibility) == (K, IDS, 32)
    maps = detector.bottom_up(torch.randn(1, 3, *PADDED))
    assert detector.res5_channels == maps["res5"].shape[1]
    prefixes = {name.split(".")[0] for name in detector.state_dict()}
    assert prefixes == {"backbone", "proposal_generator", "mask_branch"}


def test_losses_of_frames_in_groups_are_those_of_each_group(detector: Detector) -> None:
    frames = targets([2, 0, 1])
    maps = pyramid(detector, 3)
    losses, positives = detector.losses_and_positives(maps, frames, PADDED, groups=torch.tensor([0, 1, 1]))
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_centerness", "loss_mask", "loss_id"}
    parts = [
        detector.losses({name: x[rows] for name, x in maps.items()}, [frames[i] for i in rows], PADDED)
        for rows in ([0], [1, 2])
    ]
    for name, value in losses.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean(), msg=name)
    assert set(positives.frames.tolist()) == {0, 2}
    assert set(positives.instances[positives.frames == 0].tolist()) == {0, 1}
    assert positives.embeds is not None
    assert positives.embeds.shape == (len(positives.frames), 6)


@pytest.mark.parametrize("counts", [[2, 1], [0, 0]])
def test_every_parameter_has_a_gradient(counts: list[int], detector: Detector) -> None:
    """With data-parallel training a parameter without one would be waited for."""
    detector.train()
    losses, positives = detector.losses_and_positives(pyramid(detector, 2), targets(counts), PADDED)
    assert positives.embeds is not None
    (sum(losses.values()) + positives.embeds.sum()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert sum(counts) == 0 or all(value > 0 for value in losses.values())


def test_masks_are_those_of_a_grouped_convolution() -> None:
    """Five instances of three frames, one of them without any."""
    torch.manual_seed(0)
    features, params = torch.randn(3, 8, 5, 7), torch.randn(5, 169) * 0.4
    frames, strides = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([8.0, 16.0, 8.0, 32.0, 128.0])
    points = torch.tensor([[4.0, 12.0], [24.0, 8.0], [52.0, 36.0], [16.0, 16.0], [64.0, 64.0]])
    found = dynamic_logits(features, params, frames, points, strides)
    ys, xs = torch.meshgrid(torch.arange(5.0) * 8 + 4, torch.arange(7.0) * 8 + 4, indexing="ij")
    weights, biases = split_parameters(params, WIDTHS)
    for i in range(5):
        coordinates = (points[i, :, None, None] - torch.stack([xs, ys])) / (8 * strides[i])
        x = torch.cat([coordinates, features[frames[i]]])[None]
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = F.conv2d(x if layer == 0 else x.relu(), weight[i, :, :, None, None], bias[i])
        torch.testing.assert_close(found[i], aligned_bilinear(x, 2)[0, 0], atol=1e-5, rtol=1e-4)
    one = dynamic_logits(features[2:], params[2:], torch.zeros(3, dtype=torch.int64), points[2:], strides[2:])
    torch.testing.assert_close(one, found[2:], atol=1e-5, rtol=1e-4)
    assert dynamic_logits(features, params[:0], frames[:0], points[:0], strides[:0]).shape == (0, 10, 14)


def predictions(spots: list[dict[str, Any]], ids: int = IDS) -> FCOSOutputs:
    """What a head says that is sure of a few locations: level, row, column, class, cls, ctr, id, box."""
    low = -20.0
    out = FCOSOutputs(
        logits=[torch.full((1, K, *size), low) for size in SIZES],
        boxes=[torch.zeros(1, 4, *size) for size in SIZES],
        centerness=[torch.full((1, 1, *size), low) for size in SIZES],
        params=[torch.randn(1, 169, *size) for size in SIZES],
        ids=[torch.full((1, ids, *size), low) for size in SIZES] if ids else [],
    )
    for spot in spots:
        level, (row, column) = spot["level"], spot["at"]
        out.logits[level][0, spot["label"], row, column] = torch.tensor(spot["cls"]).logit()
        out.centerness[level][0, 0, row, column] = torch.tensor(spot["ctr"]).logit()
        if ids:
            out.ids[level][0, spot["id"][0], row, column] = torch.tensor(spot["id"][1]).logit()
        stride = 8 * 2**level
        x, y = column * stride + stride // 2, row * stride + stride // 2
        x0, y0, x1, y1 = spot["box"]
        out.boxes[level][0, :, row, column] = torch.tensor([x - x0, y - y0, x1 - x, y1 - y], dtype=torch.float32)
    return out


def spot(cls: float, ctr: float, ident: tuple[int, float], box: tuple[int, ...], at: tuple[int, int]) -> dict[str, Any]:
    return {"level": 0, "at": at, "label": at[1] % K, "cls": cls, "ctr": ctr, "id": ident, "box": box}


def detect(detector: Detector, monkeypatch: pytest.MonkeyPatch, out: FCOSOutputs, **options: Any) -> Any:
    monkeypatch.setattr(detector, "head", lambda levels: out)
    return detector.detect({}, (80, 110), **options)


def test_thresholds_and_rank(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    out = predictions(
        [
            spot(0.9, 0.5, (3, 0.2), (0, 0, 20, 20), (1, 1)),
            spot(0.2, 0.5, (4, 0.9), (40, 0, 60, 20), (1, 6)),
            spot(0.9, 0.9, (4, 0.09), (70, 0, 90, 20), (1, 9)),  # no id
            spot(0.09, 0.9, (4, 0.9), (0, 40, 20, 60), (6, 1)),  # no class
        ]
    )
    first = detect(detector, monkeypatch, out, weights=(1.0, 0.5))
    assert first.candidates == 2
    torch.testing.assert_close(first.scores, torch.tensor([0.5 * (0.9 + 0.1), 0.5 * (0.2 + 0.45)]))
    assert first.boxes.tolist() == [[0, 0, 20, 20], [40, 0, 60, 20]]
    later = detect(detector, monkeypatch, out, weights=(0.5, 1.0))
    assert later.boxes.tolist() == first.boxes.tolist()[::-1]
    assert later.class_probs.shape == (2, K)
    torch.testing.assert_close(later.class_probs[0, 6 % K], torch.tensor(0.1))  # times the centerness
    torch.testing.assert_close(later.id_probs[:, [3, 4]], torch.tensor([[0.0, 0.9], [0.2, 0.0]]), atol=1e-6, rtol=0)
    taken = later.take(torch.tensor([1]))
    assert taken.boxes.tolist() == [[0, 0, 20, 20]]
    assert taken.mask_inputs["points"].tolist() == [[12, 12]]
    assert len(taken) == 1


def test_overlaps_go_whatever_the_class_if_strictly_above_the_threshold(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [(0, 0, 30, 20), (0, 0, 15, 20), (0, 0, 30, 18), (20, 0, 50, 20)]  # IoU with the first: 1, .5, .9, .2
    rows = [spot(0.9 - 0.1 * i, 0.8, (0, 0.5), box, (0, i)) for i, box in enumerate(boxes)]
    found = detect(detector, monkeypatch, predictions(rows))
    assert [tuple(map(int, box)) for box in found.boxes] == [boxes[0], boxes[1], boxes[3]]
    assert found.candidates == 4


def test_boxes_are_cut_to_the_image_and_the_number_to_the_best(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = build_detector(config(DETECTOR__TOPK=3, DETECTOR__NMS_PRE=4)).eval()
    rows = [spot(0.3 + 0.1 * i, 0.9, (0, 0.9), (18 * i, 60, 18 * i + 17, 90), (8, 2 * i)) for i in range(6)]
    found = detect(detector, monkeypatch, predictions(rows, ids=0))
    assert found.boxes.tolist() == [[18 * i, 60, min(18 * i + 17, 110), 80] for i in (5, 4, 3)]
    assert found.candidates == 4  # NMS_PRE
    assert found.id_probs is None
    assert found.embeds is None


def test_scale_divides_boxes_before_nms_alone(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [spot(0.9, 0.8, (0, 0.5), (0, 0, 30, 20), (0, 0)), spot(0.8, 0.8, (0, 0.5), (2, 0, 30, 20), (0, 1))]
    plain = detect(detector, monkeypatch, predictions(rows))
    scaled = detect(detector, monkeypatch, predictions(rows), scale=(0.5, 0.25))
    torch.testing.assert_close(scaled.boxes, plain.boxes)


def test_nothing_found(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    found = detect(detector, monkeypatch, predictions([]))
    assert (len(found), found.candidates) == (0, 0)
    assert found.class_probs.shape == (0, K)
    assert detector.mask_probs(found, pyramid(detector, 1), PADDED).shape == (0, *PADDED)


def test_masks_of_what_was_found(detector: Detector) -> None:
    detector.class_threshold = detector.id_threshold = 0.0  # type: ignore[assignment]
    maps = pyramid(detector, 1)
    with torch.no_grad():
        found = detector.detect(maps, (90, 120))
        probs = detector.mask_probs(found, maps, PADDED)
        assert probs.shape == (len(found), *PADDED)
        assert len(found) > 2
        assert found.embeds is not None
        assert found.embeds.shape == (len(found), 6)
        assert (found.scores[:-1] >= found.scores[1:]).all()
        index = torch.tensor([2, 0])
        torch.testing.assert_close(detector.mask_probs(found.take(index), maps, PADDED), probs[index])


def test_masks_at_the_original_size() -> None:
    probs = torch.zeros(11, 32, 64)
    probs[:, 4:12, 8:20] = 1.0
    probs[10] = 0.0
    masks = original_masks(probs, input_size=(30, 60), output_size=(60, 120))
    assert masks.shape == (11, 60, 120)
    assert masks[:10].sum(dim=(1, 2)).tolist() == [16 * 24] * 10
    coded = encode_found(masks)
    assert coded[10] is None
    assert torch.equal(torch.from_numpy(decode(coded[3])).bool(), masks[3])
    assert encode_found(original_masks(probs[:0], input_size=(30, 60), output_size=(60, 120))) == []


def test_head_without_ids_or_embeddings() -> None:
    head = FCOSHead(in_channels=32, num_classes=K, num_params=9, num_convs=1, strides=(8, 16))
    out = head([torch.randn(2, 32, 6, 7), torch.randn(2, 32, 3, 4)])
    assert (out.ids, out.embeds) == ([], [])
    assert out.params[1].shape == (2, 9, 3, 4)
    assert all((x >= 0).all() for x in out.boxes)
    deep = FCOSHead(in_channels=32, num_classes=K, num_params=9, num_ids=IDS, id_convs=3)
    assert len(deep.id_tower) == 9
    with pytest.raises(ValueError, match="48 channels, expected a multiple of 32"):
        FCOSHead(in_channels=48, num_classes=K, num_params=9)


def test_wrong_configurations(config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"MODEL.DETECTOR.NAME is 'Condinst'.*Did you mean 'CondInst'"):
        build_detector(config(DETECTOR__NAME="Condinst"))
    with pytest.raises(ValueError, match="MODEL.CONDINST.RANGES has 3 ends, expected 4"):
        build_detector(config(CONDINST__RANGES=[8, 16, 24]))


@pytest.mark.parametrize("name", ["condinst_r50", "condinst_r101"])
def test_released_sizes_of_the_configurations(name: str, project_root: Path) -> None:
    cfg = load_cfg(str(project_root / f"configs/coco/{name}.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "ImageDetector"
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 80
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.DETECTOR.NORM_EVAL, cfg.MODEL.CONDINST.DIM) == ("BN", True, 256)


def video(length: int, counts: int) -> ClipSample:
    torch.manual_seed(length)
    instances = targets([counts] * length, (70, 100))
    for frame in instances:
        frame.gt_ids = torch.arange(counts)
        frame.gt_ids[1:2] = -1  # absent
    frames = [torch.randint(0, 255, (3, 70, 100), dtype=torch.uint8) for _ in range(length)]
    return {"image": frames, "instances": instances, "height": 140, "width": 210, "video_id": 4, "length": length}


def test_image_detector(config: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    changes = {"DETECTOR__CLS_THR": 0.0, "DETECTOR__TOPK": 3, "MASK_FORMER__TEST__WINDOW_SIZE": 5}
    model = build_model(config(**changes))
    samples = [video(2, 3), video(1, 0)]
    losses = model(samples)
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_centerness", "loss_mask"}
    with EffectiveBatch(steps=2).counting() as counted:
        model(samples)
    announced = model.target_counts(samples)
    assert announced["fcos.positives.0"] > 0
    assert all(torch.equal(counted[name], count) for name, count in announced.items())
    model.eval()
    length = 12
    (found,) = model([video(length, 0)])
    assert len(found) == 3 * length
    assert (found.height, found.width, found.length, found.video_id) == (140, 210, length, 4)
    assert len(set(found.track_ids.tolist())) == len(found)
    assert all(sum(mask is not None for mask in track) <= 1 for track in found.masks)
    where = {next((t for t, mask in enumerate(track) if mask), None) for track in found.masks}
    assert len(where - {None}) > 1
    model.window_size = 12
    (again,) = model([video(length, 0)])
    torch.testing.assert_close(again.scores, found.scores)
