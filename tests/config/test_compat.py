"""Released yaml files: every key is accepted, names become ours, nothing is ignored in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from vis.config.compat import RELEASED_DEFAULTS, UNUSED_KEYS, VALUE_ALIASES, translate
from vis.engine import load_cfg

# The whole set of keys of the released MinVIS files with the values of the OVIS R50 one, in an arrangement of our own.
SHARED = """
MODEL:
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  MASK_ON: True
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {NAME: "build_resnet_backbone", FREEZE_AT: 0}
  RESNETS:
    {DEPTH: 50, STEM_OUT_CHANNELS: 64, STEM_TYPE: "basic", STRIDE_IN_1X1: False, RES5_MULTI_GRID: [1, 1, 1],
     OUT_FEATURES: ["res2", "res3", "res4", "res5"]}
DATASETS: {TRAIN: ("ovis_train",), TEST: ("ovis_val",)}
DATALOADER: {NUM_WORKERS: 4, FILTER_EMPTY_ANNOTATIONS: False}
INPUT:
  FORMAT: "RGB"
  MIN_SIZE_TRAIN: (360, 480)
  MIN_SIZE_TRAIN_SAMPLING: "choice_by_clip"
  MIN_SIZE_TEST: 360
  RANDOM_FLIP: "flip_by_clip"
  AUGMENTATIONS: []
  CROP: {ENABLED: False, TYPE: "absolute_range", SIZE: (600, 720)}
SOLVER:
  {IMS_PER_BATCH: 16, BASE_LR: 0.0001, MAX_ITER: 10000, WARMUP_FACTOR: 1.0, WARMUP_ITERS: 10, WEIGHT_DECAY: 0.05,
   OPTIMIZER: "ADAMW", BACKBONE_MULTIPLIER: 0.1, AMP: {ENABLED: True},
   CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01, NORM_TYPE: 2.0}}
TEST: {EVAL_PERIOD: 0}
VERSION: 2
"""
# STEPS and the two data set names are tuples written in yaml, which are strings until they are merged.
MODEL = """
_BASE_: Base-OVIS-VideoInstanceSegmentation.yaml
INPUT: {SAMPLING_FRAME_NUM: 1}
MODEL:
  WEIGHTS: "model_final_3c8ec9.pkl"
  META_ARCHITECTURE: "VideoMaskFormer_frame"
  SEM_SEG_HEAD:
    {NAME: "MaskFormerHead", PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder", NUM_CLASSES: 25, NORM: "GN", MASK_DIM: 256,
     CONVS_DIM: 256, COMMON_STRIDE: 4, IGNORE_VALUE: 255, LOSS_WEIGHT: 1.0, TRANSFORMER_ENC_LAYERS: 6,
     IN_FEATURES: ["res2", "res3", "res4", "res5"],
     DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res3", "res4", "res5"]}
  MASK_FORMER:
    TRANSFORMER_DECODER_NAME: "VideoMultiScaleMaskedTransformerDecoder_frame"
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    DEEP_SUPERVISION: True
    NO_OBJECT_WEIGHT: 0.1
    CLASS_WEIGHT: 2.0
    MASK_WEIGHT: 5.0
    DICE_WEIGHT: 5.0
    NUM_OBJECT_QUERIES: 100
    HIDDEN_DIM: 256
    DIM_FEEDFORWARD: 2048
    NHEADS: 8
    DROPOUT: 0.0
    ENC_LAYERS: 0
    DEC_LAYERS: 10
    PRE_NORM: False
    ENFORCE_INPUT_PROJ: False
    SIZE_DIVISIBILITY: 32
    TRAIN_NUM_POINTS: 12544
    OVERSAMPLE_RATIO: 3.0
    IMPORTANCE_SAMPLE_RATIO: 0.75
    TEST:
      {SEMANTIC_ON: False, INSTANCE_ON: True, PANOPTIC_ON: False, OVERLAP_THRESHOLD: 0.8, OBJECT_MASK_THRESHOLD: 0.8,
       WINDOW_INFERENCE: True}
SOLVER: {IMS_PER_BATCH: 32}
"""
SWIN_L = """
_BASE_: video_maskformer2_R50_bs32_8ep_frame.yaml
INPUT: {MIN_SIZE_TEST: 480, SAMPLING_FRAME_RATIO: 0.05}
MODEL:
  WEIGHTS: "model_final_e5f453.pkl"
  BACKBONE: {NAME: "D2SwinTransformer"}
  SWIN: {EMBED_DIM: 192, DEPTHS: [2, 2, 18, 2], NUM_HEADS: [6, 12, 24, 48], WINDOW_SIZE: 12, PRETRAIN_IMG_SIZE: 384,
         APE: False, PATCH_NORM: True, DROP_PATH_RATE: 0.3}
  MASK_FORMER: {NUM_OBJECT_QUERIES: 200}
"""


def flow(text: str) -> str:
    """Tuples inside a yaml flow mapping have to be quoted; block mappings take them as they are."""
    return (
        text.replace('("ovis_train",)', "'(\"ovis_train\",)'")
        .replace('("ovis_val",)', "'(\"ovis_val\",)'")
        .replace("(600, 720)", "'(600, 720)'")
    )


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder with a base, an R50 and a Swin-L file in the released structure."""
    base = yaml.safe_load(flow(SHARED))
    base["SOLVER"]["STEPS"] = "(7000,)"
    (tmp_path / "Base-OVIS-VideoInstanceSegmentation.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    (tmp_path / "video_maskformer2_R50_bs32_8ep_frame.yaml").write_text(MODEL, encoding="utf-8")
    (tmp_path / "swin.yaml").write_text(SWIN_L, encoding="utf-8")
    return tmp_path


@pytest.fixture
def tree() -> dict[str, Any]:
    merged = yaml.safe_load(MODEL)
    merged["MODEL"].update({k: v for k, v in yaml.safe_load(flow(SHARED))["MODEL"].items() if k != "WEIGHTS"})
    return merged


def test_names_become_ours_and_the_input_is_left_alone(tree: dict[str, Any]) -> None:
    before = copy.deepcopy(tree)
    new, messages = translate(tree)
    assert tree == before
    assert new["MODEL"]["META_ARCHITECTURE"] == "MinVIS"
    assert new["MODEL"]["MASK_FORMER"]["TRANSFORMER_DECODER_NAME"] == "MultiScaleMaskedTransformerDecoder"
    assert any("VideoMaskFormer_frame" in message for message in messages)
    assert new["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"] == 25


def test_translating_twice_changes_nothing(tree: dict[str, Any]) -> None:
    once, _ = translate(tree)
    twice, messages = translate(once)
    assert twice == once
    assert messages == []


def test_unused_keys_are_taken_out_and_named(tree: dict[str, Any]) -> None:
    new, messages = translate(tree)
    text = "\n".join(messages)
    for key in ("MODEL.RESNETS.STEM_TYPE", "MODEL.MASK_FORMER.ENC_LAYERS", "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD"):
        assert key in text
        node = new
        *parents, leaf = key.split(".")
        for part in parents:
            node = node[part]
        assert leaf not in node
    assert new["MODEL"]["MASK_FORMER"]["TEST"]["WINDOW_INFERENCE"] is True
    assert len(messages) == len(set(messages))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True),
        ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True),
        ("MODEL.MASK_FORMER.TEST.INSTANCE_ON", False),
        ("MODEL.MASK_FORMER.ENC_LAYERS", 6),
        ("MODEL.RESNETS.STEM_TYPE", "deeplab"),
        ("MODEL.RESNETS.RES5_MULTI_GRID", [1, 2, 4]),
        ("INPUT.COLOR_AUG_SSD", True),
    ],
)
def test_a_value_that_asks_for_other_behaviour_is_an_error(key: str, value: Any) -> None:
    for part in reversed(key.split(".")):
        value = {part: value}
    with pytest.raises(ValueError, match=key):
        translate(value)


def test_groups_that_become_empty_vanish() -> None:
    new, _ = translate({"MODEL": {"MASK_FORMER": {"TEST": {"SEMANTIC_ON": False}}}, "SEED": 1})
    assert new == {"SEED": 1}


def test_defaults_of_the_release_do_not_override_the_yaml() -> None:
    tree = {"MODEL": {"META_ARCHITECTURE": "VideoMaskFormer_frame", "MASK_FORMER": {"TEST": {"WINDOW_SIZE": 5}}}}
    new, _ = translate(tree)
    assert new["MODEL"]["MASK_FORMER"]["TEST"]["WINDOW_SIZE"] == 5
    assert new["MODEL"]["MASK_FORMER"]["TEST"]["MAX_NUM"] == 10
    image, _ = translate({"MODEL": {"META_ARCHITECTURE": "MaskFormer"}})
    assert image["MODEL"]["MASK_FORMER"]["TEST"]["MAX_NUM"] == 100
    assert image["INPUT"]["SAMPLING_FRAME_NUM"] == 1


def test_our_own_tree_comes_back_without_a_word() -> None:
    tree = {
        "MODEL": {"META_ARCHITECTURE": "MinVIS", "WEIGHTS": ""},
        "INPUT": {"CROP": {"ENABLED": True}},
        "IMPORTS": ["a"],
    }
    assert translate(tree) == (tree, [])


def test_a_group_where_a_value_belongs_is_left_to_the_key_check() -> None:
    odd = {"MODEL": {"META_ARCHITECTURE": "MaskFormer"}, "INPUT": 3}
    assert translate(odd)[0]["INPUT"] == 3


def test_tables_are_consistent() -> None:
    for unused in UNUSED_KEYS.values():
        assert unused.reason
    assert set(RELEASED_DEFAULTS) <= {name for aliases in VALUE_ALIASES.values() for name in aliases}


@pytest.mark.parametrize(
    ("name", "queries", "size"),
    [("video_maskformer2_R50_bs32_8ep_frame", 100, 360), ("swin", 200, 480)],
)
def test_released_files_load_unchanged(released: Path, name: str, queries: int, size: int) -> None:
    cfg = load_cfg(str(released / f"{name}.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "MinVIS"
    found = (cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, cfg.INPUT.MIN_SIZE_TEST)
    assert found == (queries, size)
    assert cfg.MODEL.MASK_FORMER.TEST.WINDOW_INFERENCE is True
    assert cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE == 30
    assert cfg.SOLVER.IMS_PER_BATCH == 32
    assert tuple(cfg.SOLVER.STEPS) == (7000,)
    assert tuple(cfg.INPUT.CROP.SIZE) == (600, 720)
    assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"


def test_released_names_on_the_command_line(released: Path) -> None:
    file = str(released / "video_maskformer2_R50_bs32_8ep_frame.yaml")
    cfg = load_cfg(file, ["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "0.5", "MODEL.MASK_FORMER.TEST.MAX_NUM", "7"])
    assert cfg.MODEL.MASK_FORMER.TEST.MAX_NUM == 7
    with pytest.raises(ValueError, match="SEMANTIC_ON"):
        load_cfg(file, ["MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "True"])


PUBLISHED = {
    "minvis/ytvis19_r50.yaml": (40, 32, 6000, (4000,), 360, 10),
    "minvis/ytvis21_r50.yaml": (40, 32, 8000, (5500,), 360, 10),
    "minvis/ovis_r50.yaml": (25, 32, 10000, (7000,), 360, 10),
    "coco/instance_r50.yaml": (80, 16, 368750, (327778, 355092), 800, 100),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_our_files_have_the_published_values(project_root: Path, name: str) -> None:
    cfg = load_cfg(str(project_root / "configs" / name))
    solver, test = cfg.SOLVER, cfg.MODEL.MASK_FORMER.TEST
    found = (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, solver.IMS_PER_BATCH, solver.MAX_ITER, tuple(solver.STEPS))
    assert (*found, cfg.INPUT.MIN_SIZE_TEST, test.MAX_NUM) == PUBLISHED[name]
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.BACKBONE_MULTIPLIER) == (1e-4, 0.05, 0.1)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == ("full_model", 0.01)
    assert test.MASK_SCORE is name.startswith("coco")


def test_our_file_means_what_the_released_one_means(project_root: Path, released: Path) -> None:
    # The number of frames that run together changes memory, not results; ours is smaller.
    opts = ["MODEL.MASK_FORMER.TEST.WINDOW_SIZE", "30"]
    ours = load_cfg(str(project_root / "configs" / "minvis" / "ovis_r50.yaml"), opts)
    theirs = load_cfg(str(released / "video_maskformer2_R50_bs32_8ep_frame.yaml"))
    for section in (
        "RESNETS",
        "BACKBONE",
        "SEM_SEG_HEAD",
        "MASK_FORMER",
        "PIXEL_MEAN",
        "PIXEL_STD",
        "META_ARCHITECTURE",
    ):
        assert ours.MODEL[section] == theirs.MODEL[section], section
    # released files do not say how many GPUs they are for
    assert dict(theirs.SOLVER) == {**ours.SOLVER, "REFERENCE_WORLD_SIZE": 0}
    assert ours.DATASETS == theirs.DATASETS
    different = {key for key in ours.INPUT if ours.INPUT[key] != theirs.INPUT[key]}
    assert different <= {"SAMPLING_FRAME_RANGE"}  # without meaning where a clip has one frame
