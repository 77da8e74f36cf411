"""Every configuration of IAI builds, trains and tracks with a tiny network, and says what its numbers say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vis.checkpoint import load_weights
from vis.config import CfgNode
from vis.data.loaders import build_test_loader, build_train_loader
from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.modeling import build_model
from vis.solver import build_optimizer

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted((ROOT / "iai").rglob("*.yaml"))
SMALL = {"CondInst": "iai_tiny", "MaskRCNN": "masktrack_rcnn_tiny"}
KEPT = ("META_ARCHITECTURE", "NUM_IDS", "NAME", "STRIDE_IN_1X1", "FREEZE_AT", "NORM_EVAL")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif key not in KEPT and key != "_BASE_":
            found[prefix + key] = value
    return found


def tiny(path: Path, *options: Any) -> CfgNode:
    """A configuration with a tiny network, which is that of the demos, on the embedded data set."""
    name = load_cfg(str(path)).MODEL.DETECTOR.NAME
    keys = flat(yaml.safe_load((ROOT / "_base_" / "models" / f"{SMALL[name]}.yaml").read_text()))
    keys = {key: value for key, value in keys.items() if not key.startswith(("INPUT.", "MODEL.MASK_FORMER"))}
    keys |= {"MODEL.IAI.DIM": 64, "MODEL.IAI.SELF_HEADS": 2, "MODEL.IAI.FFN_DIM": 128, "MODEL.WEIGHTS": ""}
    keys |= {"MODEL.DEVICE": "cpu", "SOLVER.IMS_PER_BATCH": 2, "SOLVER.REFERENCE_WORLD_SIZE": 0}
    keys |= {"DATALOADER.NUM_WORKERS": 0}
    keys |= {"DATASETS.TRAIN": ("synthetic_ovis_train",), "DATASETS.TEST": ("synthetic_ovis_val",)}
    keys |= {"INPUT.MIN_SIZE_TEST": 64, "TEST.PREFETCH_FRAMES": 0}
    return load_cfg(str(path), [word for pair in keys.items() for word in pair] + list(options))


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("data")
    generate("synthetic_ovis", folder, seed=3, num_videos={"train": 2, "val": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder))
        yield


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "iai"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_builds(path: Path) -> None:
    cfg = tiny(path)
    model = build_model(cfg)
    assert type(model).__name__ == "IAI"
    names = list(model.state_dict())
    has = {part: any(part in name for name in names) for part in ("association.", "roi_heads.")}
    node = cfg.MODEL.IAI
    head = any(f".{part}" in name for name in names for part in ("id_logits", "id_head"))
    assert (has["association."], head) == (node.ASSOCIATION, node.ID_HEAD)
    assert has["roi_heads."] == ("mask_rcnn" in path.name)
    groups = {(group["lr"], round(group["weight_decay"], 9)) for group in build_optimizer(cfg, model).param_groups}
    assert groups == {(1e-5, 9e-5), (1e-4, 1e-4)}


@pytest.mark.parametrize(
    "name",
    [
        "ytvis19_r50",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ovis_r50_released", "ytvis21_mask_rcnn_r50")),
        *(pytest.param(f"ablations/{name}", marks=pytest.mark.slow) for name in ("modules_none", "block_local")),
    ],
)
def test_trains_and_tracks(name: str) -> None:
    sizes = ["INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MAX_SIZE_TRAIN_RANGE", (80, 100)]
    one_size = ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice_by_clip"]
    cfg = tiny(ROOT / "iai" / f"{name}.yaml", *(sizes if "ovis" in name else one_size))
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = next(build_train_loader(cfg))
    assert [len(sample["image"]) for sample in batch] == [5, 5]
    losses = model(batch)
    total = sum(losses.values())
    assert ("loss_id" in losses) == cfg.MODEL.IAI.ID_HEAD
    assert torch.isfinite(total)
    total.backward()
    idle = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not idle
    model.eval()
    with torch.no_grad():
        (video,) = model(next(iter(build_test_loader(cfg, "synthetic_ovis_val"))))
    assert len(video.scores) <= cfg.MODEL.IAI.TEST.MAX_NUM


def test_numbers_of_the_release() -> None:
    """What the release's five configurations state."""

    def of(name: str) -> tuple[Any, ...]:
        cfg = load_cfg(str(ROOT / "iai" / f"{name}.yaml"))
        detector, node = cfg.MODEL.DETECTOR, cfg.MODEL.IAI
        assert (detector.ID_THR, detector.NMS, node.TEST.VIDEO_SCORE_THR, node.GLOBAL_INTERVAL) == (0.1, 0.5, 0.05, 3)
        assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.SAMPLING_FRAME_NUM) == (360, 640, 5)
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR) == (1e-4, 500, 0.001)
        assert detector.TOPK == node.TEST.MAX_NUM
        classes, depth = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.RESNETS.DEPTH
        train = (
            tuple(cfg.INPUT.MIN_SIZE_TRAIN),
            tuple(cfg.INPUT.MAX_SIZE_TRAIN_RANGE),
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        )
        return depth, node.NUM_IDS, classes, train, detector.NMS_PRE, detector.CLS_THR, detector.TOPK

    one, clip = ((360,), (), "choice_by_clip"), ((360, 480), (649, 960), "range_by_clip")
    frame = (*clip[:2], "range")
    assert of("ytvis19_r50_released") == (50, 20, 40, one, 200, 0.1, 10)
    assert of("ytvis19_r50_ms_released") == (50, 20, 40, clip, 200, 0.1, 10)
    assert of("ytvis19_r101_released") == (101, 20, 40, clip, 1000, 0.05, 10)
    assert of("ytvis21_r50_released") == (50, 25, 40, clip, 200, 0.1, 10)
    assert of("ovis_r50_released") == (50, 25, 25, frame, 200, 0.1, 50)


@pytest.mark.parametrize(("data", "videos"), [("ytvis19", 2238), ("ytvis21", 2985), ("ovis", 607)])
def test_schedule_is_twelve_epochs_of_five_clips(data: str, videos: int) -> None:
    solver = load_cfg(str(ROOT / "iai" / f"{data}_r50.yaml")).SOLVER
    epoch = -(-5 * videos // solver.IMS_PER_BATCH)
    assert 12 * epoch == solver.MAX_ITER
    assert (8 * epoch, 11 * epoch) == solver.STEPS


def test_the_release_takes_a_head_for_its_backbone() -> None:
    cfg = tiny(ROOT / "iai" / "ytvis19_r50_released.yaml")
    model = build_model(cfg)
    slow = {id(p) for g in build_optimizer(cfg, model).param_groups if g["lr"] < 5e-5 for p in g["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in slow}
    others = {name for name in names if ".bottom_up." not in name}
    assert others == {"association.cls_proj.weight", "association.cls_proj.bias"}


def test_starts_from_a_mask_rcnn_of_detectron2(tmp_path: Path) -> None:
    """Names and shapes of a detector that detectron2 itself builds."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model as build_plain

    cfg = tiny(ROOT / "iai" / "ytvis19_mask_rcnn_r50.yaml")
    plain = get_cfg()
    plain.MODEL.META_ARCHITECTURE, plain.MODEL.DEVICE, plain.MODEL.MASK_ON = "GeneralizedRCNN", "cpu", True
    plain.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    node = cfg.MODEL
    for key in ("DEPTH", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP", "OUT_FEATURES", "STRIDE_IN_1X1"):
        plain.MODEL.RESNETS[key] = node.RESNETS[key]
    plain.MODEL.FPN.IN_FEATURES, plain.MODEL.FPN.OUT_CHANNELS = (
        ["res2", "res3", "res4", "res5"],
        node.MASK_RCNN.CHANNELS,
    )
    plain.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    plain.MODEL.ANCHOR_GENERATOR.SIZES = node.ANCHOR_GENERATOR.SIZES
    plain.MODEL.ROI_HEADS.NAME, plain.MODEL.ROI_HEADS.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
    for key in ("NAME", "NUM_FC", "FC_DIM", "POOLER_RESOLUTION"):
        plain.MODEL.ROI_BOX_HEAD[key] = node.ROI_BOX_HEAD[key]
    for key in ("NUM_CONV", "CONV_DIM", "POOLER_RESOLUTION"):
        plain.MODEL.ROI_MASK_HEAD[key] = node.ROI_MASK_HEAD[key]
    plain.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    detector = build_plain(plain)
    state = {key: torch.from_numpy(np.asarray(value)) for key, value in detector.state_dict().items()}
    torch.save({"model": state}, tmp_path / "model_final_a54504.pth")
    model = build_model(cfg)
    report = load_weights(model, tmp_path / "model_final_a54504.pth")
    assert report.stage == "mask_rcnn"
    assert {".".join(name.split(".")[:2]) for name in report.missing} <= {
        "image_model.roi_heads",
        *(f"association.{part}" for part in ("enc_proj", "cls_proj", "id_bank", "layers", "norms")),
    }
    loaded = model.state_dict()
    for name in (
        "roi_heads.box_head.fc1.weight",
        "backbone.fpn_output2.bias",
        "proposal_generator.rpn_head.conv.weight",
    ):
        assert torch.equal(loaded[f"image_model.{name}"], state[name])
    assert [rows for rows, *_ in (shape for _, _, shape in report.remade)] == [7, 7, 24, 24, 6, 6]
