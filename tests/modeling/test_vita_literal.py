"""Videos through VITA beside the stated procedure, step by step with dense masks: taken whole, and in windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vis.engine.benchmarks.plain import plain
from vis.engine.benchmarks.plain_vita import PlainVitaModule
from vis.engine.parity.common import clip_sample
from vis.modeling.transformer_decoders.vita import VitaModule
from vis.structures import ClipSample, VideoPrediction

HEIGHT, WIDTH, CLASSES, LENGTH = 40, 72, 6, 8  # pixels are padded to 64 x 96
SMALL = {
    "MODEL.META_ARCHITECTURE": "VITA",
    "MODEL.VITA.ENC_LAYERS": 2,
    "MODEL.VITA.DEC_LAYERS": 1,
    "MODEL.VITA.ENC_WINDOW_SIZE": 6,
    "MODEL.VITA.HIDDEN_DIM": 40,
    "MODEL.VITA.NHEADS": 4,
    "MODEL.VITA.DIM_FEEDFORWARD": 48,
    "MODEL.VITA.NUM_OBJECT_QUERIES": 13,
    "MODEL.VITA.LAST_LAYER_NUM": 2,
    "MODEL.MASK_FORMER.TEST.MAX_NUM": 17,
    "MODEL.VITA.TEST.CLIP_LENGTH": LENGTH,
    "MODEL.VITA.TEST.CAND_TOPK": 4,
    "MODEL.VITA.TEST.MATCH_THR": 0.6,
}
Build = Callable[..., Any]


def build(tiny_model: Build, changes: dict[str, Any]) -> Any:
    """Weights that say enough for masks of all kinds."""
    model = tiny_model({**SMALL, **changes})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.vita_module.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.4 if "mask_embed" in name else 0.1))
    return model


def moving(frames: int, out: tuple[int, int]) -> ClipSample:
    """A coarse picture that slides and fades into another."""
    rng = np.random.default_rng(frames)
    first, second = (
        rng.integers(0, 255, (3, HEIGHT // 8, WIDTH // 8)).repeat(8, 1).repeat(8, 2).astype(float) for _ in range(2)
    )
    share = np.linspace(0, 1, frames)
    pictures = [np.roll((1 - s) * first + s * second, t, axis=2) for t, s in enumerate(share)]
    sample = clip_sample(np.stack(pictures).clip(0, 255).astype(np.uint8))
    sample["height"], sample["width"] = out
    return sample


class Result(NamedTuple):
    """Scores (N,), labels (N,), masks (N, T, H, W) bool."""

    scores: Tensor
    labels: Tensor
    masks: Tensor


def detected(model: Any, sample: ClipSample) -> tuple[Tensor, Tensor]:
    """Queries (T, F, C) and mask features of all frames, in passes of 18."""
    found = [model.detect(part) for part in model.normalizer(sample["image"]).split(18)]
    return torch.cat([queries for queries, _ in found]), torch.cat([features for _, features in found])


def associated(model: Any, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (Q, K+1) and mask embeddings of frames that the module sees together, padded, rolled and masked."""
    with plain(model.vita_module, {VitaModule: PlainVitaModule}):
        found = model.vita_module(queries[None, None])
    return found.pred_logits[0, 0, 0].softmax(dim=-1), found.mask_embeds[0, 0, 0]


def finished(model: Any, probabilities: Tensor, logits: Tensor, sample: ClipSample) -> Result:
    """Top-k of (Q, K) probabilities, masks (Q, T, h, w) at the network's size measured, at the video's size cut."""
    scores, index = probabilities.flatten().topk(min(model.max_num, probabilities.numel()))
    chosen = logits[index // CLASSES]
    inside, area, masks = torch.zeros(len(scores)), torch.zeros(len(scores)), []
    for part in chosen.split(5, dim=1):
        padded = tuple(4 * side for side in logits.shape[-2:])
        full = F.interpolate(part, size=padded, mode="bilinear", align_corners=False)[..., :HEIGHT, :WIDTH]
        soft = full.sigmoid()
        hard = (soft > 0.5).float()
        inside += (soft * hard).sum(dim=(1, 2, 3))
        area += hard.sum(dim=(1, 2, 3))
        size = (sample["height"], sample["width"])
        masks.append(F.interpolate(full, size=size, mode="bilinear", align_corners=False) > 0)
    return Result(scores * inside / (area + 1e-6), index % CLASSES, torch.cat(masks, dim=1))


def assert_is(found: VideoPrediction, expected: Result) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-5)
    assert found.labels.tolist() == expected.labels.tolist()
    differ = filled = 0
    for masks, wanted in zip(found.masks, expected.masks, strict=True):
        for rle, mask in zip(masks, wanted, strict=True):
            assert (rle is None) is (not mask.any()) or int(mask.sum()) <= 2
            drawn = np.zeros(mask.shape, np.uint8) if rle is None else coco_mask.decode(rle)
            differ += int((drawn != mask.numpy()).sum())
            filled += rle is not None
    assert differ <= 2 + expected.masks.numel() // 20000  # a logit within rounding of zero may fall on either side
    assert filled > expected.masks.shape[1], "this model says too little for the test"


@pytest.mark.parametrize(
    ("frames", "pass_size", "out"), [(1, 7, (50, 81)), (19, 1, (33, 90)), (20, 3, (40, 72)), (103, 7, (31, 47))]
)
@torch.no_grad()
def test_whole_videos(tiny_model: Build, frames: int, pass_size: int, out: tuple[int, int]) -> None:
    """Lengths that no window divides, passes of other sizes than the released 18, results of another size."""
    model = build(tiny_model, {"MODEL.MASK_FORMER.TEST.WINDOW_SIZE": pass_size})
    sample = moving(frames, out)
    queries, features = detected(model, sample)
    probabilities, embeds = associated(model, queries)
    logits = torch.einsum("qc,tchw->qthw", embeds, features)
    assert_is(model([sample])[0], finished(model, probabilities[:, :-1], logits, sample))


class Track(NamedTuple):
    """Windows of a track: (start, end, probabilities (K+1), logits (T, h, w), small logits (T, h', w'))."""

    windows: list[tuple[int, int, Tensor, Tensor, Tensor]]


def soft_iou(track: Track, start: int, end: int, small: Tensor) -> float:
    """Mean over the track's windows that share frames with ``start`` to ``end``; 0 without one."""
    found = []
    for first, last, _, _, theirs in track.windows:
        low, high = max(first, start), min(last, end)
        if low < high:
            a, b = small[low - start : high - start].sigmoid(), theirs[low - first : high - first].sigmoid()
            found.append(float((a * b).sum() / ((a + b - a * b).sum() + 1e-6)))
    return sum(found) / max(len(found), 1)


def joined(model: Any, sample: ClipSample, stride: int) -> tuple[list[Track], int]:
    """IFC's way: windows in order, each track continued by the tracklet of the best total of soft IoUs."""
    queries, features = detected(model, sample)
    total, tracks, start, count = len(queries), [], 0, 0
    while True:
        last = start + LENGTH >= total
        start = max(0, total - LENGTH) if last else start
        end = min(start + LENGTH, total)
        probabilities, embeds = associated(model, queries[start:end])
        best = probabilities[:, :-1].amax(dim=1)
        order = best.argsort(descending=True).tolist()
        keep = [
            q
            for rank, q in enumerate(order)
            if (probabilities[q].argmax() != CLASSES or rank < 4) and best[q] >= 0.01 or total <= LENGTH
        ]
        logits = torch.einsum("qc,tchw->qthw", embeds[keep], features[start:end])
        size = [side // 2 for side in logits.shape[-2:]]
        small = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        table = np.array([[soft_iou(track, start, end, own) for track in tracks] for own in small]).reshape(
            len(keep), -1
        )
        table[table <= 0.6] = 0
        chosen = {r: c for r, c in zip(*linear_sum_assignment(-table), strict=True) if table[r, c] > 0}
        for row, q in enumerate(keep):
            window = (start, end, probabilities[q], logits[row], small[row])
            if row in chosen:
                tracks[chosen[row]].windows.append(window)
            else:
                tracks.append(Track([window]))
        count += 1
        if last:
            return tracks, count
        start += stride


@pytest.mark.parametrize(
    ("frames", "stride", "windows"),
    [(7, 3, 1), (8, 3, 1), (9, 3, 2), (9, 8, 2), (21, 8, 3), (13, 1, 6), (26, 3, 7), (101, 5, 20)],
)
@torch.no_grad()
def test_windows(tiny_model: Build, frames: int, stride: int, windows: int) -> None:
    """Shorter than a window, as long, one frame longer; no overlap, the largest, and the one between."""
    model = build(tiny_model, {"MODEL.VITA.TEST.CLIP_MODE": True, "MODEL.VITA.TEST.CLIP_STRIDE": stride})
    sample = moving(frames, (45, 70))
    tracks, count = joined(model, sample, stride)
    assert count == windows
    found = model([sample])[0]
    probabilities = torch.stack([torch.stack([w[2] for w in track.windows]).mean(dim=0) for track in tracks])
    assert windows == 1 or max(len(track.windows) for track in tracks) > 1, "nothing is joined"
    assert frames < 20 or any(len(track.windows) < windows for track in tracks), "nothing is told apart"
    shape = tracks[0].windows[0][3].shape[-2:]
    logits = torch.full((len(tracks), frames, *shape), -1.0)
    for row, track in enumerate(tracks):
        for t in range(frames):
            there = [w[3][t - w[0]] for w in track.windows if w[0] <= t < w[1]]
            if there:
                logits[row, t] = torch.stack(there).mean(dim=0)
    assert_is(found, finished(model, probabilities[:, :-1], logits, sample))


def test_windows_that_share_no_frame_are_warned_of(tiny_model: Build, caplog: pytest.LogCaptureFixture) -> None:
    clip = {"MODEL.VITA.TEST.CLIP_MODE": True, "MODEL.VITA.TEST.CLIP_STRIDE": LENGTH}
    for changes in ({}, {"MODEL.VITA.TEST.CLIP_STRIDE": LENGTH - 1}, {"MODEL.VITA.TEST.REID_THR": 0.5}):
        caplog.clear()
        build(tiny_model, {**clip, **changes})
        assert ("share no frame" in caplog.text) is (not changes)
