"""MaskTrack R-CNN as a whole: results against a plain procedure, windows, sessions, cuts, losses of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from vis.checkpoint import load_weights
from vis.config import CfgNode
from vis.engine.config import load_cfg
from vis.engine.parity.common import clip_sample
from vis.modeling import build_model
from vis.modeling.trackers.embedding import EmbeddingState, TrackedDetections
from vis.structures import ClipSample, VideoPrediction
from vis.structures.rle import decode

CLASSES, FRAMES, HEIGHT, WIDTH = 5, 7, 48, 88
OUTPUT = (61, 101)
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
    "MODEL.MASKTRACK.EMBED_DIM": 12,
    "MODEL.DETECTOR.CLS_THR": 0.15,
    "MODEL.DETECTOR.TOPK": 5,
}
OF_MASK_RCNN = {
    "MODEL.MASK_RCNN.CHANNELS": 16,
    "MODEL.MASK_RCNN.TRACK_HEAD.FC_DIM": 20,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 28,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
}
CONDINST = {
    "MODEL.META_ARCHITECTURE": "MaskTrackRCNN",
    "MODEL.DETECTOR.NAME": "CondInst",
    "MODEL.CONDINST.DIM": 64,
    "MODEL.TRACKER.NAME": "EmbeddingTracker",
    "MODEL.MASKTRACK.BOTH_FRAMES": True,
    "MODEL.MASKTRACK.SIMILARITY": "cosine",
    "MODEL.MASKTRACK.SCORE": "cosine",
    "INPUT.SAMPLING_FRAME_NUM": 2,
}


@pytest.fixture(scope="module")
def config(project_root: Path) -> Callable[..., CfgNode]:
    def load(changes: dict[str, Any] | None = None, file: str = "masktrack_rcnn_tiny") -> CfgNode:
        changes = {**SMALL, **(OF_MASK_RCNN if file == "masktrack_rcnn_tiny" else CONDINST), **(changes or {})}
        opts = [part for pair in changes.items() for part in pair]
        return load_cfg(str(project_root / f"configs/_base_/models/{file}.yaml"), opts)

    return load


def spread(model: Any) -> Any:
    """Weights under which scores lie about the threshold and classes and embeddings of proposals differ."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()
        model.image_model.top_down(model.image_model.bottom_up(torch.randn(2, 3, 64, 96)))
        for name, parameter in model.image_model.named_parameters():
            if name.endswith(("cls_score.weight", "track_head.fc1.weight", "track_head.fc2.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith(("cls_logits.weight", "cls_tower.0.weight", "embed_pred.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if name.endswith("cls_logits.bias"):
                parameter.fill_(-0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model(config: Callable[..., CfgNode]) -> Any:
    torch.manual_seed(0)
    return spread(build_model(config()))


@pytest.fixture(scope="module")
def dense(config: Callable[..., CfgNode]) -> Any:
    torch.manual_seed(0)
    return spread(build_model(config(file="condinst_tiny")))


def video(seed: int, frames: int = FRAMES, size: tuple[int, int] = OUTPUT) -> ClipSample:
    rng = np.random.default_rng(seed)
    blocks = np.repeat(rng.integers(0, 255, (1, 3, HEIGHT // 8, WIDTH // 8)), frames, axis=0)
    blocks[:, :, :, ::3] = rng.integers(0, 255, blocks[:, :, :, ::3].shape)
    sample = clip_sample(blocks.repeat(8, axis=2).repeat(8, axis=3).astype(np.uint8))
    sample["height"], sample["width"] = size
    return sample


def assert_same(found: VideoPrediction, expected: VideoPrediction) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.track_ids.tolist() == expected.track_ids.tolist()
    assert found.length == expected.length
    for ours, theirs in zip(found.masks, expected.masks, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            # A probability within rounding of one half may fall on either side.
            assert a is None or b is None or int((decode(a) != decode(b)).sum()) <= 2


@torch.no_grad()
def plain(model: Any, sample: ClipSample) -> dict[int, tuple[float, int, set[int]]]:
    """track -> (mean score, most frequent class, frames), frame by frame, from the detector alone."""
    state: EmbeddingState | None = None
    scores: dict[int, list[float]] = {}
    labels: dict[int, list[int]] = {}
    sums: dict[int, Tensor] = {}
    frames: dict[int, set[int]] = {}
    for t, frame in enumerate(sample["image"]):
        images = model.normalizer([frame])
        pyramid = model.image_model.top_down(model.image_model.bottom_up(images))
        found = model.image_model.detect(pyramid, (HEIGHT, WIDTH))
        best, classes = found.class_probs.max(dim=1)
        ids, state = model.tracker(TrackedDetections(found.boxes, best, classes, found.embeds), state)
        for row, track in enumerate(ids):
            if track >= 0:
                scores.setdefault(track, []).append(float(best[row]))
                labels.setdefault(track, []).append(int(classes[row]))
                frames.setdefault(track, set()).add(t)
                sums[track] = sums.get(track, torch.zeros(CLASSES)) + found.class_probs[row]
    results = {}
    for track, of in labels.items():
        most = max(Counter(of).values())
        label = max((label for label in set(of) if of.count(label) == most), key=lambda x: float(sums[track][x]))
        results[track] = (sum(scores[track]) / len(of), label, frames[track])
    return results


@pytest.mark.parametrize("kind", ["model", "dense"])
def test_results_are_means_and_votes_over_the_frames_of_a_track(kind: str, request: pytest.FixtureRequest) -> None:
    chosen = request.getfixturevalue(kind)
    sample = video(3)
    (found,) = chosen([sample])
    expected = plain(chosen, sample)
    assert len(expected) > 3
    assert sorted(found.track_ids.tolist()) == sorted(expected)
    assert (found.scores.diff() <= 0).all()
    for score, label, track, masks in zip(
        found.scores.tolist(), found.labels.tolist(), found.track_ids.tolist(), found.masks, strict=True
    ):
        mean, most, frames = expected[track]
        assert score == pytest.approx(mean, abs=1e-4)
        assert label == most
        assert {t for t, mask in enumerate(masks) if mask is not None} <= frames
        assert all(mask is None or mask["size"] == list(OUTPUT) for mask in masks)
    assert any(mask is not None for masks in found.masks for mask in masks)


@pytest.mark.parametrize("kind", ["model", "dense"])
def test_windows_change_nothing_and_videos_do_not_mix(kind: str, request: pytest.FixtureRequest) -> None:
    chosen = request.getfixturevalue(kind)
    a, b = video(3), video(5, FRAMES - 2, (33, 57))
    alone = [chosen([sample])[0] for sample in (a, b)]
    sessions = [chosen.open_video(sample["height"], sample["width"]) for sample in (a, b)]
    for start in range(0, FRAMES, 3):
        for sample, session in zip((a, b), sessions, strict=True):
            session.push(list(sample["image"])[start : start + 3])
    for session, expected in zip(sessions, alone, strict=True):
        assert_same(session.close(), expected)


def test_a_cut_video_keeps_its_ids(model: Any) -> None:
    sample = video(3)
    (whole,) = model([sample])
    session = model.open_video(*OUTPUT)
    session.push(list(sample["image"])[:4])
    first = session.cut()
    session.push(list(sample["image"])[4:])
    second = session.close()
    assert (first.length, second.length) == (4, FRAMES - 4)
    parts = {
        track: [*_masks(first, track, 4), *_masks(second, track, FRAMES - 4)] for track in whole.track_ids.tolist()
    }
    for track, masks in zip(whole.track_ids.tolist(), whole.masks, strict=True):
        for ours, theirs in zip(parts[track], masks, strict=True):
            assert (ours is None) == (theirs is None)
    assert set(first.track_ids.tolist()) & set(second.track_ids.tolist())


def _masks(prediction: VideoPrediction, track: int, length: int) -> list[Any]:
    ids = prediction.track_ids.tolist()
    return prediction.masks[ids.index(track)] if track in ids else [None] * length


def test_no_detection_and_one(config: Callable[..., CfgNode]) -> None:
    torch.manual_seed(0)
    none = build_model(config({"MODEL.DETECTOR.CLS_THR": 0.9999})).eval()
    (found,) = none([video(1, 2)])
    assert (len(found.scores), found.masks, found.length) == (0, [], 2)
    one = spread(build_model(config({"MODEL.DETECTOR.TOPK": 1, "MODEL.DETECTOR.CLS_THR": 0.01})))
    (found,) = one([video(1, 1)])
    assert found.track_ids.tolist() == [0]


def clip(boxes: list[list[tuple[int, int, int, int] | None]], labels: list[int], seed: int = 0) -> ClipSample:
    """A frame for each list; None for an instance that is absent in it."""
    sample = video(seed, len(boxes))
    sample["instances"] = []
    for of_frame in boxes:
        instances = Instances((HEIGHT, WIDTH))
        masks = torch.zeros(len(of_frame), HEIGHT, WIDTH, dtype=torch.bool)
        for mask, box in zip(masks, of_frame, strict=True):
            if box is not None:
                mask[box[1] : box[3], box[0] : box[2]] = True
        corners = torch.tensor([box or (0, 0, 0, 0) for box in of_frame], dtype=torch.float32).reshape(-1, 4)
        instances.gt_boxes, instances.gt_masks = Boxes(corners), BitMasks(masks)
        instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
        instances.gt_ids = torch.tensor([-1 if b is None else 10 + i for i, b in enumerate(of_frame)]).long()
        sample["instances"].append(instances)
    return sample


PAIRS = [
    clip([[(4, 4, 40, 30), (50, 8, 80, 44), None], [(8, 8, 44, 34), None, (40, 10, 70, 40)]], [1, 4, 0]),
    clip([[(10, 6, 60, 40)], [(12, 6, 62, 40)]], [2], seed=1),
]
NAMES = {
    "model": {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "loss_match"},
    "dense": {"loss_cls", "loss_bbox", "loss_centerness", "loss_mask", "loss_match"},
}


@pytest.mark.parametrize("kind", ["model", "dense"])
def test_losses_of_pairs(kind: str, request: pytest.FixtureRequest) -> None:
    chosen = request.getfixturevalue(kind).train()
    losses = chosen(PAIRS)
    assert set(losses) == NAMES[kind]
    assert all(torch.isfinite(loss) and loss.dim() == 0 for loss in losses.values())
    assert float(losses["loss_match"].detach()) > 0
    chosen.eval()


@pytest.mark.parametrize("kind", ["model", "dense"])
def test_every_parameter_has_a_gradient_whatever_the_instances(kind: str, request: pytest.FixtureRequest) -> None:
    chosen = request.getfixturevalue(kind).train()
    for clips in (
        PAIRS,
        [clip([[], []], [])],
        [clip([[None], [(4, 4, 40, 30)]], [1])],
        [clip([[(4, 4, 40, 30)], [None]], [1])],
    ):
        chosen.zero_grad(set_to_none=True)
        total = sum(chosen(clips).values())
        assert torch.isfinite(total)
        total.backward()
        assert [name for name, parameter in chosen.named_parameters() if parameter.grad is None] == []
    chosen.zero_grad(set_to_none=True)
    chosen.eval()


def test_the_matching_is_with_the_boxes_of_the_reference_frame(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(model.criterion, "forward", lambda pairs: seen.append(pairs) or torch.zeros(()))
    model.train()(PAIRS)
    model.both_frames = True
    model(PAIRS)
    model.both_frames = False
    model.eval()
    once, twice = seen
    assert [pair.known_ids.tolist() for pair in once] == [[10, 12], [10]]
    assert [set(pair.ids.tolist()) for pair in once] == [{10, 11}, {10}]
    assert [pair.known_ids.tolist() for pair in twice] == [[10, 12], [10, 11], [10], [10]]
    pyramid = model.image_model.top_down(model.image_model.bottom_up(_frames(model, PAIRS)))
    second = {name: level[1:2] for name, level in pyramid.items()}
    boxes = PAIRS[0]["instances"][1].gt_boxes.tensor[[0, 2]]
    expected = model.image_model.embed_boxes(second, [boxes])
    assert once[0].known.shape == expected.shape == (2, 12)


def _frames(model: Any, clips: list[ClipSample]) -> Tensor:
    return model.normalizer([frame for sample in clips for frame in sample["image"]])


def test_known_embeddings_of_a_dense_detector_are_means(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(dense.criterion, "forward", lambda pairs: seen.append(pairs) or torch.zeros(()))
    dense.train()(PAIRS)
    dense.eval()
    first, second, _, _ = seen[0]
    for one, other in ((first, second), (second, first)):
        for row, number in enumerate(one.known_ids.tolist()):
            torch.testing.assert_close(one.known[row], other.embeds[other.ids == number].mean(dim=0))


def test_mistakes_are_named(config: Callable[..., CfgNode], model: Any) -> None:
    model.train()
    with pytest.raises(ValueError, match="INPUT.SAMPLING_FRAME_NUM 2"):
        model([clip([[], [], []], [])])
    with pytest.raises(ValueError, match="class 9"):
        model([clip([[(4, 4, 40, 30)], [None]], [9])])
    model.eval()
    with pytest.raises(ValueError, match="BOTH_FRAMES True"):
        build_model(config({"MODEL.MASKTRACK.BOTH_FRAMES": False}, "condinst_tiny"))


def test_a_training_starts_from_detectors_of_other_classes(
    config: Callable[..., CfgNode], model: Any, dense: Any, tmp_path: Path
) -> None:
    for built, file, head, prefix in (
        (model, "masktrack_rcnn_tiny", "roi_heads.track_head", ""),
        (dense, "condinst_tiny", "proposal_generator.fcos_head.embed_", "image_model."),
    ):
        state = {
            name.removeprefix("image_model."): value
            for name, value in built.state_dict().items()
            if name.startswith("image_model.") and head not in name
        }
        path = tmp_path / f"{file}.pth"
        torch.save({"model": {f"{prefix}{name}": value for name, value in state.items()}}, path)
        other = build_model(config({"MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES + 3}, file))
        report = load_weights(other, str(path), training=True)
        assert report.missing
        assert all(head in name for name in report.missing)
        kept = "backbone.fpn_lateral4.weight"
        torch.testing.assert_close(other.image_model.state_dict()[kept], state[kept])
        torch.save({"model": built.state_dict()}, path)
        again = build_model(config(file=file))
        assert not load_weights(again, str(path), training=False).missing
