"""CondInst, with the id branch of IAI, against arrays recorded from the released IAI with weights computed from names.

The association that makes C5' is not built here: one part of C5' is recorded whole, the others are projections of C5.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from vis.engine.config import load_cfg
from vis.engine.parity import read_manifest
from vis.engine.parity.weights import formula_weight
from vis.layers.dynamic_conv import aligned_bilinear
from vis.modeling.detectors import Detector, build_detector
from vis.modeling.heads.condinst import dynamic_logits
from vis.modeling.heads.fcos import grid_locations
from vis.modeling.segmenter import FrameNormalizer

pytestmark = pytest.mark.parity

NAMES = (
    (r"^backbone\.conv1", "backbone.bottom_up.stem.conv1"),
    (r"^backbone\.bn1", "backbone.bottom_up.stem.conv1.norm"),
    (r"^backbone\.layer1\.", "backbone.bottom_up.res2."),
    (r"^backbone\.layer2\.", "backbone.bottom_up.res3."),
    (r"^backbone\.layer3\.", "backbone.bottom_up.res4."),
    (r"^backbone\.layer4\.", "backbone.bottom_up.res5."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^neck\.lateral_convs\.0\.conv", "backbone.fpn_lateral3"),
    (r"^neck\.lateral_convs\.1\.conv", "backbone.fpn_lateral4"),
    (r"^neck\.lateral_convs\.2\.conv", "backbone.fpn_lateral5"),
    (r"^neck\.fpn_convs\.0\.conv", "backbone.fpn_output3"),
    (r"^neck\.fpn_convs\.1\.conv", "backbone.fpn_output4"),
    (r"^neck\.fpn_convs\.2\.conv", "backbone.fpn_output5"),
    (r"^neck\.fpn_convs\.3\.conv", "backbone.top_block.p6"),
    (r"^neck\.fpn_convs\.4\.conv", "backbone.top_block.p7"),
    (r"^bbox_head\.mask_refine", "mask_branch.refine"),
    (r"^bbox_head\.mask_head", "mask_branch.tower"),
    (r"^bbox_head\.", "proposal_generator.fcos_head."),
    (r"reg_convs\.", "bbox_convs."),
    (r"conv_cls", "cls_logits"),
    (r"conv_reg", "bbox_pred"),
    (r"conv_centerness", "ctrness"),
    (r"conv_id", "id_logits"),
)


def our_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)

    def tower(match: re.Match[str]) -> str:
        return f"{match[1]}_tower.{3 * int(match[2]) + (match[3] == 'gn')}"

    return re.sub(r"(cls|bbox|id)_convs\.(\d)\.(conv|gn)", tower, name)


@pytest.fixture(scope="module")
def manifest(shared_dir: Path) -> dict[str, Any]:
    return read_manifest(shared_dir / "parity/iai_r50.manifest.json.gz")


@pytest.fixture(scope="module")
def recorded(shared_dir: Path) -> dict[str, np.ndarray]:
    with np.load(shared_dir / "parity/iai_r50.npz") as file:
        return dict(file)


def weight(manifest: dict[str, Any], name: str) -> Tensor:
    return torch.from_numpy(formula_weight(name, manifest[name]["shape"], *manifest[name]["fill"]))


@pytest.fixture(scope="module")
def detector(project_root: Path, manifest: dict[str, Any]) -> Detector:
    changes = {
        **{
            "MODEL.DEVICE": "cpu",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "40",
            "DATASETS.TRAIN": "()",
            "DATASETS.TEST": "()",
        },
        **{f"MODEL.DETECTOR.{key}": value for key, value in (("CLS_THR", "0.1"), ("NMS", "0.5"), ("NMS_PRE", "200"))},
        "MODEL.DETECTOR.TOPK": "10",
    }
    opts = [part for pair in changes.items() for part in pair]
    model = build_detector(load_cfg(str(project_root / "configs/coco/condinst_r50.yaml"), opts), num_ids=20)
    state = model.state_dict()
    ours = {our_name(name): name for name in manifest if not re.match(r"encoder_|backbone_proj|lstt", name)}
    assert set(state) == set(ours)
    with torch.no_grad():
        for name, tensor in state.items():
            if manifest[ours[name]]["fill"] is not None:
                tensor.copy_(weight(manifest, ours[name]).view_as(tensor))
    return model.eval()


def close(recorded: dict[str, np.ndarray], name: str, found: Tensor, tolerance: float = 1e-4) -> None:
    wanted, array = recorded[name], found.detach().numpy()
    if f"{name}.shape" in recorded:
        assert list(recorded[f"{name}.shape"]) == list(array.shape), name
        array = array.reshape(-1)[:: int(recorded[f"{name}.stride"])]
    assert array.shape == wanted.shape, name
    error = np.abs(array - wanted).max() / np.abs(wanted).max()
    assert error < tolerance, f"{name}: {error}"


@pytest.fixture(scope="module")
def maps(detector: Detector, recorded: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Of the six frames: res3..res5."""
    normalizer = FrameNormalizer(
        pixel_mean=[123.68, 116.779, 103.939], pixel_std=[58.393, 57.12, 57.375], size_divisibility=32
    )
    with torch.no_grad():
        return detector.bottom_up(normalizer(list(torch.from_numpy(recorded["input"]))))


@pytest.fixture(scope="module")
def replaced(maps: dict[str, Tensor], manifest: dict[str, Any]) -> Any:
    """Frame and its recorded association -> maps with C5' in place of C5."""

    def project(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, weight(manifest, f"{name}.weight"), weight(manifest, f"{name}.bias"))

    def replace(frame: int, associated: np.ndarray) -> dict[str, Tensor]:
        of_frame = {name: x[frame : frame + 1] for name, x in maps.items()}
        c5 = of_frame["res5"]
        parts = [project("encoder_projector", c5), torch.from_numpy(associated), project("backbone_projector", c5)]
        return {**of_frame, "res5": torch.cat(parts, dim=1)}

    return replace


@pytest.mark.parametrize("run", ["", "forced."])
@torch.no_grad()
def test_pyramid_head_and_mask_features(
    run: str, detector: Detector, recorded: dict[str, np.ndarray], replaced: Any
) -> None:
    for frame in range(6):
        prefix = f"{run}f{frame}."
        features = replaced(frame, recorded[f"{prefix}hab"])
        close(recorded, f"{prefix}c5p", features["res5"])
        pyramid = detector.top_down(features)
        outputs = detector.head(pyramid)
        for level, name in enumerate(pyramid):
            close(recorded, f"{prefix}fpn.{name}", pyramid[name])
            of_head = (outputs.logits, outputs.ids, outputs.centerness, outputs.boxes, outputs.params)
            for short, found in zip(("cls", "id", "ctr", "box", "ctrl"), of_head, strict=True):
                close(recorded, f"{prefix}{short}.{name}", found[level])
        close(recorded, f"{prefix}maskfeat", detector.mask_features(pyramid))


@torch.no_grad()
def test_detections(detector: Detector, recorded: dict[str, np.ndarray], replaced: Any) -> None:
    """Which detections are kept, in which order, and how large their masks are; frames of the given-mask run."""
    for frame in range(6):
        pyramid = detector.top_down(replaced(frame, recorded[f"forced.f{frame}.hab"]))
        weights = (0.5, 1.0) if frame else (1.0, 0.5)
        found = detector.detect(pyramid, (128, 192), weights=weights)
        count = int(recorded["forced.det.num"][frame])
        assert len(found) == count
        assert found.candidates == recorded["forced.det.candidates"][frame]
        wanted = recorded["forced.det.box"][frame, :count]
        np.testing.assert_allclose(found.boxes.numpy(), wanted[:, :4], atol=0.02)
        np.testing.assert_allclose(found.scores.numpy(), wanted[:, 4], rtol=1e-4)
        np.testing.assert_allclose(found.id_probs.numpy(), recorded["forced.det.id"][frame, :count, :20], atol=1e-4)
        np.testing.assert_allclose(found.class_probs.numpy(), recorded["forced.det.cls"][frame, :count, :40], atol=1e-4)
        areas = (detector.mask_probs(found, pyramid, (128, 192)) > 0.5).sum(dim=(1, 2))
        assert np.abs(areas.numpy() - recorded["forced.det.pad_area"][frame, :count]).max() <= 3


def seeded(name: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    return torch.from_numpy(formula_weight(name, shape, 0.0, std))


@torch.no_grad()
def test_mask_branch_id_branch_and_dynamic_masks(detector: Detector, recorded: dict[str, np.ndarray]) -> None:
    sizes = {"p3": (16, 24), "p4": (8, 12), "p5": (4, 6)}
    levels = [seeded(f"maskbranch.in.{name}", (1, 256, *size)) for name, size in sizes.items()]
    features = detector.mask_branch(levels)
    close(recorded, "maskbranch.out", features[0])
    head = detector.proposal_generator.fcos_head
    hidden = head.id_tower(seeded("idhead.in", (2, 256, 16, 24)))
    close(recorded, "idhead.hidden", hidden)
    close(recorded, "idhead.out", head.id_logits(hidden))
    points, strides = (torch.from_numpy(recorded[f"dyn.{name}"]).float() for name in ("points", "strides"))
    params = seeded("dyn.in.params", (3, 169), 0.5)
    logits = dynamic_logits(features, params, torch.zeros(3, dtype=torch.int64), points, strides)
    close(recorded, "dyn.up2", logits[:, None])
    # the same by the way that many frames take
    other = torch.cat([torch.zeros_like(features), features])
    again = dynamic_logits(other, params, torch.ones(3, dtype=torch.int64), points, strides)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    close(recorded, "dyn.up8", aligned_bilinear(logits.sigmoid()[:, None], 4))


def clip_targets(recorded: dict[str, np.ndarray]) -> list[Instances]:
    """Of the five frames of the training clip."""
    height, width = 128, 192
    bits = np.unpackbits(recorded["gt.masks.bits"])
    masks = torch.from_numpy(bits[: 3 * 6 * height * width].reshape(3, 6, height, width).astype(bool))
    prefix = "train.bn_eval.b1."
    targets, start = [], 0
    for frame, count in enumerate(recorded[f"{prefix}num_gt"].tolist()):
        rows = slice(start, start + count)
        start += count
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.from_numpy(recorded[f"{prefix}boxes"][rows]).float())
        target.gt_classes = torch.from_numpy(recorded[f"{prefix}classes"][rows]).long()
        target.gt_head_ids = torch.from_numpy(recorded[f"{prefix}head_ids"][rows]).long()
        target.gt_masks = BitMasks(masks[:, frame][torch.from_numpy(recorded[f"{prefix}bank_ids"][rows]).long()])
        targets.append(target)
    return targets


def test_targets(detector: Detector, recorded: dict[str, np.ndarray]) -> None:
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))
    locations = grid_locations(sizes, (8, 16, 32, 64, 128), "cpu")
    found = detector.criterion.assign(locations, clip_targets(recorded))
    prefix = "train.bn_eval.b1.target."
    np.testing.assert_array_equal(found.labels.numpy(), recorded[f"{prefix}labels"][:, 0])
    np.testing.assert_array_equal(found.ids.numpy(), recorded[f"{prefix}ids"][:, 0])
    np.testing.assert_array_equal(np.bincount(found.frames, minlength=5), recorded[f"{prefix}num_pos"][:, 0])


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_losses_of_the_first_frames(
    batch_statistics: bool, detector: Detector, recorded: dict[str, np.ndarray], replaced: Any
) -> None:
    """Frames 0 and 1, whose association is that of the given-mask run; later ones have another memory in training."""
    prefix = f"train.bn_{'batch' if batch_statistics else 'eval'}.b1."
    names = [str(name) for name in recorded[f"{prefix}names"]]
    targets = clip_targets(recorded)
    for frame in range(2):
        with torch.no_grad():
            pyramid = detector.top_down(replaced(frame, recorded[f"forced.f{frame}.hab"]))
        detector.mask_branch.train(batch_statistics)
        losses = detector.losses(pyramid, targets[frame : frame + 1], (128, 192))
        detector.mask_branch.eval()
        assert set(losses) == set(names)
        for name, wanted in zip(names, recorded[f"{prefix}per_frame"][frame], strict=True):
            assert losses[name].item() == pytest.approx(float(wanted), rel=1e-4), (frame, name)
