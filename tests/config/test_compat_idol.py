"""Released yaml trees of IDOL: they load as they are and mean what our own files mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vis.config import CfgNode
from vis.engine import load_cfg
from vis.modeling import build_model

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


# What a yaml of ours may say otherwise: where it reads and writes, and for how many GPUs it is.
OWN = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.REFERENCE_WORLD_SIZE")


R101 = "MODEL: {WEIGHTS: weights/cocopretrain_R101.pth, RESNETS: {DEPTH: 101}}"


def youtube_vis(year: int) -> dict[str, Any]:
    """What the release's files of YouTube-VIS say otherwise."""
    sizes = "(320, 352, 392, 416, 448, 480, 512, 544, 576, 608, 640)"
    return {
        "MODEL": {"IDOL": {"NUM_CLASSES": 40, "NMS_PRE": 0.5, "ADD_NEW_SCORE": 0.2}},
        "SOLVER": {"IMS_PER_BATCH": 32},
        "INPUT": {"MIN_SIZE_TRAIN": sizes, "MAX_SIZE_TRAIN": 768, "MIN_SIZE_TEST": 480},
        "DATASETS": {"TRAIN": f'("ytvis_{year}_train",)', "TEST": f'("ytvis_{year}_val",)'},
    }


def coco(batch: int, steps: tuple[int, int], last: int, period: int, size: int) -> dict[str, Any]:
    """The trainings on pairs of COCO. They name no weights: ours start from an ImageNet backbone."""
    own = youtube_vis(2019)
    return {
        "MODEL": {**own["MODEL"], "IDOL": {**own["MODEL"]["IDOL"], "NUM_CLASSES": 80}},
        "SOLVER": {"IMS_PER_BATCH": batch, "BASE_LR": 0.0002, "STEPS": str(steps)}
        | {"MAX_ITER": last, "CHECKPOINT_PERIOD": period},
        "INPUT": {**own["INPUT"], "MAX_SIZE_TRAIN": 1333, "MIN_SIZE_TEST": size, "COCO_PRETRAIN": True}
        | {"MIN_SIZE_TRAIN_SAMPLING": "choice", "RANDOM_FLIP": "horizontal"},
        "DATASETS": {"TRAIN": '("coco_2017_train",)', "TEST": '("coco_2017_val",)'},
        "DATALOADER": {"FILTER_EMPTY_ANNOTATIONS": True},
        "TEST": {"EVAL_PERIOD": period},
    }


# Our file -> what the release's says otherwise than BASE.
RELEASED: dict[str, tuple[Any, ...]] = {
    "ovis_r50.yaml": (),
    "ovis_swinl.yaml": (SWIN,),
    **{f"ytvis{year - 2000}_r50.yaml": (youtube_vis(year),) for year in (2019, 2021)},
    **{f"ytvis{year - 2000}_r101.yaml": (youtube_vis(year), R101) for year in (2019, 2021)},
    **{f"ytvis{year - 2000}_swinl.yaml": (youtube_vis(year), SWIN) for year in (2019, 2021)},
    "coco_r50.yaml": (coco(32, (22200, 44400), 59200, 3700, 640),),
    "coco_swinl.yaml": (SWIN, coco(16, (59200, 118400), 148000, 2000, 800)),
}


START = {
    "coco_r50.yaml": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "coco_swinl.yaml": "weights/swin_large_patch4_window12_384_22k.pth",
}


@pytest.mark.parametrize("ours", list(RELEASED))
def test_released_file_means_ours(released: Callable[..., CfgNode], project_root: Path, ours: str) -> None:
    found = flat(released(BASE, *RELEASED[ours]))
    own = flat(load_cfg(str(project_root / "configs/idol" / ours)))
    unlike = {key: (found[key], own[key]) for key in own if found[key] != own[key] and key not in OWN}
    if ours.startswith("coco"):
        # the release's names no backbone, and what makes pairs there is COCO_PRETRAIN alone
        assert (unlike.pop("MODEL.WEIGHTS")[1], unlike.pop("INPUT.DATASET_MAPPER_NAME")[1]) == (
            START[ours],
            "coco_clip",
        )
        assert found["INPUT.COCO_PAIRS"] is True
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


# Our own: (batch, shortest edges at training, at test, longest edge, NMS of masks, score of a new track, classes)
RECIPES = {
    "ovis_r101": (16, 480, 800, 720, 1333, 0.3, 0.3, 25),
    "ovis_swinl_quality": (8, 320, 640, 720, 1333, 0.3, 0.3, 25),
    "ytvis22_r50": (8, 320, 640, 720, 768, 0.5, 0.2, 40),
    "ytvis22_r101": (8, 320, 640, 720, 768, 0.5, 0.2, 40),
    "ytvis22_swinl": (8, 320, 640, 720, 768, 0.5, 0.2, 40),
    "ablations/coco_baseline": (8, 320, 640, 800, 1333, 0.5, 0.2, 80),
    "ablations/ytvis22_boundary": (8, 320, 640, 720, 768, 0.5, 0.2, 40),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes(name: str, project_root: Path) -> None:
    cfg = load_cfg(str(project_root / f"configs/idol/{name}.yaml"))
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    found = (cfg.SOLVER.IMS_PER_BATCH, min(sizes), max(sizes), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN)
    tests = (cfg.MODEL.IDOL.NMS_PRE, cfg.MODEL.IDOL.ADD_NEW_SCORE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    assert (*found, *tests) == RECIPES[name]
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, cfg.MODEL.IDOL.RELEASED_MATCHER) == (1e-4, 1e-4, False)
    assert (cfg.INPUT.SAMPLING_FRAME_NUM, cfg.INPUT.SAMPLING_FRAME_RANGE) == (2, 10)
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert ("r101" in name) == (cfg.MODEL.RESNETS.DEPTH == 101)
    last = 175000 if "coco" in name else 12000 if name == "ovis_r101" else 40000
    assert (cfg.SOLVER.MAX_ITER, round(cfg.SOLVER.STEPS[0] / last, 4)) == (last, 0.6667)
    if "22" in name:
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("ytvis_2021_train",), ("ytvis_2022_val",))


PARTS = {
    "baseline": ([], False),
    "quality": (["QualityHead"], False),
    "boundary": (["QualityHead", "BoundaryHead"], False),
    "batchformer": (["QualityHead", "BoundaryHead"], True),
}


def test_rows_of_the_challenge_systems(project_root: Path) -> None:
    """Each row has its parts in both of its trainings, and the second starts from the first of the same row."""
    folder = project_root / "configs/idol/ablations"
    rows = {file.stem: load_cfg(str(file)) for file in folder.glob("*.yaml")}
    multi_scale = rows.pop("ovis_multi_scale")
    assert set(rows) == {f"{stage}_{row}" for stage in ("coco", "ovis") for row in PARTS} | {
        f"ytvis22_{row}" for row in ("baseline", "quality", "boundary")
    }
    for name, cfg in rows.items():
        stage, row = name.split("_")
        assert (list(cfg.MODEL.HEADS), cfg.MODEL.BATCH_FORMER.ENABLED) == PARTS[row]
        assert not PARTS[row][1] or cfg.MODEL.BATCH_FORMER.POSITION == "before"
        before = (
            "weights/cocopretrain_SWINL.pth" if stage == "coco" else f"{rows[f'coco_{row}'].OUTPUT_DIR}/model_final.pth"
        )
        assert before == cfg.MODEL.WEIGHTS
    assert multi_scale.TEST.MULTI_SCALE.SIZES == [720, 1080]
    assert f"{rows['ovis_batchformer'].OUTPUT_DIR}/model_final.pth" == multi_scale.MODEL.WEIGHTS
    assert len({cfg.OUTPUT_DIR for cfg in (*rows.values(), multi_scale)}) == len(rows) + 1


def configurations() -> list[str]:
    folder = Path(__file__).resolve().parents[2] / "configs" / "idol"
    return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.yaml"))]


def test_there_are_all_data_sets_and_backbones() -> None:
    sets, backbones = ("ytvis19", "ytvis21", "ytvis22", "ovis", "coco"), ("r50", "r101", "swinl")
    assert {f"{name}_{backbone}.yaml" for name in sets for backbone in backbones} <= set(configurations())


@pytest.mark.parametrize("name", configurations())
def test_every_configuration_builds(name: str, project_root: Path) -> None:
    """At a fraction of its width: what is checked is that its parts fit together."""
    narrow = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
    narrow += ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.SWIN.EMBED_DIM", 48, "MODEL.IDOL.HIDDEN_DIM", 32]
    cfg = load_cfg(str(project_root / "configs/idol" / name), ["MODEL.DEVICE", "cpu", *narrow])
    model = build_model(cfg)
    heads = [type(head).__name__ for head in model.heads.values()]
    assert heads == list(cfg.MODEL.HEADS)
    assert any(".bf." in key for key in model.state_dict()) == cfg.MODEL.BATCH_FORMER.ENABLED
    assert len(model.detr.detr.class_embed[0].bias) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    blocks = sum(key.endswith("attn.qkv.weight") for key in model.state_dict())
    convs = sum(key.endswith("conv2.weight") for key in model.state_dict() if "backbone" in key)
    swin = "swinl" in name or name.startswith("ablations")
    assert (blocks, convs) == ((24, 0) if swin else (0, 33 if "r101" in name else 16))
