"""MinVIS as a whole: windows, sessions, results, losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances
from pycocotools import mask as coco_mask
from torch import Tensor

from vis.modeling.heads.build import Heads
from vis.modeling.inference.scored import ScoredTracks
from vis.modeling.inference.session import ContinuedTracks, windows
from vis.modeling.meta_arch.minvis import MinVIS
from vis.modeling.segmenter import FrameNormalizer
from vis.modeling.trackers import QueryMatchingTracker
from vis.modeling.transformer_decoders import masked
from vis.modeling.transformer_decoders.masked import predict_masks
from vis.structures import ClipSample, VideoPrediction

FRAMES, HEIGHT, WIDTH = 5, 40, 72
ORIGINAL = (57, 101)
CLASSES, QUERIES = 6, 9


def video(seed: int, length: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> list[Tensor]:
    """Coloured boxes that move before noise."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 255, (3, height // 8, width // 8), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    frames = np.stack([background] * length)
    for box in range(3):
        colour = rng.integers(0, 255, (3, 1, 1))
        for t in range(length):
            top, left = 3 + 9 * box + t, 5 + 15 * box + 4 * t
            frames[t, :, top : top + 12, left : left + 17] = colour
    return [torch.from_numpy(frame) for frame in frames]


def clip(frames: list[Tensor], original: tuple[int, int] = ORIGINAL, video_id: int = 3) -> ClipSample:
    return ClipSample(image=frames, height=original[0], width=original[1], video_id=video_id, length=len(frames))


def labelled(frames: list[Tensor], present: list[list[bool]]) -> ClipSample:
    """``present[t][n]``: whether instance n is in frame t."""
    sample = clip(frames)
    height, width = frames[0].shape[-2:]
    sample["instances"] = []
    for here in present:
        masks = torch.zeros(len(here), height, width, dtype=torch.bool)
        for n, visible in enumerate(here):
            masks[n, 4 + 7 * n : 20 + 7 * n, 6 + 11 * n : 30 + 11 * n] = visible
        instances = Instances((height, width), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.arange(len(here)) % CLASSES
        instances.gt_ids = torch.tensor([n if visible else -1 for n, visible in enumerate(here)], dtype=torch.int64)
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        sample["instances"].append(instances)
    return sample


def assert_same(found: VideoPrediction, expected: VideoPrediction) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.track_ids.tolist() == expected.track_ids.tolist()
    assert (found.height, found.width, found.length) == (expected.height, expected.width, expected.length)
    for ours, theirs in zip(found.masks, expected.masks, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert pixels_apart(a, b) <= 2  # a logit within rounding of zero may fall on either side


@torch.no_grad()
def firm_video(model: MinVIS, seed: int) -> list[Tensor]:
    """A video in which no attention hangs on rounding, which differs with the number of frames that run together.

    A mask logit within rounding of zero opens or closes a whole cell to a query, and that shows in the third digit.
    """
    for attempt in range(20):
        frames, nearest = video(seed + 100 * attempt), []
        with pytest.MonkeyPatch.context() as patch:
            look = masked.attention_mask

            def spy(embeds: Tensor, features: Tensor, look: Any = look, nearest: list = nearest) -> Tensor:
                nearest.append(float((embeds @ features).abs().min()))
                return look(embeds, features)

            patch.setattr(masked, "attention_mask", spy)
            model.sem_seg_head(model.backbone(model.normalizer(frames)))
        assert nearest
        if min(nearest) > 1e-5:
            return frames
    raise AssertionError("every video has a logit next to zero")


def decoded(rle: Any) -> np.ndarray:
    return np.zeros(ORIGINAL, np.uint8) if rle is None else coco_mask.decode(rle)


def pixels_apart(a: Any, b: Any) -> int:
    return int((decoded(a) != decoded(b)).sum())


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., MinVIS]) -> Iterator[MinVIS]:
    model = tiny_model({"MODEL.MASK_FORMER.TEST.WINDOW_SIZE": FRAMES})
    yield model
    assert not model.training


@torch.no_grad()
def naive(model: MinVIS, frames: list[Tensor], original: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything at once and dense: scores, labels, queries (best first), masks (N, T, height, width)."""
    height, width = frames[0].shape[-2:]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    padded = (-(-height // 32) * 32, -(-width // 32) * 32)
    images = torch.zeros(len(frames), 3, *padded)
    for image, frame in zip(images, frames, strict=True):
        image[:, :height, :width] = (frame.float() - mean) / std
    tracked, _ = model.tracker(model.sem_seg_head(model.backbone(images)), None)
    masks = torch.einsum("tqc,tchw->qthw", tracked["mask_embeds"], tracked["mask_features"])
    masks = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)
    probabilities = tracked["pred_logits"].mean(0).softmax(-1)[:, :-1]
    order = probabilities.flatten().argsort(descending=True)
    queries, labels = order // CLASSES, order % CLASSES
    return probabilities.flatten()[order], labels, queries, masks


def test_results_equal_the_naive_ones(model: MinVIS) -> None:
    frames = video(1)
    (found,) = model([clip(frames)])
    scores, labels, queries, logits = naive(model, frames, ORIGINAL)
    assert len(found) == model.max_num == 10
    assert (found.height, found.width, found.length, found.video_id) == (*ORIGINAL, FRAMES, 3)
    torch.testing.assert_close(found.scores, scores[:10], rtol=1e-4, atol=1e-6)
    assert found.labels.tolist() == labels[:10].tolist()
    assert found.track_ids.tolist() == queries[:10].tolist()
    filled = empty = 0
    for row, query in enumerate(found.track_ids.tolist()):
        assert len(found.masks[row]) == FRAMES
        for t, rle in enumerate(found.masks[row]):
            wanted = (logits[query, t] > 0).numpy()
            assert rle is None or rle["size"] == list(ORIGINAL)
            assert (rle is None) == (not wanted.any())
            assert int((decoded(rle) != wanted).sum()) <= 2
            filled, empty = filled + (rle is not None), empty + (rle is None)
    assert filled >= 10, "this model says too little for the test"


@pytest.mark.parametrize("size", [1, 3])
def test_windows_do_not_change_the_result(model: MinVIS, tiny_model: Callable[..., MinVIS], size: int) -> None:
    other = tiny_model({"MODEL.MASK_FORMER.TEST.WINDOW_SIZE": size})
    assert other.window_size == size
    frames = firm_video(model, 2)
    assert_same(other([clip(frames)])[0], model([clip(frames)])[0])


def test_pushes_do_not_change_the_result(model: MinVIS) -> None:
    frames = firm_video(model, 2)
    session = model.open_video(*ORIGINAL)
    for pushed in (frames[:1], [], frames[1:4], frames[4:]):
        session.push(pushed)
    found = session.close()
    assert found.video_id is None
    assert_same(found, model([clip(frames)])[0])


def test_videos_of_different_sizes(model: MinVIS) -> None:
    first, second = clip(video(1), video_id=8), clip(video(4, 2, 56, 30), (61, 33), 9)
    found = model([first, second])
    assert [(x.video_id, x.length, x.height, x.width) for x in found] == [(8, 5, *ORIGINAL), (9, 2, 61, 33)]
    assert_same(found[0], model([first])[0])
    assert {tuple(rle["size"]) for track in found[1].masks for rle in track if rle} == {(61, 33)}


def order_of(image: Tensor) -> Tensor:
    """An order of the queries that depends on what is in the frame."""
    seed = round(float(image.double().sum()) * 10) % 2**31
    return torch.randperm(QUERIES, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def shuffled(model: MinVIS, monkeypatch: pytest.MonkeyPatch) -> MinVIS:
    """The model with its queries in another order in every frame."""
    segment = model.segment

    def in_another_order(images: Tensor) -> Any:
        out, orders = segment(images), torch.stack([order_of(image) for image in images])
        for name in ("pred_logits", "pred_embeds", "mask_embeds"):
            out[name] = torch.stack([x[order] for x, order in zip(out[name], orders, strict=True)])
        return out

    monkeypatch.setattr(model, "segment", in_another_order)
    return model


def with_track_ids(found: VideoPrediction, ids: Tensor) -> VideoPrediction:
    return replace(found, track_ids=ids[found.track_ids])


@pytest.mark.parametrize("size", [1, 2, 3, FRAMES])
def test_tracks_follow_queries_that_change_places(
    model: MinVIS, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, size: int
) -> None:
    """Within a window and from one to the next: only the first frame decides how tracks are numbered."""
    frames = firm_video(model, 2)
    (expected,) = model([clip(frames)])
    shuffled = request.getfixturevalue("shuffled")
    monkeypatch.setattr(shuffled, "window_size", size)
    orders = [order_of(image) for image in shuffled.normalizer(frames)]
    assert len({tuple(order.tolist()) for order in orders}) == FRAMES
    assert_same(with_track_ids(shuffled([clip(frames)])[0], orders[0]), expected)


def test_open_sessions_do_not_mix(shuffled: MinVIS) -> None:
    videos = [firm_video(shuffled, 1), firm_video(shuffled, 5)]
    sessions = [shuffled.open_video(*ORIGINAL, video_id=i) for i in range(2)]
    for t in range(FRAMES):
        for session, frames in zip(sessions, videos, strict=True):
            session.push([frames[t]])
    for i in (1, 0):
        assert_same(sessions[i].close(), shuffled([clip(videos[i])])[0])


def test_parts_of_a_video_have_the_tracks_of_the_whole(shuffled: MinVIS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query and class is reported, so that the masks of each track in each frame can be compared."""
    monkeypatch.setattr(shuffled, "max_num", QUERIES * CLASSES)
    frames = firm_video(shuffled, 2)
    (whole,) = shuffled([clip(frames)])
    session = shuffled.open_video(*ORIGINAL)
    session.push(frames[:2])
    first = session.cut()
    session.push(frames[2:])
    second = session.close()
    assert (first.length, second.length) == (2, FRAMES - 2)
    expected = dict(zip(whole.track_ids.tolist(), whole.masks, strict=True))
    parts = [dict(zip(part.track_ids.tolist(), part.masks, strict=True)) for part in (first, second)]
    assert {track: [*parts[0][track], *parts[1][track]] for track in range(QUERIES)} == expected
    assert_same(first, shuffled([clip(frames[:2])])[0])


def test_scores_of_a_part_are_of_its_frames() -> None:
    """What heads said of the frames before a cut counts there alone."""
    said = iter([0.2, 0.6])

    class Saying(Heads):
        def score_factors(self, outputs: Any) -> Tensor:
            return torch.full((len(outputs["pred_logits"]), QUERIES), next(said))

    def segment(images: Tensor) -> Any:
        of = {"pred_logits": CLASSES + 1, "pred_embeds": 8, "mask_embeds": 4}
        sizes = {name: torch.zeros(len(images), QUERIES, size) for name, size in of.items()}
        return {**sizes, "mask_features": torch.zeros(len(images), 4, 3, 5)}

    tracks = ScoredTracks(segment, QueryMatchingTracker(), Saying([]))
    assert isinstance(tracks, ContinuedTracks)
    found = []
    for length in (2, 3):
        tracks.take(torch.zeros(length, 3, 12, 20))
        found.append(float(tracks.probabilities().max()) * (CLASSES + 1))
        tracks = tracks.continued()
    assert found == pytest.approx([0.2, 0.6])


def test_lazy_frames_are_read_once_in_order(model: MinVIS) -> None:
    frames, read = video(2), []

    class Lazy:
        def __len__(self) -> int:
            return len(frames)

        def __iter__(self) -> Iterator[Tensor]:
            for t, frame in enumerate(frames):
                read.append(t)
                yield frame

    (found,) = model([{**clip([]), "image": Lazy()}])
    assert read == list(range(FRAMES))
    assert_same(found, model([clip(frames)])[0])


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (0, 3, []), (2, 9, [2]), (3, 1, [1, 1, 1])]
)
def test_windows(count: int, size: int, expected: list[int]) -> None:
    frames = [torch.tensor(i) for i in range(count)]
    found = list(windows(frames, size))
    assert [len(window) for window in found] == expected
    assert [int(frame) for window in found for frame in window] == list(range(count))


def test_wrong_use_of_a_session(model: MinVIS) -> None:
    session = model.open_video(*ORIGINAL)
    with pytest.raises(ValueError, match="no frame"):
        session.close()
    frames = video(1)
    session.push(frames[:2])
    with pytest.raises(ValueError, match=r"a frame is \(40, 71\), the first of the video was \(40, 72\)"):
        session.push([frames[2], frames[3][..., :-1]])
    assert session.close().length == 2  # the push that failed took nothing
    with pytest.raises(ValueError, match="open another with open_video"):
        session.close()
    with pytest.raises(ValueError, match="open another with open_video"):
        session.push(frames[:1])


@pytest.mark.parametrize("size", [0, -2])
def test_window_size_is_checked(tiny_model: Callable[..., MinVIS], size: int) -> None:
    with pytest.raises(ValueError, match=f"WINDOW_SIZE is {size}"):
        tiny_model({"MODEL.MASK_FORMER.TEST.WINDOW_SIZE": size})


@pytest.mark.parametrize(("max_num", "expected"), [(3, 3), (1000, QUERIES * CLASSES)])
def test_max_num(tiny_model: Callable[..., MinVIS], max_num: int, expected: int) -> None:
    other = tiny_model({"MODEL.MASK_FORMER.TEST.MAX_NUM": max_num})
    (found,) = other([clip(video(1, 2))])
    assert len(found) == len(found.masks) == expected
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    if max_num > QUERIES * CLASSES:  # every query comes with every class, and with the same masks
        assert {(q, k) for q, k in zip(found.track_ids.tolist(), found.labels.tolist(), strict=True)} == {
            (q, k) for q in range(QUERIES) for k in range(CLASSES)
        }
        rows = (found.track_ids == found.track_ids[0]).nonzero()[:, 0].tolist()
        assert all(found.masks[row] == found.masks[0] for row in rows)


def test_mask_score(model: MinVIS, tiny_model: Callable[..., MinVIS]) -> None:
    frames = video(1)
    plain = model([clip(frames)])[0]
    scored = tiny_model({"MODEL.MASK_FORMER.TEST.MASK_SCORE": True})([clip(frames)])[0]
    _, _, _, logits = naive(model, frames, ORIGINAL)
    assert scored.track_ids.tolist() == plain.track_ids.tolist()
    for row, query in enumerate(plain.track_ids.tolist()):
        inside = logits[query][logits[query] > 0]
        factor = float(inside.sigmoid().mean()) if inside.numel() else 0.0
        assert float(scored.scores[row]) == pytest.approx(float(plain.scores[row]) * factor, rel=1e-3, abs=1e-6)


def test_parity_outputs_are_the_tracked_predictions(model: MinVIS) -> None:
    frames = video(2, 3)
    found = model.parity_outputs(clip(frames))
    with torch.no_grad():
        tracked, _ = model.tracker(model.segment(model.normalizer(frames)), None)
    torch.testing.assert_close(found["pred_cls"], tracked["pred_logits"].mean(0))
    masks = predict_masks(tracked["mask_embeds"], tracked["mask_features"]).transpose(0, 1)
    torch.testing.assert_close(found["pred_masks"], masks)
    assert found["backbone.res3"].shape == (3, 128, 8, 12)


PRESENT = {
    "usual": [[True, True], [True, False]],
    "an empty frame": [[True, True], [False, False]],
    "absent everywhere": [[False], [False]],
    "no slot": [[], []],
}


@pytest.mark.parametrize("case", PRESENT)
def test_losses_reach_every_parameter(tiny_model: Callable[..., MinVIS], case: str) -> None:
    model = tiny_model().train()
    losses = model([labelled(video(1, 2), PRESENT[case]), labelled(video(2, 2), [[], []])])
    layers = 3
    ends = ["", *(f"_{i}" for i in range(layers))]
    assert sorted(losses) == sorted(f"loss_{name}{end}" for name in ("ce", "mask", "dice") for end in ends)
    assert all(torch.isfinite(loss) for loss in losses.values())
    if not any(any(frame) for frame in PRESENT[case]):
        assert all(float(loss.detach()) == 0 for name, loss in losses.items() if "ce" not in name)
    sum(losses.values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_absent_instances_are_no_targets(tiny_model: Callable[..., MinVIS]) -> None:
    """A frame with a slot that is absent is trained as a frame without the slot, whatever its mask holds."""
    model = tiny_model().train()
    losses = []
    for present in ([[True, False]], [[True]]):
        sample = labelled(video(1, 1), present)
        if len(present[0]) == 2:
            sample["instances"][0].gt_masks.tensor[1] = True
        torch.manual_seed(1)
        losses.append(model([sample]))
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name])


def test_targets_are_padded_like_the_frames(tiny_model: Callable[..., MinVIS], monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of two sizes in one batch: masks lie where they lay, and what is added is background."""
    model, found = tiny_model().train(), []
    monkeypatch.setattr(
        model.criterion, "losses_and_matches", lambda outputs, targets: (found.extend(targets) or {}, [])
    )
    samples = [labelled(video(1, 2), [[True, True], [False, True]]), labelled(video(2, 1, 56, 104), [[True]])]
    model(samples)
    assert [(target.labels.tolist(), target.masks.shape) for target in found] == [
        ([0, 1], (2, 64, 128)),
        ([1], (1, 64, 128)),
        ([0], (1, 64, 128)),
    ]
    assert torch.equal(found[1].masks[:, :HEIGHT, :WIDTH], samples[0]["instances"][1].gt_masks.tensor[1:])
    assert int(found[1].masks.sum()) == int(samples[0]["instances"][1].gt_masks.tensor.sum())


@pytest.mark.parametrize("label", [CLASSES, 40, -1])
def test_classes_that_the_head_does_not_have(tiny_model: Callable[..., MinVIS], label: int) -> None:
    sample = labelled(video(1, 1), [[True, True]])
    sample["instances"][0].gt_classes = torch.tensor([2, label])
    with pytest.raises(ValueError, match=f"instances of class {label} .*NUM_CLASSES is 6"):
        tiny_model().train()([sample])
    sample["instances"][0].gt_ids[1] = -1  # absent: nobody looks at its class
    tiny_model().train()([sample])


def test_every_frame_is_an_image_of_its_own(tiny_model: Callable[..., MinVIS]) -> None:
    """A clip of two frames gives the losses of two clips of one frame."""
    model = tiny_model({"MODEL.RESNETS.NORM": "FrozenBN"}).train()
    frames, present = video(1, 2), [[True, True], [True, False]]
    torch.manual_seed(4)
    together = model([labelled(frames, present)])
    torch.manual_seed(4)
    apart = model([labelled(frames[:1], present[:1]), labelled(frames[1:], present[1:])])
    for name, loss in together.items():
        torch.testing.assert_close(loss, apart[name])


def test_inference_mode_before_training(tiny_model: Callable[..., MinVIS]) -> None:
    """What is cached for a size while evaluating must serve training at that size."""
    model = tiny_model()
    frames = video(1, 1, 96, 161)
    with torch.inference_mode():
        model([clip(frames)])
    sum(model.train()([labelled(frames, [[True]])]).values()).backward()


def test_names_in_the_state_dict(model: MinVIS) -> None:
    names = list(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "sem_seg_head", "criterion"}
    assert [name for name in names if name.startswith("criterion")] == ["criterion.empty_weight"]
    assert {name.split(".")[1] for name in names if name.startswith("sem_seg_head")} == {"pixel_decoder", "predictor"}


def test_normalizer() -> None:
    normalizer = FrameNormalizer(pixel_mean=[1.0, 2.0, 3.0], pixel_std=[2.0, 4.0, 8.0], size_divisibility=16)
    frames = [torch.full((3, 17, 30), 5, dtype=torch.uint8), torch.full((3, 20, 9), 7.0)]
    out = normalizer(frames)
    assert out.shape == (2, 3, 32, 32)
    assert out.dtype == torch.float32
    assert out[0, :, 16, 29].tolist() == [2.0, 0.75, 0.25]
    assert out[1, :, 19, 8].tolist() == [3.0, 1.25, 0.5]
    assert float(out[0, :, 17:].abs().sum() + out[0, :, :, 30:].abs().sum() + out[1, :, :, 9:].abs().sum()) == 0
    assert normalizer.state_dict() == {}
    with pytest.raises(ValueError, match="no frames"):
        normalizer([])
    with pytest.raises(ValueError, match=r"must be \(3, H, W\), found \(4, 8, 8\)"):
        normalizer([torch.zeros(4, 8, 8)])
