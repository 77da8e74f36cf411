"""DVIS and DVIS++ as a whole: windows, sessions, results, what is frozen, the phases of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from vis.engine.parity.common import clip_sample
from vis.engine.parity.losses import labelled_sample
from vis.modeling import build_model
from vis.modeling.meta_arch.dvis import DVISOffline, DVISOnline, OfflineTracks
from vis.structures import ClipSample, VideoPrediction

FRAMES, HEIGHT, WIDTH = 7, 40, 72
CLASSES, QUERIES, MASK = 6, 9, 24
PLUS = {
    "MODEL.MASK_FORMER.REID_BRANCH": True,
    "MODEL.TRACKER.RAW_EMBEDS": True,
    "MODEL.TRACKER.REFERENCE_PROJ": True,
    "MODEL.TRACKER.MASK_FEATURE_PROJ": True,
}
KINDS = {
    "online": {"MODEL.META_ARCHITECTURE": "DVISOnline"},
    "offline": {"MODEL.META_ARCHITECTURE": "DVISOffline"},
    "online++": {"MODEL.META_ARCHITECTURE": "DVISOnline", **PLUS},
    "offline++": {"MODEL.META_ARCHITECTURE": "DVISOffline", **PLUS},
}
SHORT = {"MODEL.TRACKER.DECODER_LAYERS": 2, "MODEL.REFINER.DECODER_LAYERS": 2, "SOLVER.MAX_ITER": 10}


def pictures(seed: int, frames: int = FRAMES) -> np.ndarray:
    """Blocks of colour, some of which change from frame to frame: (T, 3, H, W) uint8."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(rng.integers(0, 255, (1, 3, HEIGHT // 8, WIDTH // 8)), frames, axis=0)
    blocks[:, :, :, ::3] = rng.integers(0, 255, blocks[:, :, :, ::3].shape)
    return blocks.repeat(8, axis=2).repeat(8, axis=3).astype(np.uint8)


def video(seed: int, frames: int = FRAMES) -> ClipSample:
    return clip_sample(pictures(seed, frames))


def labelled(seed: int, frames: int = 3) -> ClipSample:
    """Two instances: one throughout, one that leaves after the first frame."""
    masks = np.zeros((2, frames, HEIGHT, WIDTH), dtype=bool)
    masks[0, :, 4:20, 6:30] = True
    masks[1, 0, 15:35, 20:60] = True
    ids = np.array([[0] * frames, [1] + [-1] * (frames - 1)])
    return labelled_sample(
        {
            "input": pictures(seed, frames),
            "gt_masks": np.packbits(masks),
            "gt_masks_shape": np.array(masks.shape),
            "gt_classes": np.array([2, 5]),
            "gt_ids": ids,
        }
    )


Build = Callable[..., Any]


@pytest.fixture(scope="module")
def build(tiny_model: Callable[..., Any]) -> Build:
    """``build(kind)``: its segmenter takes frame by frame, so that nothing but DVIS depends on the windows."""

    def of(kind: str, **changes: Any) -> Any:
        model = tiny_model({**SHORT, **KINDS[kind], **changes})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("tracker.", "refiner.")):
                    # Masks that are neither all empty nor all full need more spread.
                    parameter.add_(torch.randn_like(parameter) * (0.5 if ".mask_embed." in name else 0.1))
        segment = model.segment

        def one_by_one(images: Tensor) -> dict[str, Tensor]:
            single = [segment(image[None]) for image in images]
            return {key: torch.cat([x[key] for x in single]) for key in single[0] if key != "aux_outputs"}

        model.segment = one_by_one
        return model

    return of


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, build: Build) -> Iterator[Any]:
    model = build(request.param)
    yield model
    assert not model.training


def decoded(rle: Any) -> np.ndarray:
    return np.zeros((HEIGHT, WIDTH), np.uint8) if rle is None else coco_mask.decode(rle)


def assert_same(found: VideoPrediction, expected: VideoPrediction) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.track_ids.tolist() == expected.track_ids.tolist()
    assert found.length == expected.length
    for ours, theirs in zip(found.masks, expected.masks, strict=True):
        # A logit within rounding of zero may fall on either side.
        assert all(int((decoded(a) != decoded(b)).sum()) <= 2 for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def naive(model: Any, sample: ClipSample) -> tuple[Tensor, Tensor]:
    """Everything at once and dense: probabilities (Q, K), masks (Q, T, HEIGHT, WIDTH)."""
    images = model.normalizer(sample["image"])
    clip = model.segment_clips(images, 1)
    tracked, _ = model.tracker(clip, None)
    probabilities = tracked.pred_logits[0, 0].mean(0).softmax(-1)[:, :-1]
    embeds, features = tracked.mask_embeds[0, 0], tracked.mask_features[0]
    if isinstance(model, DVISOffline):
        refined = model.refiner(tracked.pred_embeds, model.tracker.frame_memory(clip))
        by_refiner = refined.pred_logits[0, 0].softmax(-1)[:, :-1]
        assert (by_refiner > probabilities).any()
        assert (by_refiner < probabilities).any()
        probabilities = torch.maximum(probabilities, by_refiner)
        embeds, features = refined.mask_embeds[0, 0], clip.mask_features[0]
    masks = torch.einsum("tqc,tchw->qthw", embeds, features)
    masks = F.interpolate(masks, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return probabilities, masks[..., :HEIGHT, :WIDTH]


def test_results_equal_the_naive_ones(model: Any) -> None:
    sample = video(1)
    (found,) = model([sample])
    probabilities, logits = naive(model, sample)
    scores, order = probabilities.flatten().sort(descending=True)
    torch.testing.assert_close(found.scores, scores[:10], rtol=1e-4, atol=1e-6)
    assert found.labels.tolist() == (order[:10] % CLASSES).tolist()
    assert found.track_ids.tolist() == (order[:10] // CLASSES).tolist()
    filled = 0
    for query, masks in zip(found.track_ids.tolist(), found.masks, strict=True):
        for t, rle in enumerate(masks):
            assert int((decoded(rle) != (logits[query, t] > 0).numpy()).sum()) <= 2
            filled += rle is not None
    assert filled >= 10, "this model says too little for the test"


def test_windows_and_pushes_do_not_change_the_result(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, results = video(2), []
    for size in (FRAMES, 1, 3, 50):
        monkeypatch.setattr(model, "window_size", size)
        results.append(model([sample])[0])
    session = model.open_video(HEIGHT, WIDTH, video_id=0)
    for pushed in (sample["image"][:1], [], sample["image"][1:6], sample["image"][6:]):
        session.push(pushed)
    for found in (*results[1:], session.close()):
        assert_same(found, results[0])


def test_open_sessions_do_not_mix(model: Any) -> None:
    samples = [video(1), video(5)]
    sessions = [model.open_video(HEIGHT, WIDTH, video_id=0) for _ in samples]
    for t in range(FRAMES):
        for session, sample in zip(sessions, samples, strict=True):
            session.push([sample["image"][t]])
    for i in (1, 0):
        assert_same(sessions[i].close(), model([samples[i]])[0])


def test_parts_of_a_video_have_the_tracks_of_the_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut twice: the tracker goes on as if there were no cut; the refiner sees the frames of a part."""
    monkeypatch.setattr(model, "max_num", QUERIES * CLASSES)  # all are reported, so that all can be compared
    sample, taken = video(2), []
    track = model.tracker.forward

    def tracked(*args: Any) -> Any:
        taken.append(track(*args))
        return taken[-1]

    monkeypatch.setattr(model.tracker, "forward", tracked)
    (whole,) = model([sample])
    without = torch.cat([output.pred_embeds for output, _ in taken], dim=1)
    taken.clear()
    session, parts = model.open_video(HEIGHT, WIDTH, video_id=0), []
    for part, end in ((slice(0, 3), session.cut), (slice(3, 4), session.cut), (slice(4, FRAMES), session.close)):
        session.push(sample["image"][part])
        parts.append(end())
    torch.testing.assert_close(torch.cat([output.pred_embeds for output, _ in taken], dim=1), without)
    assert [part.length for part in parts] == [3, 1, 3]
    assert all(part.video_id == 0 for part in parts)

    def masks_of(prediction: VideoPrediction) -> dict[int, list[np.ndarray]]:
        pairs = zip(prediction.track_ids.tolist(), prediction.masks, strict=True)
        return {key: [decoded(rle) for rle in masks] for key, masks in pairs}

    expected = masks_of(whole)
    found = [masks_of(part) for part in parts]
    joined = {key: [mask for part in found for mask in part[key]] for key in expected}
    assert len({masks[0].tobytes() for masks in expected.values()}) > 1
    if isinstance(model, DVISOnline):
        for key, masks in joined.items():
            assert all(int((a != b).sum()) <= 2 for a, b in zip(masks, expected[key], strict=True))
    with pytest.raises(ValueError, match="open another with open_video"):
        session.cut()
    fresh = model.open_video(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="no frame"):
        fresh.cut()
    fresh.push(sample["image"][:2])  # a cut that was refused has changed nothing
    assert fresh.close().length == 2


def test_samples_do_not_go_on(model: Any) -> None:
    sample = video(2)
    with pytest.raises(ValueError, match=r"'keep': True.*open_video.*cut\(\)"):
        model([{**sample, "keep": True}])
    assert model([{**sample, "keep": False}])[0].length == FRAMES


def test_one_frame_and_none(model: Any) -> None:
    found = model([video(3, frames=1)])[0]
    assert found.length == 1
    assert len(found) == 10
    with pytest.raises(ValueError, match="no frame"):
        model.open_video(HEIGHT, WIDTH).close()


def test_tracks_follow_queries_that_change_places(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segmenter that gives its queries in another order in every frame but the first: the same result."""
    sample, segment, seen = video(2), model.segment, []
    (expected,) = model([sample])

    def in_another_order(images: Tensor) -> Any:
        out = segment(images)
        for i in range(len(images)):
            order = torch.randperm(QUERIES) if seen else torch.arange(QUERIES)
            seen.append(order)
            for name in ("pred_logits", "pred_embeds", "raw_embeds", "mask_embeds"):
                out[name][i] = out[name][i, order]
        return out

    monkeypatch.setattr(model, "segment", in_another_order)
    assert_same(model([sample])[0], expected)
    assert len(seen) == FRAMES


def test_what_grows_with_a_video_is_small(build: Build) -> None:
    """Queries of every frame, twice; everything of the size of a picture is in the store."""
    model = build("offline")
    tracks = model.open_tracks()
    assert isinstance(tracks, OfflineTracks)
    images = model.normalizer(video(1)["image"])
    with torch.no_grad():
        for window in images.split(3):
            tracks.take(window)
    width = model.tracker.decoder_norm.normalized_shape[0]
    held = sum(x.numel() for x in (*tracks._embeds, *tracks._memory))
    assert held == 2 * FRAMES * QUERIES * width
    assert len(tracks) == FRAMES
    height, width = (side // 4 for side in images.shape[-2:])
    assert tracks._features.read(6).shape == (MASK, height, width)
    tracks.close()


@pytest.mark.parametrize("kind", list(KINDS))
def test_only_the_last_stage_learns(build: Build, kind: str) -> None:
    model = build(kind).train()
    trained = "tracker" if kind.startswith("online") else "refiner"
    frozen = [part for part in ("backbone", "sem_seg_head", "tracker") if part != trained]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = model([labelled(1), labelled(2)])
    sum(losses.values()).backward()
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    for part in frozen:
        assert not any(module.training for module in getattr(model, part).modules())
        assert not any(parameter.requires_grad for parameter in getattr(model, part).parameters())
    assert getattr(model, trained).training
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if name.startswith(f"{trained}.")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # no statistics moved
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_ce_0"} <= set(losses)


def test_frozen_from_the_start(tiny_cfg: Callable[..., Any]) -> None:
    """Also where nobody has called ``train``, as in a script that steps right after ``build_model``."""
    model = build_model(tiny_cfg({**SHORT, **KINDS["offline"]}))
    assert model.training
    assert not model.backbone.training
    assert not model.tracker.training
    assert model.refiner.training


@pytest.mark.parametrize("kind", ["online", "offline"])
def test_the_phase_follows_the_iteration(build: Build, kind: str) -> None:
    """Guided in the first half of SOLVER.MAX_ITER (10 here), whatever this process has seen of it."""
    model, told = build(kind).train(), []

    class Spy(nn.Module):
        def forward(self, *args: Any, guided: bool) -> dict[str, Tensor]:
            told.append(guided)
            return {}

    model.criterion = Spy()
    for iteration in (4, 5, 9, 0):
        model.set_iteration(iteration)
        model([labelled(1)])
    assert told == [True, False, False, True]


def test_stages_of_weights(model: Any) -> None:
    names = list(model.state_dict())
    for prefixes in type(model).WEIGHT_STAGES.values():
        assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    complete = [stage for stage, prefixes in type(model).WEIGHT_STAGES.items() if not prefixes]
    assert all(stage.endswith("online" if isinstance(model, DVISOnline) else "offline") for stage in complete)


def test_parity_outputs_have_the_released_layout(model: Any) -> None:
    width = model.tracker.decoder_norm.normalized_shape[0]
    small = (16, 24)  # a quarter of the padded 64 x 96
    found = model.parity_outputs(video(1))
    shapes = {name: tuple(array.shape) for name, array in found.items() if not name.startswith("backbone.")}
    expected = {
        "tracker.pred_logits": (1, 3, QUERIES, CLASSES + 1),
        "tracker.pred_masks": (1, QUERIES, 3, *small),
        "tracker.pred_embds": (1, width, 3, QUERIES),
        "pred_cls": (QUERIES, CLASSES + 1),
        "pred_masks": (QUERIES, FRAMES, *small),
    }
    if model.tracker.ref_proj is not None:
        expected["tracker.pred_references"] = (1, width, 3, QUERIES)
    if isinstance(model, DVISOffline):
        expected["refiner.pred_logits"] = (1, FRAMES, QUERIES, CLASSES + 1)
        expected["refiner.pred_masks"] = (1, QUERIES, FRAMES, *small)
        expected["refiner.pred_embds"] = (1, width, FRAMES, QUERIES)
    assert shapes == expected
    assert found["backbone.res3"].shape[0] == 3


def test_wrong_use(build: Build, tiny_cfg: Callable[..., Any]) -> None:
    model = build("online").train()
    with pytest.raises(ValueError, match="clips of one batch must have one length"):
        model([labelled(1, frames=3), labelled(1, frames=2)])
    wrong = labelled(1)
    for frame in wrong["instances"]:
        frame.gt_classes = torch.tensor([2, CLASSES])
    with pytest.raises(ValueError, match="instances of class 6"):
        model([wrong])
    with pytest.raises(ValueError, match="MODEL.TRACKER.NAME is 'QueryMatchingTracker', DVIS needs"):
        build_model(tiny_cfg({**KINDS["online"], "MODEL.TRACKER.NAME": "QueryMatchingTracker"}))
