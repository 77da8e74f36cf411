"""Released yaml trees of IDOL: they load as they are and mean what our own files mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vis.config import CfgNode
from vis.engine import load_cfg

# Keys of the release with the values of OVIS, R50, in an arrangement of our own.
BASE: dict[str, Any] = yaml.safe_load("""
MODEL:
  META_ARCHITECTURE: IDOL
  WEIGHTS: weights/cocopretrain_R50.pth
  MASK_ON: True
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  RESNETS: {DEPTH: 50, STRIDE_IN_1X1: False, OUT_FEATURES: [res2, res3, res4, res5]}
  IDOL: {NUM_CLASSES: 25, MULTI_CLS_ON: True, NMS_PRE: 0.3, ADD_NEW_SCORE: 0.3, MERGE_ON_CPU: True}
SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.0001, STEPS: "(8000,)", MAX_ITER: 12000, WARMUP_FACTOR: 1.0, WARMUP_ITERS: 10,
         WEIGHT_DECAY: 0.0001, OPTIMIZER: ADAMW, BACKBONE_MULTIPLIER: 0.1, CHECKPOINT_PERIOD: 1000,
         CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 0.01, NORM_TYPE: 2.0}}
INPUT: {FORMAT: RGB, MIN_SIZE_TRAIN: "(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)", MIN_SIZE_TEST: 720,
        MIN_SIZE_TRAIN_SAMPLING: choice_by_clip, RANDOM_FLIP: flip_by_clip, SAMPLING_FRAME_NUM: 2,
        SAMPLING_FRAME_RANGE: 10, SAMPLING_INTERVAL: 1, SAMPLING_FRAME_SHUFFLE: False, AUGMENTATIONS: [],
        CROP: {ENABLED: True, TYPE: absolute_range, SIZE: "(384, 600)"}}
DATASETS: {TRAIN: '("ytvis_ovis_train",)', TEST: '("ytvis_ovis_val",)'}
DATALOADER: {FILTER_EMPTY_ANNOTATIONS: False, NUM_WORKERS: 8}
TEST: {EVAL_PERIOD: 0}
VERSION: 2
""")
# Every default that the release adds, with its own value.
DEFAULTS: dict[str, Any] = yaml.safe_load("""
FIND_UNUSED_PARAMETERS: True
INPUT: {COCO_PRETRAIN: False, PRETRAIN_SAME_CROP: False}
MODEL:
  IDOL: {NUM_CLASSES: 80, MASK_WEIGHT: 2.0, DICE_WEIGHT: 5.0, GIOU_WEIGHT: 2.0, L1_WEIGHT: 5.0, CLASS_WEIGHT: 2.0,
         REID_WEIGHT: 2.0, DEEP_SUPERVISION: True, MASK_STRIDE: 4, MATCH_STRIDE: 4, FOCAL_ALPHA: 0.25,
         SET_COST_CLASS: 2, SET_COST_BOX: 5, SET_COST_GIOU: 2, NHEADS: 8, DROPOUT: 0.1, DIM_FEEDFORWARD: 1024,
         ENC_LAYERS: 6, DEC_LAYERS: 6, HIDDEN_DIM: 256, NUM_OBJECT_QUERIES: 300, ENC_N_POINTS: 4, DEC_N_POINTS: 4,
         NUM_FEATURE_LEVELS: 4, CLIP_STRIDE: 1, MERGE_ON_CPU: True, MULTI_CLS_ON: True, APPLY_CLS_THRES: 0.05,
         TEMPORAL_SCORE_TYPE: mean, INFERENCE_SELECT_THRES: 0.1, NMS_PRE: 0.5, ADD_NEW_SCORE: 0.2, INFERENCE_FW: True,
         INFERENCE_TW: True, MEMORY_LEN: 3, BATCH_INFER_LEN: 10}
""")
SWIN = """
MODEL:
  BACKBONE: {NAME: D2SwinTransformer}
  SWIN: {PRETRAIN_IMG_SIZE: 384, EMBED_DIM: 192, DEPTHS: [2, 2, 18, 2], NUM_HEADS: [6, 12, 24, 48], WINDOW_SIZE: 12,
         APE: False, DROP_PATH_RATE: 0.3, PATCH_NORM: True}
  WEIGHTS: weights/cocopretrain_SWINL.pth
"""


def merged(*trees: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in (yaml.safe_load(tree) if isinstance(tree, str) else tree).items():
            result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., CfgNode]:
    def load(*trees: Any, opts: tuple[str, ...] = ()) -> CfgNode:
        file = tmp_path / "released.yaml"
        file.write_text(yaml.safe_dump(merged(*trees)))
        return load_cfg(str(file), opts)

    return load


def flat(node: CfgNode, path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves |= flat(value, f"{path}{key}.") if isinstance(value, CfgNode) else {f"{path}{key}": value}
    return leaves


# What a yaml of ours may say otherwise: where it reads and writes.
OWN = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "DATASETS.TRAIN", "DATASETS.TEST")


@pytest.mark.parametrize(("ours", "change"), [("ovis_r50.yaml", {}), ("ovis_swinl.yaml", SWIN)])
def test_released_file_means_ours(released: Callable[..., CfgNode], project_root: Path, ours: str, change: Any) -> None:
    found = flat(released(BASE, change))
    own = flat(load_cfg(str(project_root / "configs/idol" / ours)))
    unlike = {key: (found[key], own[key]) for key in own if found[key] != own[key] and key not in OWN}
    # 200 queries of the Swin fragment are Mask2Former's; IDOL's are MODEL.IDOL.NUM_OBJECT_QUERIES.
    unlike.pop("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", None)
    assert unlike == {}


def test_released_defaults_are_ours(released: Callable[..., CfgNode]) -> None:
    cfg = released(BASE, DEFAULTS, "MODEL: {IDOL: {NUM_CLASSES: 25}}")
    bare = merged(BASE)
    del bare["MODEL"]["IDOL"]
    plain = flat(released(bare))
    assert {key: value for key, value in flat(cfg).items() if plain[key] != value} == {}
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 25
    assert cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE == 10
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.SOLVER.WEIGHT_DECAY_NORM == cfg.SOLVER.WEIGHT_DECAY


def test_moved_keys(released: Callable[..., CfgNode]) -> None:
    cfg = released(BASE, opts=("MODEL.IDOL.BATCH_INFER_LEN", "4"))
    assert cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INPUT.PRETRAIN_SAME_CROP", "True", "the same window"),
        ("MODEL.IDOL.MASK_STRIDE", "8", "only 4 can be had here"),
        ("MODEL.IDOL.NMS_PER", "0.3", "Did you mean 'NMS_PRE'"),
    ],
)
def test_what_is_not_there(released: Callable[..., CfgNode], key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        released(BASE, opts=(key, value))


# (batch, shortest edges at training, at test, longest edge, NMS of masks, score of a new track)
PUBLISHED = {
    "ytvis19_r50.yaml": (32, 320, 640, 480, 768, 0.5, 0.2, 40),
    "ytvis19_r101.yaml": (32, 320, 640, 480, 768, 0.5, 0.2, 40),
    "ytvis19_swinl.yaml": (32, 320, 640, 480, 768, 0.5, 0.2, 40),
    "ytvis21_r50.yaml": (32, 320, 640, 480, 768, 0.5, 0.2, 40),
    "ytvis21_r101.yaml": (32, 320, 640, 480, 768, 0.5, 0.2, 40),
    "ytvis21_swinl.yaml": (32, 320, 640, 480, 768, 0.5, 0.2, 40),
    "ovis_r50.yaml": (16, 480, 800, 720, 1333, 0.3, 0.3, 25),
    "ovis_swinl.yaml": (16, 480, 800, 720, 1333, 0.3, 0.3, 25),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_recipes(name: str, project_root: Path) -> None:
    cfg = load_cfg(str(project_root / "configs/idol" / name))
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    found = (cfg.SOLVER.IMS_PER_BATCH, min(sizes), max(sizes), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN)
    tests = (cfg.MODEL.IDOL.NMS_PRE, cfg.MODEL.IDOL.ADD_NEW_SCORE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    assert (*found, *tests) == PUBLISHED[name]
    assert (cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS), cfg.SOLVER.BASE_LR) == (12000, (8000,), 1e-4)
    assert (cfg.INPUT.SAMPLING_FRAME_NUM, cfg.INPUT.SAMPLING_FRAME_RANGE) == (2, 10)
    depth = 101 if "r101" in name else 50
    backbone = (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.BACKBONE.FREEZE_AT)
    assert backbone == (depth, 2)
