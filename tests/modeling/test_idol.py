"""IDOL as a whole: results against the released procedure in full, windows, sessions, losses of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances
from pycocotools import mask as coco_mask
from torch import Tensor

from vis.config import CfgNode
from vis.engine.config import load_cfg
from vis.engine.parity.common import clip_sample
from vis.modeling import build_model
from vis.modeling.criterions.idol import FrameTargets
from vis.modeling.losses.boxes import corners, overlaps
from vis.modeling.matchers.ota import assign, ota_costs
from vis.modeling.trackers.memory_bank import FrameDetections
from vis.structures import ClipSample, VideoPrediction

FRAMES, HEIGHT, WIDTH = 13, 40, 72
CLASSES, QUERIES = 6, 20
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
    "MODEL.IDOL.HIDDEN_DIM": 32,
    "MODEL.IDOL.NUM_OBJECT_QUERIES": QUERIES,
    "MODEL.IDOL.ENC_LAYERS": 1,
    "MODEL.IDOL.DEC_LAYERS": 2,
    "MODEL.IDOL.BOX_NMS": 0.7,
    "MODEL.IDOL.NMS_PRE": 0.613,  # no quotient of two small numbers of pixels
}


@pytest.fixture(scope="module")
def idol_cfg(project_root: Path) -> Callable[..., CfgNode]:
    def load(changes: dict[str, Any] | None = None) -> CfgNode:
        values = {**SMALL, **(changes or {})}
        opts = [part for pair in values.items() for part in pair]
        return load_cfg(str(project_root / "configs/_base_/models/idol_tiny.yaml"), opts)

    return load


def spread(model: Any) -> Any:
    """Weights under which boxes, classes, masks and embeddings of frames differ; scores about the thresholds."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.detr.named_parameters():
            if "backbone" in name or parameter.dim() < 2:
                continue
            parameter.add_(torch.randn_like(parameter) * (0.02 if "controller" in name else 0.08))
        for head in model.detr.detr.class_embed:
            head.weight.add_(torch.randn_like(head.weight) * 0.3)
            head.bias.fill_(-2.5)
    return model


@pytest.fixture(scope="module")
def model(idol_cfg: Callable[..., CfgNode]) -> Any:
    torch.manual_seed(0)
    return spread(build_model(idol_cfg())).eval()


def pictures(seed: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Blocks of colour, some of which change from frame to frame: (T, 3, H, W) uint8."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(rng.integers(0, 255, (1, 3, height // 8, width // 8)), frames, axis=0)
    blocks[:, :, :, ::3] = rng.integers(0, 255, blocks[:, :, :, ::3].shape)
    return blocks.repeat(8, axis=2).repeat(8, axis=3).astype(np.uint8)


def video(seed: int, frames: int = FRAMES, size: tuple[int, int] = (57, 101)) -> ClipSample:
    sample = clip_sample(pictures(seed, frames))
    sample["height"], sample["width"] = size
    return sample


def decoded(rle: Any, size: tuple[int, int]) -> np.ndarray:
    return np.zeros(size, np.uint8) if rle is None else coco_mask.decode(rle)


def assert_same(found: VideoPrediction, expected: VideoPrediction) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.track_ids.tolist() == expected.track_ids.tolist()
    assert found.length == expected.length
    size = (found.height, found.width)
    for ours, theirs in zip(found.masks, expected.masks, strict=True):
        # A logit within rounding of zero may fall on either side.
        assert all(int((decoded(a, size) != decoded(b, size)).sum()) <= 2 for a, b in zip(ours, theirs, strict=True))


def slow_selection(model: Any, probabilities: Tensor, boxes: Tensor, masks: Tensor) -> list[int]:
    """Threshold, box NMS of each class, mask NMS over all, one pair at a time."""
    scores, labels = probabilities.max(dim=1)
    order = [q for q in scores.argsort(descending=True).tolist() if scores[q] > 0.1] or [int(scores.argmax())]
    kept: list[int] = []
    for q in order:
        same = [k for k in kept if labels[k] == labels[q]]
        if all(float(overlaps(corners(boxes[k]), corners(boxes[q]))[0]) <= model.box_iou for k in same):
            kept.append(q)
    final: list[int] = []
    for q in kept:
        a = masks[q] > 0
        ious = [float((((masks[k] > 0) & a).sum() + 1e-6) / (((masks[k] > 0) | a).sum() + 1e-6)) for k in final]
        if all(iou <= model.mask_iou for iou in ious):
            final.append(q)
    return final


@torch.no_grad()
def naive(model: Any, sample: ClipSample) -> dict[tuple[int, int], tuple[float, list[Any]]]:
    """(track, class) -> score, masks: all queries' masks of all frames at once, upsampled in full."""
    outputs = model.parity_outputs(sample)
    size = (sample["height"], sample["width"])
    history: dict[int, dict[str, list[Any]]] = {}
    state, length = None, len(sample["image"])
    for t in range(length):
        probabilities, masks = outputs["pred_logits"][t].sigmoid(), outputs["pred_masks"][t, :, 0]
        kept = slow_selection(model, probabilities, outputs["pred_boxes"][t], masks)
        scores = probabilities[kept].amax(dim=1)
        ids, state = model.tracker(FrameDetections(scores, outputs["pred_inst_embed"][t, kept]), state)
        full = F.interpolate(masks[kept][None], scale_factor=4, mode="bilinear", align_corners=False).sigmoid()
        full = F.interpolate(full[..., :HEIGHT, :WIDTH], size=size, mode="nearest")[0] > 0.5
        for row, track in enumerate(ids):
            if track >= 0:
                entry = history.setdefault(track, {"masks": [None] * t, "scores": []})
                entry["masks"].append(full[row].numpy())
                entry["scores"].append(probabilities[kept[row]])
        for entry in history.values():
            entry["masks"] += [None] * (t + 1 - len(entry["masks"]))
        if t > 8:
            for key, entry in list(history.items()):
                if all(mask is None for mask in entry["masks"][-2:]) and len(entry["scores"]) < 3:
                    del history[key]
    means = {key: torch.stack(entry["scores"]).mean(dim=0) for key, entry in history.items()}
    return {
        (key, label): (float(mean[label]), history[key]["masks"])
        for key, mean in means.items()
        for label in range(CLASSES)
        if mean[label] > 0.05
    }


@pytest.mark.parametrize("seed", [1, 2])
def test_results_equal_the_naive_ones(model: Any, seed: int) -> None:
    sample = video(seed)
    (found,) = model([sample])
    expected = naive(model, sample)
    pairs = list(zip(found.track_ids.tolist(), found.labels.tolist(), strict=True))
    assert sorted(pairs) == sorted(expected)
    assert len({track for track, _ in pairs}) >= 3, "this model says too little for the test"
    filled = 0
    for pair, score, masks in zip(pairs, found.scores.tolist(), found.masks, strict=True):
        assert score == pytest.approx(expected[pair][0], rel=1e-4)
        for rle, mask in zip(masks, expected[pair][1], strict=True):
            wanted = np.zeros((57, 101), bool) if mask is None else mask
            assert int((decoded(rle, (57, 101)).astype(bool) != wanted).sum()) <= 2
            filled += rle is not None
    assert filled > 10
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_windows_and_pushes_do_not_change_the_result(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, results = video(2), []
    for size in (10, 1, 5, 50):
        monkeypatch.setattr(model, "window_size", size)
        results.append(model([sample])[0])
    session = model.open_video(57, 101, video_id=0)
    for pushed in (sample["image"][:1], [], sample["image"][1:9], sample["image"][9:]):
        session.push(pushed)
    for found in (*results[1:], session.close()):
        assert_same(found, results[0])


def test_open_sessions_do_not_mix(model: Any) -> None:
    samples = [video(1), video(5)]
    sessions = [model.open_video(57, 101, video_id=0) for _ in samples]
    for t in range(FRAMES):
        for session, sample in zip(sessions, samples, strict=True):
            session.push([sample["image"][t]])
    for i in (1, 0):
        assert_same(sessions[i].close(), model([samples[i]])[0])


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 12)])
def test_parts_of_a_video_have_the_tracks_of_the_whole(
    model: Any, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory goes on, so a track keeps its id and its masks; scores are of the part alone."""
    rules = replace(model.rules, classes="best", drop_noise=False)
    monkeypatch.setattr(model, "rules", rules)
    sample = video(1)
    (whole,) = model([sample])
    assert len(whole) > 4
    session = model.open_video(57, 101, video_id=5)
    parts, start = [], 0
    for stop in cuts:
        session.push(sample["image"][start:stop])
        parts.append(session.cut())
        start = stop
    with pytest.raises(ValueError, match="no frame"):
        session.cut()
    session.push(sample["image"][start:])  # a cut that was refused has changed nothing
    parts.append(session.close())
    assert [part.length for part in parts] == [b - a for a, b in zip((0, *cuts), (*cuts, FRAMES), strict=True)]
    assert {part.video_id for part in parts} == {5}
    joined: dict[int, list[Any]] = {}
    for track in whole.track_ids.tolist():
        for part in parts:
            masks = dict(zip(part.track_ids.tolist(), part.masks, strict=True))
            joined.setdefault(track, []).extend(masks.get(track, [None] * part.length))
    assert joined == dict(zip(whole.track_ids.tolist(), whole.masks, strict=True))
    assert_same(parts[0], model([clip_of(sample, cuts[0])])[0])
    with pytest.raises(ValueError, match="open another with open_video"):
        session.cut()


def clip_of(sample: ClipSample, stop: int) -> ClipSample:
    changed = sample.copy()
    changed["image"], changed["video_id"] = sample["image"][:stop], 5
    return changed


def test_samples_do_not_go_on(model: Any) -> None:
    sample: Any = {**video(2), "keep": True}
    with pytest.raises(ValueError, match="take its result with cut"):
        model([sample])


def test_one_frame_and_none(model: Any) -> None:
    found = model([video(3, frames=1)])[0]
    assert found.length == 1
    assert all(len(masks) == 1 for masks in found.masks)
    with pytest.raises(ValueError, match="no frame"):
        model.open_video(HEIGHT, WIDTH).close()
    session = model.open_video(HEIGHT, WIDTH)
    session.push(video(3)["image"][:2])
    with pytest.raises(ValueError, match="a frame is"):
        session.push([torch.zeros(3, 8, 8, dtype=torch.uint8)])
    session.close()
    for closed in (lambda: session.push([]), session.close):
        with pytest.raises(ValueError, match="the video is closed"):
            closed()


def test_nothing_above_the_threshold(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best query of a frame is taken whatever its score, but starts no track below the other threshold."""
    monkeypatch.setattr(model, "select_threshold", 2.0)
    monkeypatch.setattr(model.tracker, "first_score", 2.0)
    found = model([video(1, frames=3)])[0]
    assert (len(found), found.length, found.masks) == (0, 3, [])


def test_one_result_for_a_track(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many = model([video(1)])[0]
    monkeypatch.setattr(model, "rules", replace(model.rules, classes="best"))
    found = model([video(1)])[0]
    assert len(set(found.track_ids.tolist())) == len(found)
    assert set(many.track_ids.tolist()) <= set(found.track_ids.tolist())
    # Classes of one track share its codes.
    tracks = many.track_ids.tolist()
    twins = [masks for masks, track in zip(many.masks, tracks, strict=True) if track == tracks[0]]
    assert len(twins) > 1
    assert all(masks is twins[0] for masks in twins)


def test_masks_are_made_for_survivors_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes through the mask head is what the box NMS left, and what is held of a video are results."""
    counts, decode = [], model.detr.masks

    def spy(features: Tensor, queries: Tensor, *rest: Any) -> Tensor:
        counts.append(len(queries))
        return decode(features, queries, *rest)

    monkeypatch.setattr(model.detr, "masks", spy)
    session = model.open_video(57, 101)
    session.push(video(1)["image"])
    assert len(counts) == FRAMES
    assert max(counts) < QUERIES
    held = session._tracks._tracks.values()
    assert {tuple(track.scores.shape) for track in held} == {(CLASSES,)}
    assert all(rle is None or isinstance(rle["counts"], str) for track in held for rle in track.masks.values())


# Training


def pair(seed: int, present: list[list[bool]], size: tuple[int, int] = (HEIGHT, WIDTH)) -> ClipSample:
    """``present[t][n]``: whether instance n is in frame t (key, reference)."""
    height, width = size
    sample = clip_sample(pictures(seed, 2, height, width))
    sample["instances"] = []
    for t, here in enumerate(present):
        masks = torch.zeros(len(here), height, width, dtype=torch.bool)
        for n, visible in enumerate(here):
            masks[n, 3 + 5 * n + t : 17 + 6 * n, 4 + 11 * n + 2 * t : 26 + 11 * n] = visible
        instances = Instances((height, width), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.arange(len(here)) % CLASSES
        instances.gt_ids = torch.tensor([n if visible else -1 for n, visible in enumerate(here)], dtype=torch.int64)
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        sample["instances"].append(instances)
    return sample


def test_the_last_layer_alone(idol_cfg: Callable[..., CfgNode]) -> None:
    model = spread(build_model(idol_cfg({"MODEL.IDOL.DEEP_SUPERVISION": False}))).train()
    losses = model([pair(1, [[True], [True]])])
    assert list(losses) == [*NAMES, "loss_reid", "loss_reid_aux"]
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


NAMES = ["loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice"]


def test_every_parameter_learns(idol_cfg: Callable[..., CfgNode]) -> None:
    """Also without an instance, or data-parallel training would wait for its gradients forever."""
    model = spread(build_model(idol_cfg())).train()
    for present in ([[True, True, True], [True, False, True]], [[False, True], [True, False]], [[], []]):
        model.zero_grad(set_to_none=True)
        losses = model([pair(1, present), pair(2, present[::-1] if present[0] else present)])
        assert list(losses) == [*(f"{name}_0" for name in NAMES), *NAMES, "loss_reid", "loss_reid_aux"]
        assert all(bool(torch.isfinite(value)) for value in losses.values())
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_losses_against_their_definitions(model: Any) -> None:
    """One pair, the last layer: dense masks, sums over what SimOTA assigned, divided by their number."""
    sample = pair(3, [[True, True], [True, True]])
    outputs = model.parity_outputs(sample)
    boxes = sample["instances"][0].gt_boxes.tensor / torch.tensor([WIDTH, HEIGHT] * 2)
    boxes = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
    logits, labels = outputs["pred_logits"][0], torch.tensor([0, 1])
    match = assign(*ota_costs(logits, outputs["pred_boxes"][0], labels, boxes))
    count = len(match.queries)
    wanted = torch.zeros(QUERIES, CLASSES)
    wanted[match.queries, labels[match.instances]] = 1
    p = logits.sigmoid()
    focal = -wanted * 0.25 * (1 - p) ** 2 * p.log() - (1 - wanted) * 0.75 * p**2 * (1 - p).log()
    ours, true = outputs["pred_boxes"][0, match.queries], boxes[match.instances]
    losses = criterion_of(model, sample)
    assert losses["loss_ce"] == pytest.approx(2 * float(focal.sum()) / count, rel=1e-4)
    assert losses["loss_bbox"] == pytest.approx(5 * float((ours - true).abs().sum()) / count, rel=1e-4)
    giou = overlaps(corners(ours), corners(true))[1]
    assert losses["loss_giou"] == pytest.approx(2 * float((1 - giou).sum()) / count, rel=1e-4)
    masks = outputs["pred_masks"][0, match.queries, 0]
    small = F.pad(sample["instances"][0].gt_masks.tensor, (0, 24, 0, 24))[:, 2::4, 2::4][match.instances].float()
    s = masks.sigmoid()
    dice = 1 - (2 * (s * small).sum(dim=(1, 2)) + 1) / (s.sum(dim=(1, 2)) + small.sum(dim=(1, 2)) + 1)
    assert losses["loss_dice"] == pytest.approx(5 * float(dice.sum()) / count, rel=1e-4)
    ce = F.binary_cross_entropy_with_logits(masks, small, reduction="none")
    pixel = ce * (0.25 * small + 0.75 * (1 - small)) * (s + small - 2 * s * small) ** 2
    assert losses["loss_mask"] == pytest.approx(2 * float(pixel.mean(dim=(1, 2)).sum()) / count, rel=1e-4)


@torch.no_grad()
def criterion_of(model: Any, sample: ClipSample) -> dict[str, float]:
    """The losses with the network in evaluation mode, so that its batch normalisation learns nothing."""
    images = model.normalizer(sample["image"])
    targets: list[FrameTargets] = model._targets(sample, tuple(images.shape[-2:]))
    outputs = model.detr(images, [tuple(frame.shape[-2:]) for frame in sample["image"]])
    losses = model.criterion(model.detr, outputs, targets[:1], targets[1:])
    return {name: float(value) for name, value in losses.items()}


@torch.no_grad()
def test_targets(model: Any) -> None:
    """What the key frame does not show is nobody's target; frames of a pair may differ in size."""
    sample = pair(1, [[True, False, True], [True, True, False]])
    other = pair(2, [[True, False, True], [True, True, False]], size=(32, 64))
    sample["image"][1], sample["instances"][1] = other["image"][1], other["instances"][1]
    key, reference = model._targets(sample, (64, 96))
    assert key.labels.tolist() == reference.labels.tolist() == [0, 2]
    assert key.visible.tolist() == [True, True]
    assert reference.visible.tolist() == [True, False]
    assert (key.image_size, reference.image_size) == ((HEIGHT, WIDTH), (32, 64))
    assert key.masks.shape == reference.masks.shape == (2, 64, 96)
    x0, y0, x1, y1 = sample["instances"][1].gt_boxes.tensor[0].tolist()
    expected = [(x0 + x1) / 2 / 64, (y0 + y1) / 2 / 32, (x1 - x0) / 64, (y1 - y0) / 32]
    assert reference.boxes[0].tolist() == pytest.approx(expected)
    assert np.isfinite(list(criterion_of(model, sample).values())).all()


@torch.no_grad()
def test_reference_gives_contrast_alone(model: Any) -> None:
    """Without an instance in the reference frame there is no contrast, and detection losses stay what they were."""
    both, key_only = pair(1, [[True, True], [True, True]]), pair(1, [[True, True], [False, False]])
    for t in range(2):
        key_only["image"][t] = both["image"][t]
    a, b = criterion_of(model, both), criterion_of(model, key_only)
    assert b["loss_reid"] == b["loss_reid_aux"] == 0.0
    assert a["loss_reid"] > 0
    assert {name: value for name, value in a.items() if "reid" not in name} == pytest.approx(
        {name: value for name, value in b.items() if "reid" not in name}
    )


def test_wrong_use(model: Any, idol_cfg: Callable[..., CfgNode]) -> None:
    model.train()
    three = pair(1, [[True], [True]])
    three["image"] = [*three["image"], three["image"][0]]
    with pytest.raises(ValueError, match="INPUT.SAMPLING_FRAME_NUM 2"):
        model([three])
    wrong = pair(1, [[True], [True]])
    for frame in wrong["instances"]:
        frame.gt_classes = torch.tensor([CLASSES])
    with pytest.raises(ValueError, match="instances of class 6"):
        model([wrong])
    model.eval()
    with pytest.raises(ValueError, match="NUM_FEATURE_LEVELS is 3"):
        build_model(idol_cfg({"MODEL.IDOL.NUM_FEATURE_LEVELS": 3}))
    with pytest.raises(ValueError, match="WINDOW_SIZE is 0"):
        build_model(idol_cfg({"MODEL.MASK_FORMER.TEST.WINDOW_SIZE": 0}))
    with pytest.raises(ValueError, match="MODEL.TRACKER.NAME is 'MemoryBank'"):
        build_model(idol_cfg({"MODEL.TRACKER.NAME": "MemoryBank"}))


def test_one_box_head_under_two_names(model: Any) -> None:
    state = model.state_dict()
    for i in range(2):
        for layer in range(3):
            names = [f"detr.detr.{part}bbox_embed.{i}.layers.{layer}.bias" for part in ("", "transformer.decoder.")]
            assert state[names[0]].data_ptr() == state[names[1]].data_ptr()
    assert type(model).WEIGHT_STAGES == {"backbone": (), "idol": ()}


def test_mixed_precision_overflows_nothing(idol_cfg: Callable[..., CfgNode]) -> None:
    """Under autocast the backbone alone runs in low precision."""
    model = spread(build_model(idol_cfg())).eval()
    sample = pair(1, [[True, True], [True, True]])
    plain = criterion_of(model, sample)
    seen: list[torch.dtype] = []
    for part in (model.detr.detr.transformer.decoder.layers[0], model.detr.mask_head, model.detr.reid_embed_head):
        part.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = criterion_of(model, sample)
    assert set(seen) == {torch.float32}
    assert len(seen) == 3
    assert all(np.isfinite(value) for value in low.values())
    assert low["loss_giou"] == pytest.approx(plain["loss_giou"], rel=0.2)


@pytest.mark.gpu
def test_the_same_on_a_gpu(idol_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = spread(build_model(idol_cfg())).eval()
    sample, training = video(1), pair(1, [[True, True], [True, False]])
    expected, losses = model([sample])[0], criterion_of(model, training)
    model.to("cuda")
    found = model([sample])[0]
    assert len(found) == len(expected)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-2, atol=1e-3)
    on_gpu = criterion_of(model, training)
    del losses["loss_reid_aux"], on_gpu["loss_reid_aux"]  # of random negatives
    assert on_gpu == pytest.approx(losses, rel=1e-2)
    model.train()
    with torch.autocast("cuda", dtype=torch.float16):
        total = sum(model([training]).values())
    total.backward()
    assert bool(torch.isfinite(total))
