"""IAI as a whole: losses of clips at once and frame by frame, sessions, ablations, starting from an image model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from vis.checkpoint.stages import stages_of
from vis.config import CfgNode
from vis.engine.config import load_cfg
from vis.engine.parity.common import clip_sample
from vis.layers.effective_batch import EffectiveBatch
from vis.modeling import build_model
from vis.modeling.inference.growing import FrameSizes
from vis.modeling.meta_arch.iai import IAI
from vis.modeling.trackers.identified_frames import VideoState
from vis.structures import ClipSample, VideoPrediction

FRAMES, HEIGHT, WIDTH = 5, 40, 72
CLASSES, NUM_IDS = 3, 6
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
    "MODEL.CONDINST.DIM": 64,
    "MODEL.CONDINST.NUM_CONVS": 1,
    "MODEL.CONDINST.MASK_DIM": 16,
    "MODEL.CONDINST.MASK_CONVS": 1,
    "MODEL.IAI.NUM_IDS": NUM_IDS,
    "MODEL.IAI.DIM": 32,
    "MODEL.IAI.FFN_DIM": 64,
    "MODEL.IAI.DROP_PATH": 0.0,
    "MODEL.IAI.TEST.VIDEO_SCORE_THR": 0.0,
    "MODEL.DETECTOR.NORM_EVAL": True,
}
MASK_RCNN = {
    "MODEL.DETECTOR.NAME": "MaskRCNN",
    "MODEL.MASK_RCNN.CHANNELS": 32,
    "MODEL.MASK_RCNN.ID_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.IAI.ID_LOSS": "ce",
}


@pytest.fixture(scope="module")
def iai_cfg(project_root: Path) -> Callable[..., CfgNode]:
    def load(changes: dict[str, Any] | None = None) -> CfgNode:
        values = {**SMALL, **(changes or {})}
        opts = [part for pair in values.items() for part in pair]
        return load_cfg(str(project_root / "configs/_base_/models/iai_tiny.yaml"), opts)

    return load


@pytest.fixture
def build(iai_cfg: Callable[..., CfgNode]) -> Callable[..., IAI]:
    def make(changes: dict[str, Any] | None = None) -> IAI:
        torch.manual_seed(0)
        return spread(build_model(iai_cfg(changes)))

    return make


def spread(model: Any) -> Any:
    """Weights under which scores lie about the thresholds and differ from place to place."""
    torch.manual_seed(1)
    head = getattr(getattr(model.image_model, "proposal_generator", None), "fcos_head", None)
    if head is None:
        return model
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name in ("cls_logits.bias", "id_logits.bias"):
                parameter.fill_(-1.0)
        for parameter in (model.association or head).parameters():
            if parameter.dim() == 4:
                parameter.mul_(3.0)
    return model


def pictures(seed: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Blocks of colour, some of which change from frame to frame: (T, 3, H, W) uint8."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(rng.integers(0, 255, (1, 3, height // 8, width // 8)), frames, axis=0)
    blocks[:, :, :, ::3] = rng.integers(0, 255, blocks[:, :, :, ::3].shape)
    return blocks.repeat(8, axis=2).repeat(8, axis=3).astype(np.uint8)


def clip(seed: int, height: int = HEIGHT, width: int = WIDTH) -> ClipSample:
    """Three boxes that move; the second is absent in frame 1, the third comes in frame 2."""
    sample = clip_sample(pictures(seed, height=height, width=width))
    sample["instances"] = []
    for t in range(FRAMES):
        masks = torch.zeros(3, height, width, dtype=torch.bool)
        masks[0, 4:24, 2 + 3 * t : 22 + 3 * t] = True
        masks[1, 12:36, 30 : 50 - t] = t != 1
        masks[2, 2 : 2 + 6 * t, 44:64] = t >= 2
        ids = torch.where(masks.flatten(1).any(dim=1), torch.tensor([4, 17, 9]), -1)
        of_frame = BitMasks(masks)
        sample["instances"].append(
            Instances(
                (height, width),
                gt_classes=torch.tensor([2, 0, 1]),
                gt_ids=ids,
                gt_masks=of_frame,
                gt_boxes=of_frame.get_bounding_boxes(),
            )
        )
    return sample


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses_and_gradients(model: IAI, samples: list[ClipSample]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model.zero_grad()
    torch.manual_seed(7)
    losses = model(samples)
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"MODEL.IAI.NUM_LAYERS": 2}, marks=pytest.mark.slow),
        pytest.param({"MODEL.IAI.RELEASED.TRAIN_MEMORY": True}, marks=pytest.mark.slow),
        pytest.param({"MODEL.IAI.LOCAL": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("double")  # group norms of maps with a few pixels magnify rounding
def test_clips_at_once_equal_frame_by_frame(build: Callable[..., IAI], changes: dict[str, Any]) -> None:
    samples = [clip(0), clip(1, 24 + 16, 64)]  # of two sizes: padded to one
    results = [
        losses_and_gradients(build({**changes, "MODEL.IAI.SEQUENTIAL": each}), samples) for each in (False, True)
    ]
    (ours, our_gradients), (theirs, their_gradients) = results
    assert set(ours) == {"loss_cls", "loss_bbox", "loss_centerness", "loss_mask", "loss_id"}
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-7, atol=1e-9)
    assert set(our_gradients) == set(their_gradients)
    assert any("association.id_bank" in name for name in our_gradients)
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-8 * largest)


def test_frames_one_by_one_are_counted_like_clips_at_once(build: Callable[..., IAI]) -> None:
    """A batch that is spread over steps is counted first: each time step by itself."""
    counts = []
    for sequential in (True, False):
        model = build({"MODEL.IAI.SEQUENTIAL": sequential}).train()
        batch = EffectiveBatch(steps=2)
        with torch.no_grad(), batch.counting() as found:
            model([clip(0), clip(1)])
        counts.append({name: torch.atleast_1d(count) for name, count in found.items()})
    of_frames, at_once = counts
    assert set(at_once) == {"fcos.positives.0", "fcos.centerness.0"}
    for name, count in at_once.items():
        assert len(count) == FRAMES
        kind = name.removesuffix(".0")
        one_by_one = torch.cat([of_frames[f"{kind}.{t}"] for t in range(FRAMES)])
        torch.testing.assert_close(one_by_one, count)


def test_drawn_identities_repeat_with_the_iteration(build: Callable[..., IAI]) -> None:
    model = build()
    values = []
    model.train().image_model.eval()
    with torch.no_grad():
        for iteration in (3, 4, 3):
            model.set_iteration(iteration)
            values.append([float(model([clip(0)])["loss_id"]) for _ in range(2)])
    assert values[0] == values[2]
    assert len({value for pair in values for value in pair}) > 2
    fixed = build({"MODEL.IAI.ID_SHUFFLE": False})
    weighted = build({"MODEL.IAI.ID_SHUFFLE": False, "MODEL.IAI.ID_WEIGHT": 3.0})
    found = []
    for each in (fixed, fixed, weighted):
        each.train().image_model.eval()
        with torch.no_grad():
            found.append(float(each([clip(0)])["loss_id"]))
    assert found == [found[0], found[0], pytest.approx(3 * found[0], rel=1e-4)]


def test_clips_of_one_batch_have_one_length(build: Callable[..., IAI]) -> None:
    other = clip(1)
    other["image"], other["instances"] = other["image"][:3], other["instances"][:3]
    with pytest.raises(ValueError, match="SAMPLING_FRAME_NUM"):
        build().train()([clip(0), other])


def test_clips_without_objects_have_losses(build: Callable[..., IAI]) -> None:
    sample = clip(0)
    for frame in sample["instances"]:
        frame.gt_ids[:] = -1
    losses, gradients = losses_and_gradients(build(), [sample])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def video(seed: int, frames: int = FRAMES, size: tuple[int, int] = (57, 101)) -> ClipSample:
    sample = clip_sample(pictures(seed, frames))
    sample["height"], sample["width"] = size
    return sample


def assert_same(found: VideoPrediction, expected: VideoPrediction) -> None:
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.track_ids.tolist() == expected.track_ids.tolist()
    assert found.masks == expected.masks


@pytest.fixture
def model(build: Callable[..., IAI]) -> IAI:
    return build().eval()


def test_results_have_tracks_over_time(model: IAI) -> None:
    found = model([video(0)])[0]
    assert 5 < len(found) <= model.rules.max_num
    assert found.length == FRAMES
    assert all(len(track) == FRAMES for track in found.masks)
    assert all(rle is None or rle["size"] == [57, 101] for track in found.masks for rle in track)
    assert any(sum(rle is not None for rle in track) > 1 for track in found.masks)
    assert 0 <= int(found.track_ids.min()) <= int(found.track_ids.max()) < NUM_IDS - 1


def test_windows_and_interleaved_videos_change_nothing(model: IAI) -> None:
    samples = [video(0), video(1, size=(44, 80))]
    whole = model(samples)
    sessions = [model.open_video(sample["height"], sample["width"], video_id=0) for sample in samples]
    for frames in zip(*(sample["image"] for sample in samples), strict=True):
        for session, frame in zip(sessions, frames, strict=True):
            session.push([frame])
    for session, expected in zip(sessions, whole, strict=True):
        assert_same(session.close(), expected)
    model.window_size = 2
    assert_same(model(samples[:1])[0], whole[0])


def test_tracks_go_on_after_a_cut(model: IAI) -> None:
    sample, frames = video(2), list(video(2)["image"])
    model.rules = replace(model.rules, max_num=0)
    whole = model([sample])[0]
    session = model.open_video(sample["height"], sample["width"])
    session.push(frames[:2])
    parts = [session.cut()]
    session.push(frames[2:])
    parts.append(session.close())
    masks = {
        (int(track), t): rle
        for track, of_track in zip(whole.track_ids, whole.masks, strict=True)
        for t, rle in enumerate(of_track)
    }
    for part, start in zip(parts, (0, 2), strict=True):
        for track, of_track in zip(part.track_ids, part.masks, strict=True):
            for t, rle in enumerate(of_track):
                assert rle == masks[int(track), start + t]


def test_short_and_empty_videos(model: IAI) -> None:
    assert len(model([video(0, frames=1)])[0].masks[0]) == 1
    full = list(model([video(3)])[0].masks)
    assert full
    model.image_model.class_threshold = 1.0
    nobody = model([video(3)])[0]
    assert (len(nobody), nobody.length) == (0, FRAMES)
    # nobody in the first frame, then somebody
    model.image_model.class_threshold = 0.1
    images = model.normalizer(list(video(3)["image"]))
    sizes = FrameSizes((int(images.shape[2]), int(images.shape[3])), (HEIGHT, WIDTH), (57, 101))
    state = VideoState()
    with torch.no_grad():
        for t, threshold in enumerate((1.0, 0.1, 0.1)):
            model.image_model.class_threshold = threshold
            result, state = model.step(model.image_model.bottom_up(images[t, None]), sizes, state)
            if t == 0:
                assert not len(result.found)
                assert (result.labels == NUM_IDS).all()
            if t == 1:
                assert result.identified.ids == list(range(len(result.kept)))
                assert result.identified.columns is not None


def test_memory_does_not_grow_with_the_video(build: Callable[..., IAI]) -> None:
    model = build({"MODEL.IAI.MAX_GLOBAL_FRAMES": 3}).eval()
    session = model.open_video(HEIGHT, WIDTH)
    sizes = set()
    for frame in video(0, frames=14)["image"]:
        session.push([frame])
        sizes.add(len(session._state.memory.stored))
    assert max(sizes) == 3


@pytest.mark.parametrize(
    ("changes", "losses"),
    [
        ({"MODEL.IAI.ID_HEAD": False, "MODEL.IAI.ASSOCIATION": False}, 4),
        ({"MODEL.IAI.ID_HEAD": False}, 4),
        ({"MODEL.IAI.ASSOCIATION": False}, 5),
        ({"MODEL.IAI.CLS_PROJECTOR": False}, 5),
        ({"MODEL.IAI.ID_LOSS": "ce", "MODEL.IAI.ID_CONVS": 2}, 5),
    ],
    ids=str,
)
def test_ablations(build: Callable[..., IAI], changes: dict[str, Any], losses: int) -> None:
    model = build(changes)
    found, gradients = losses_and_gradients(model, [clip(0)])
    assert len(found) == losses
    assert any(name.startswith("association.") for name in gradients) == changes.get("MODEL.IAI.ASSOCIATION", True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(gradients)
    prediction = model.eval()([video(0)])[0]
    assert len(prediction)


def test_mask_rcnn_as_image_model(build: Callable[..., IAI]) -> None:
    model = build(MASK_RCNN)
    found, gradients = losses_and_gradients(model, [clip(0)])
    assert set(found) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "loss_id"}
    assert any("id_head" in name for name in gradients)
    model.image_model.class_threshold = model.image_model.id_threshold = 0.0
    prediction = model.eval()([video(0, frames=3)])[0]
    assert prediction.length == 3


def test_options_that_cannot_be(build: Callable[..., IAI]) -> None:
    with pytest.raises(ValueError, match=r"ID_LOSS is 'focal'; with detector MaskRCNN"):
        build({**MASK_RCNN, "MODEL.IAI.ID_LOSS": "focal"})
    with pytest.raises(ValueError, match=r"MIN_VISIBLE is 1\.5"):
        build({"MODEL.IAI.TEST.MIN_VISIBLE": 1.5})


def test_starting_from_an_image_model_keeps_its_pyramid(build: Callable[..., IAI]) -> None:
    model = build().eval()
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith("association.") and "id_" not in name
    }
    features = {f"res{i}": torch.randn(1, c, 64 >> i, 96 >> i) for i, c in ((2, 64), (3, 128), (4, 256), (5, 512))}
    before = model.image_model.top_down(features)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        replaced, _ = model.association.read(features["res5"], VideoState().memory)
        after = model.image_model.top_down({**features, "res5": replaced})
        for name, level in before.items():
            torch.testing.assert_close(after[name], level, rtol=1e-4, atol=1e-5)
    complete = {
        name: torch.randn_like(value) if value.dim() == 4 else value for name, value in model.state_dict().items()
    }
    model.load_state_dict(complete)
    assert torch.equal(
        model.image_model.backbone.fpn_lateral5.weight, complete["image_model.backbone.fpn_lateral5.weight"]
    )
    cold = build({"MODEL.IAI.WARM_START": False})
    cold.load_state_dict(state, strict=False)
    assert torch.equal(cold.image_model.backbone.fpn_lateral5.weight, state["image_model.backbone.fpn_lateral5.weight"])


def test_what_trainings_start_from(build: Callable[..., IAI]) -> None:
    model = build()
    stages = stages_of(model)
    assert stages is not None
    ours = [name for name in model.state_dict() if name.startswith("association.") or ".id_" in name]
    assert ours
    assert all(name.startswith(stages["condinst"]) for name in ours)
    mask_rcnn = [name for name in build(MASK_RCNN).state_dict() if name.startswith("association.") or ".id_" in name]
    assert all(name.startswith(stages["mask_rcnn"]) for name in mask_rcnn)


def test_model_can_be_copied(model: IAI) -> None:
    other = copy.deepcopy(model)
    assert other.identifier.image_model is other.image_model
    assert_same(other([video(0)])[0], model([video(0)])[0])
