"""VITA as a whole: sessions, whole videos and windows, scores, training, what is frozen, where a training starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from vis.checkpoint import load_weights
from vis.engine.parity.common import clip_sample
from vis.engine.parity.losses import labelled_sample
from vis.modeling.meta_arch.vita import ClipTracks, WholeVideoTracks
from vis.structures import ClipSample, VideoPrediction

# 40 x 72 pixels, padded to 64 x 96; results at another size.
HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH = 40, 72, 50, 80
CLASSES, FRAME_QUERIES, VIDEO_QUERIES, MASK = 6, 9, 13, 24
SMALL = {
    "MODEL.META_ARCHITECTURE": "VITA",
    "MODEL.VITA.ENC_LAYERS": 2,
    "MODEL.VITA.DEC_LAYERS": 2,
    "MODEL.VITA.ENC_WINDOW_SIZE": 6,
    "MODEL.VITA.HIDDEN_DIM": 40,
    "MODEL.VITA.NHEADS": 4,
    "MODEL.VITA.DIM_FEEDFORWARD": 48,
    "MODEL.VITA.NUM_OBJECT_QUERIES": VIDEO_QUERIES,
    "MODEL.VITA.LAST_LAYER_NUM": 2,
}
CLIP = {
    "MODEL.VITA.TEST.CLIP_MODE": True,
    "MODEL.VITA.TEST.CLIP_LENGTH": 8,
    "MODEL.VITA.TEST.CLIP_STRIDE": 3,
}
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "clip": CLIP}
Build = Callable[..., Any]


def video(seed: int, frames: int, *, out: tuple[int, int] = (OUT_HEIGHT, OUT_WIDTH)) -> ClipSample:
    """A coarse picture that slides to the right and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (3, HEIGHT // 8, WIDTH // 8)).repeat(8, axis=1).repeat(8, axis=2)
    noise = rng.integers(-20, 20, (frames, 3, HEIGHT, WIDTH))
    moved = np.stack([np.roll(coarse, t, axis=2) for t in range(frames)])
    sample = clip_sample((moved + noise).clip(0, 255).astype(np.uint8))
    sample["height"], sample["width"] = out
    return sample


def labelled(seed: int, frames: int = 4, *, instances: int = 2) -> ClipSample:
    masks = np.zeros((instances, frames, HEIGHT, WIDTH), dtype=bool)
    ids = np.repeat(np.arange(instances)[:, None] * 7, frames, axis=1)
    for n in range(instances):
        masks[n, :, 5 + 10 * n : 20 + 10 * n, 8 : 40 + 9 * n] = True
    if instances > 1:
        masks[1, 0], ids[1, 0] = False, -1
    return labelled_sample(
        {
            "input": torch.stack(list(video(seed, frames)["image"])).numpy(),
            "gt_masks": np.packbits(masks),
            "gt_masks_shape": np.array(masks.shape),
            "gt_classes": np.array([4, 1, 3][:instances], dtype=np.int64),
            "gt_ids": ids,
        }
    )


@pytest.fixture(scope="module")
def build(tiny_model: Build) -> Build:
    """``build(**{KEY: value})``: weights that say enough for masks of all kinds; frames do not depend on their pass."""

    def of(kind: str = "whole", changes: dict[str, Any] | None = None) -> Any:
        model = tiny_model({**SMALL, **KINDS[kind], **(changes or {})})
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.vita_module.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.4 if "mask_embed" in name else 0.1))
        return model

    return of


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request: pytest.FixtureRequest, build: Build) -> Any:
    return build(request.param)


def decode(rle: Any) -> np.ndarray:
    return np.zeros((OUT_HEIGHT, OUT_WIDTH), np.uint8) if rle is None else coco_mask.decode(rle)


def assert_same(found: VideoPrediction, expected: VideoPrediction, *, tracks: bool = True) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-5)
    assert found.labels.tolist() == expected.labels.tolist()
    assert not tracks or found.track_ids.tolist() == expected.track_ids.tolist()
    for ours, theirs in zip(found.masks, expected.masks, strict=True):
        # a logit within rounding of zero may fall on either side
        assert all(int((decode(a) != decode(b)).sum()) <= 2 for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def naive(model: Any, sample: ClipSample) -> tuple[Tensor, Tensor]:
    """A whole video at once: probabilities (Q, K) and logits (Q, T, H, W) at the size of the input."""
    images = model.normalizer(sample["image"])
    queries, features = model.detect(images)
    found = model.vita_module(queries[None, None])
    logits = torch.einsum("qc,tchw->qthw", found.mask_embeds[0, 0, 0], features)
    full = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return found.pred_logits[0, 0, 0].softmax(-1)[:, :-1], full[..., :HEIGHT, :WIDTH]


def test_results_equal_the_naive_ones(build: Build) -> None:
    """Scores count the quality of masks at the network's size, masks are cut at the original one."""
    model, sample = build(), video(1, 7)
    found = model([sample])[0]
    probabilities, logits = naive(model, sample)
    scores, order = probabilities.flatten().sort(descending=True)
    quality = (logits.sigmoid() * (logits > 0)).sum((1, 2, 3)) / ((logits > 0).sum((1, 2, 3)) + 1e-6)
    expected = scores[:10] * quality[order[:10] // CLASSES]
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-6)
    assert found.labels.tolist() == (order[:10] % CLASSES).tolist()
    assert found.track_ids.tolist() == (order[:10] // CLASSES).tolist()
    resized = F.interpolate(logits, size=(OUT_HEIGHT, OUT_WIDTH), mode="bilinear", align_corners=False)
    filled = 0
    for query, masks in zip(found.track_ids.tolist(), found.masks, strict=True):
        for t, rle in enumerate(masks):
            assert int((decode(rle) != (resized[query, t] > 0).numpy()).sum()) <= 2
            filled += rle is not None
    assert filled >= 20, "this model says too little for the test"
    plain = build(changes={"MODEL.MASK_FORMER.TEST.MASK_SCORE": False})([sample])[0]
    torch.testing.assert_close(plain.scores, scores[:10], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_a_video_that_fits_a_window_is_that_of_the_whole(build: Build, frames: int) -> None:
    assert_same(build("clip")([video(2, frames)])[0], build("whole")([video(2, frames)])[0])


@torch.no_grad()
def test_joined_windows_are_means_of_dense_masks(build: Build) -> None:
    """The result of windows, made again from what was joined, one dense mask per window, track and frame."""
    model, sample = build("clip", {"MODEL.VITA.TEST.CAND_TOPK": 3, "MODEL.VITA.TEST.MATCH_THR": 0.78}), video(3, 15)
    images = model.normalizer(sample["image"])
    tracks = model.open_tracks()
    assert isinstance(tracks, ClipTracks)
    for frame in images:
        tracks.take(frame[None])
    found = tracks.probabilities()
    windows, starts = tracks._state.windows, [0, 3, 6, 7]
    assert [(w.start, w.end) for w in windows] == [(start, start + 8) for start in starts]
    queries, features = model.detect(images)
    sums, counts = torch.zeros(len(found), 15, *features.shape[-2:]), torch.zeros(len(found), 15)
    classes, times = torch.zeros(len(found), CLASSES), torch.zeros(len(found))
    for window in windows:
        out = model.vita_module(queries[None, None, window.start : window.end])
        for track, embed in zip(window.tracks.tolist(), window.mask_embeds, strict=True):
            query = int((out.mask_embeds[0, 0, 0] - embed).abs().sum(1).argmin())
            dense = torch.einsum("c,tchw->thw", out.mask_embeds[0, 0, 0, query], features[window.start : window.end])
            sums[track, window.start : window.end] += dense
            counts[track, window.start : window.end] += 1
            classes[track] += out.pred_logits[0, 0, 0, query].softmax(-1)[:-1]
            times[track] += 1
    torch.testing.assert_close(found, classes / times[:, None], rtol=1e-3, atol=1e-5)
    assert (counts == 0).any()
    assert (counts > 1).any()
    everything = list(range(len(found)))
    for t in range(15):
        expected = torch.where(counts[:, t, None, None] > 0, sums[:, t] / counts[:, t, None, None].clamp(min=1), -1.0)
        torch.testing.assert_close(tracks.masks(t, everything), expected, rtol=1e-3, atol=1e-3)
    tracks.close()


def test_passes_and_pushes_do_not_change_the_result(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, results = video(2, 14), []
    for size in (14, 1, 3, 50):
        monkeypatch.setattr(model, "window_size", size)
        results.append(model([sample])[0])
    session = model.open_video(OUT_HEIGHT, OUT_WIDTH)
    for pushed in (sample["image"][:1], [], sample["image"][1:6], sample["image"][6:]):
        session.push(pushed)
    with pytest.raises(ValueError, match="of this method cannot be cut"):
        session.cut()
    for found in (*results[1:], session.close()):
        assert_same(found, results[0])
    with pytest.raises(ValueError, match="closed"):
        session.close()


def test_open_sessions_do_not_mix(model: Any) -> None:
    samples = [video(1, 14), video(5, 14)]
    sessions = [model.open_video(OUT_HEIGHT, OUT_WIDTH, video_id=0) for _ in samples]
    for t in range(14):
        for session, sample in zip(sessions, samples, strict=True):
            session.push([sample["image"][t]])
    for i in (1, 0):
        assert_same(sessions[i].close(), model([samples[i]])[0])


def test_each_frame_is_detected_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, segment = [], model.segment_frames
    monkeypatch.setattr(model, "segment_frames", lambda images: (seen.append(len(images)), segment(images))[1])
    model([video(1, 14)])
    assert sum(seen) == 14


def test_one_frame_and_none(model: Any) -> None:
    found = model([video(3, 1)])[0]
    assert (found.length, len(found)) == (1, 10)
    with pytest.raises(ValueError, match="no frame"):
        model.open_video(OUT_HEIGHT, OUT_WIDTH).close()


def test_a_video_in_which_nothing_is_found(build: Build) -> None:
    model = build("clip", {"MODEL.VITA.TEST.CAND_SCORE": 1.1})
    found = model([video(1, 14)])[0]
    assert (len(found), found.masks, found.length) == (0, [], 14)


def test_what_grows_with_a_video_is_small(build: Build) -> None:
    """Whole: the queries of each frame. Windows: one embedding for each track in them; queries of a window's frames."""
    images = build().normalizer(video(1, 31)["image"])
    with torch.no_grad():
        whole, clip = build().open_tracks(), build("clip").open_tracks()
        assert isinstance(whole, WholeVideoTracks)
        for part in images.split(4):
            whole.take(part)
            clip.take(part)
            assert len(clip._queries) == len(clip._reduced) <= 8 + 3 + 4
    assert sum(x.numel() for x in whole._queries) == 31 * FRAME_QUERIES * 32
    assert len(clip._state.windows) == 8
    assert sum(w.mask_embeds.numel() for w in clip._state.windows) <= 8 * VIDEO_QUERIES * MASK
    assert clip._reduced[0].shape == (MASK, 8 * 12)  # stride 8 of 64 x 96
    whole.close()
    clip.close()


def test_losses_of_frames_tracklets_and_likeness(build: Build) -> None:
    model = build().train()
    losses = model([labelled(1), labelled(2, instances=1)])
    kinds = [f"{part}{kind}" for part in ("", "vita_") for kind in ("ce", "mask", "dice")]
    names = {f"loss_{kind}" for kind in kinds} | {"loss_vita_sim"}
    names |= {f"loss_{kind}_0" for kind in kinds} | {f"loss_{kind}_{i}" for kind in kinds[:3] for i in (1, 2)}
    assert set(losses) == names
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()


@pytest.mark.parametrize("frames", [1, 4])
def test_images_and_clips_without_instances(build: Build, frames: int) -> None:
    model = build(changes={"MODEL.VITA.ENC_WINDOW_SIZE": 0}).train()
    for instances in (2, 0):
        losses = model([labelled(1, frames, instances=instances)])
        assert all(bool(torch.isfinite(loss)) for loss in losses.values())
        assert (float(losses["loss_vita_sim"].detach()) == 0) is (instances == 0)
        model.zero_grad()
        sum(losses.values()).backward()
        # data-parallel training waits for every parameter
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()


def test_half_precision(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model([video(1, 14)])[0]
        losses = model.train()([labelled(1)])
    model.eval()
    assert torch.isfinite(found.scores).all()
    assert any(rle is not None for masks in found.masks for rle in masks)
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())


def test_clips_of_one_batch_have_one_length(build: Build) -> None:
    model = build().train()
    with pytest.raises(ValueError, match="one length"):
        model([labelled(1, 4), labelled(1, 3)])


def test_a_frozen_detector_stays(build: Build) -> None:
    model = build(changes={"MODEL.VITA.FREEZE_DETECTOR": True}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = model([labelled(1)])
    assert all(name.startswith("loss_vita_") for name in losses)
    sum(losses.values()).backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if name.startswith("vita_module.")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # no statistics moved


def test_what_a_training_starts_from(build: Build, tmp_path: Path) -> None:
    model, file = build(), tmp_path / "model.pth"
    everything = model.state_dict()
    image = {name: value for name, value in everything.items() if not name.startswith("vita_")}
    torch.save({"model": image}, file)
    report = load_weights(model, file)
    assert {name.split(".")[0] for name in report.missing} == {"vita_module", "vita_criterion"}
    with pytest.raises(ValueError, match="MinVIS"):
        load_weights(model, file, training=False)
    # the other classes of COCO: the heads of frames and video start anew
    other = build(changes={"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 11})
    torch.save({"model": other.state_dict()}, file)
    report = load_weights(model, file)
    assert len(report.remade) == 6
    assert report.missing == []
    with pytest.raises(ValueError, match="another set of classes"):
        load_weights(model, file, training=False)
    torch.save({"model": everything}, file)
    assert load_weights(model, file, training=False).remade == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL.VITA.LAST_LAYER_NUM": 4}, "LAST_LAYER_NUM is 4; the frame decoder has 3 layers"),
        ({"MODEL.VITA.LAST_LAYER_NUM": 0}, "LAST_LAYER_NUM is 0"),
        ({"MODEL.VITA.TEST.CLIP_STRIDE": 19}, "CLIP_STRIDE is 19"),
        ({"MODEL.VITA.TEST.CLIP_STRIDE": 0}, "CLIP_STRIDE is 0"),
        ({"MODEL.VITA.TEST.MATCH_STRIDE": 2}, "MATCH_STRIDE must be at least"),
        ({"MODEL.VITA.TEST.CLIP_MODE": True, "MODEL.VITA.TEST.CAND_MAX": 0}, "CAND_MAX 0 at least 1"),
        ({"MODEL.MASK_FORMER.DEEP_SUPERVISION": False}, "DEEP_SUPERVISION True"),
        ({"MODEL.VITA.TEST.CLIP_MODE": True, "MODEL.VITA.TEST.MATCH": "iou"}, "TEST.MATCH is 'iou'"),
    ],
)
def test_settings_that_cannot_be(build: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(changes=changes)
