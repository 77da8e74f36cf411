"""Released yaml trees of VITA: they load as they are and mean what our own files mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vis.config import CfgNode
from vis.config.compat import translate
from vis.engine import load_cfg

SIZES = "(288, 320, 352, 384, 416, 448, 480, 512)"
# All keys of the released files with the values of YouTube-VIS 2019, R50, in an arrangement of our own; tuples are
# written as the strings that yaml makes of them.
BASE: dict[str, Any] = yaml.safe_load(f"""
MODEL:
  WEIGHTS: vita_r50_coco.pth
  META_ARCHITECTURE: Vita
  MASK_ON: True
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {{FREEZE_AT: 0, NAME: build_resnet_backbone}}
  RESNETS: {{DEPTH: 50, STEM_TYPE: basic, STEM_OUT_CHANNELS: 64, STRIDE_IN_1X1: False, RES5_MULTI_GRID: [1, 1, 1],
            OUT_FEATURES: [res2, res3, res4, res5]}}
  SEM_SEG_HEAD: {{NAME: MaskFormerHead, IGNORE_VALUE: 255, NUM_CLASSES: 40, LOSS_WEIGHT: 1.0, CONVS_DIM: 256,
                 MASK_DIM: 256, NORM: GN, PIXEL_DECODER_NAME: MSDeformAttnPixelDecoder, COMMON_STRIDE: 4,
                 IN_FEATURES: [res2, res3, res4, res5], TRANSFORMER_ENC_LAYERS: 6,
                 DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: [res3, res4, res5]}}
  MASK_FORMER: {{TRANSFORMER_DECODER_NAME: VitaMultiScaleMaskedTransformerDecoder, NHEADS: 8, DROPOUT: 0.0,
                TRANSFORMER_IN_FEATURE: multi_scale_pixel_decoder, DEEP_SUPERVISION: True, NO_OBJECT_WEIGHT: 0.1,
                CLASS_WEIGHT: 2.0, MASK_WEIGHT: 5.0, DICE_WEIGHT: 5.0, HIDDEN_DIM: 256, NUM_OBJECT_QUERIES: 100,
                DIM_FEEDFORWARD: 2048, ENC_LAYERS: 0, PRE_NORM: False, ENFORCE_INPUT_PROJ: False, DEC_LAYERS: 10,
                SIZE_DIVISIBILITY: 32, TRAIN_NUM_POINTS: 12544, OVERSAMPLE_RATIO: 3.0, IMPORTANCE_SAMPLE_RATIO: 0.75,
                TEST: {{SEMANTIC_ON: False, INSTANCE_ON: True, PANOPTIC_ON: False, OVERLAP_THRESHOLD: 0.8,
                       OBJECT_MASK_THRESHOLD: 0.8}}}}
  VITA: {{NHEADS: 8, DROPOUT: 0.0, DIM_FEEDFORWARD: 2048, ENC_LAYERS: 6, DEC_LAYERS: 3, ENC_WINDOW_SIZE: 6,
         PRE_NORM: False, HIDDEN_DIM: 256, NUM_OBJECT_QUERIES: 100, ENFORCE_INPUT_PROJ: True, NO_OBJECT_WEIGHT: 0.1,
         DEEP_SUPERVISION: True, LAST_LAYER_NUM: 3, MULTI_CLS_ON: True, APPLY_CLS_THRES: 0.01, SIM_USE_CLIP: True,
         SIM_WEIGHT: 0.5, FREEZE_DETECTOR: False, TEST_RUN_CHUNK_SIZE: 18, TEST_INTERPOLATE_CHUNK_SIZE: 5}}
SOLVER: {{IMS_PER_BATCH: 8, BASE_LR: 0.00005, STEPS: "(75000,)", MAX_ITER: 140000, WARMUP_FACTOR: 1.0,
         WARMUP_ITERS: 10, WEIGHT_DECAY: 0.05, OPTIMIZER: ADAMW, BACKBONE_MULTIPLIER: 0.1, AMP: {{ENABLED: True}},
         CLIP_GRADIENTS: {{ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 0.01, NORM_TYPE: 2.0}}}}
INPUT: {{FORMAT: RGB, MIN_SIZE_TRAIN: "{SIZES}", MAX_SIZE_TRAIN: 768, MIN_SIZE_TEST: 360, RANDOM_FLIP: flip_by_clip,
        MIN_SIZE_TRAIN_SAMPLING: choice_by_clip, AUGMENTATIONS: [], SAMPLING_FRAME_NUM: 5, SAMPLING_FRAME_RANGE: 20,
        SAMPLING_FRAME_SHUFFLE: False, CROP: {{ENABLED: True, TYPE: absolute_range, SIZE: "(384, 600)"}},
        PSEUDO: {{AUGMENTATIONS: [rotation], MIN_SIZE_TRAIN: "{SIZES}", MAX_SIZE_TRAIN: 768,
                 MIN_SIZE_TRAIN_SAMPLING: choice_by_clip,
                 CROP: {{ENABLED: True, TYPE: absolute_range, SIZE: "(384, 600)"}}}},
        LSJ_AUG: {{ENABLED: False, IMAGE_SIZE: 1024, MIN_SCALE: 0.1, MAX_SCALE: 2.0}}}}
DATASETS: {{DATASET_RATIO: [1.0, 0.75], TRAIN: '("coco2ytvis2019_train", "ytvis_2019_train")',
           TEST: '("ytvis_2019_val",)'}}
DATALOADER: {{FILTER_EMPTY_ANNOTATIONS: True, NUM_WORKERS: 8}}
TEST: {{EVAL_PERIOD: 0, DETECTIONS_PER_IMAGE: 10}}
VERSION: 2
""")
OVIS_SWIN = """
MODEL:
  BACKBONE: {NAME: D2SwinTransformer}
  SWIN: {EMBED_DIM: 192, DEPTHS: [2, 2, 18, 2], NUM_HEADS: [6, 12, 24, 48], WINDOW_SIZE: 12, APE: False,
         DROP_PATH_RATE: 0.3, PATCH_NORM: True, PRETRAIN_IMG_SIZE: 384}
  SEM_SEG_HEAD: {NUM_CLASSES: 25}
  MASK_FORMER: {NUM_OBJECT_QUERIES: 200}
INPUT: {SAMPLING_FRAME_NUM: 6, SAMPLING_FRAME_RANGE: 8, MIN_SIZE_TEST: 448}
SOLVER: {STEPS: "(50000, 125000)", MAX_ITER: 150000}
DATASETS: {DATASET_RATIO: [1.0, 0.25], TRAIN: '("coco2ovis_train", "ovis_train")', TEST: '("ovis_val",)'}
TEST: {DETECTIONS_PER_IMAGE: 20}
"""
COCO = """
MODEL: {WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl", SEM_SEG_HEAD: {NUM_CLASSES: 80},
        VITA: {ENC_WINDOW_SIZE: 0}}
INPUT: {SAMPLING_FRAME_NUM: 1, RANDOM_FLIP: horizontal, LSJ_AUG: {ENABLED: True}, MIN_SIZE_TEST: 800,
        MAX_SIZE_TEST: 1333}
SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.0001, STEPS: "(327778, 355092)", MAX_ITER: 368750}
DATASETS: {DATASET_RATIO: [1.0], TRAIN: '("coco_2017_train",)', TEST: '("coco_2017_val",)'}
TEST: {EVAL_PERIOD: 5000, DETECTIONS_PER_IMAGE: 100}
"""
# our file -> the released layers, and keys in which ours says it otherwise
FILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ytvis19_r50.yaml": ((), ()),
    "ovis_swinl.yaml": ((OVIS_SWIN,), ()),
    # one frame has no range; large-scale jitter instead of sizes and crops, asked for by the mapper's name
    "coco_r50.yaml": (
        (COCO,),
        ("INPUT.SAMPLING_FRAME_RANGE", "INPUT.DATASET_MAPPER_NAME", "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN",
         "INPUT.CROP", "INPUT.PSEUDO", "DATALOADER.NUM_WORKERS"),
    ),
}  # fmt: skip
# Passes of the detector, whose size changes no result; weights and folders; jitter where it is off.
FREE = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.MASK_FORMER.TEST.WINDOW_SIZE",
    "INPUT.LSJ_AUG.",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.REFERENCE_WORLD_SIZE",  # released files do not say how many GPUs they are for
    "DATASETS.DATASET_RATIO",
)

Load = Callable[..., CfgNode]


@pytest.fixture
def released(tmp_path: Path) -> Load:
    """``released(layer, ..., KEY VALUE ...)`` loads the layers over the base."""

    def load(*layers: str, opts: tuple[str, ...] = ()) -> CfgNode:
        (tmp_path / "released_0.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
        for number, layer in enumerate(layers, start=1):
            text = f"_BASE_: released_{number - 1}.yaml\n{layer}"
            (tmp_path / f"released_{number}.yaml").write_text(text, encoding="utf-8")
        return load_cfg(str(tmp_path / f"released_{len(layers)}.yaml"), opts)

    return load


def plain(node: CfgNode, path: str = "") -> dict[str, Any]:
    """Dotted key -> value; sequences as lists."""
    result: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            result |= plain(value, f"{path}{key}.")
        else:
            result[path + key] = list(value) if isinstance(value, tuple) else value
    return result


@pytest.mark.parametrize("name", sorted(FILES))
def test_our_file_means_what_the_released_one_means(project_root: Path, released: Load, name: str) -> None:
    layers, otherwise = FILES[name]
    ours, theirs = plain(load_cfg(str(project_root / "configs/vita" / name))), plain(released(*layers))
    # read by no part here: the released key was moved
    ours["TEST.DETECTIONS_PER_IMAGE"] = theirs["TEST.DETECTIONS_PER_IMAGE"]
    assert {
        k: (v, theirs[k]) for k, v in ours.items() if v != theirs[k] and not k.startswith((*FREE, *otherwise))
    } == {}


def test_defaults_where_the_yaml_is_silent() -> None:
    tree, messages = translate({"MODEL": {"META_ARCHITECTURE": "Vita"}})
    assert tree["MODEL"] == {
        "META_ARCHITECTURE": "VITA",
        "MASK_FORMER": {"TEST": {"WINDOW_SIZE": 18, "MAX_NUM": 100}},
    }
    assert tree["INPUT"] == {"SAMPLING_FRAME_NUM": 2, "SAMPLING_FRAME_RANGE": 20}
    assert len(messages) == 2


def test_the_number_of_results_moves_for_vita_alone() -> None:
    given = {"MODEL": {"META_ARCHITECTURE": "Vita"}, "TEST": {"DETECTIONS_PER_IMAGE": 20}}
    tree, messages = translate(given)
    assert tree["MODEL"]["MASK_FORMER"]["TEST"]["MAX_NUM"] == 20
    assert "TEST" not in tree
    assert "TEST.DETECTIONS_PER_IMAGE is MODEL.MASK_FORMER.TEST.MAX_NUM here" in messages
    other = {"MODEL": {"META_ARCHITECTURE": "DVIS_online"}, "TEST": {"DETECTIONS_PER_IMAGE": 20}}
    assert translate(other)[0]["TEST"] == {"DETECTIONS_PER_IMAGE": 20}


PUBLISHED = {  # frames, range, last step, iterations, test size, frame queries, results, window
    "coco_swinl.yaml": (1, None, 710184, 737500, 800, 200, 100, 0),
    "ytvis19_r50.yaml": (5, 20, 75000, 140000, 360, 100, 10, 6),
    "ytvis19_r101.yaml": (5, 20, 75000, 140000, 360, 100, 10, 6),
    "ytvis21_swinl.yaml": (6, 8, 100000, 187500, 448, 200, 10, 6),
    "ovis_r50.yaml": (6, 8, 125000, 150000, 360, 100, 20, 6),
    "ytvis22_swinl_challenge.yaml": (6, 8, 100000, 187500, 448, 200, 10, 6),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_our_files_have_the_published_values(project_root: Path, name: str) -> None:
    cfg = load_cfg(str(project_root / "configs/vita" / name))
    frames, reach, *expected = PUBLISHED[name]
    sampling = cfg.INPUT.SAMPLING_FRAME_NUM
    model = cfg.MODEL.MASK_FORMER
    found = [cfg.SOLVER.STEPS[-1], cfg.SOLVER.MAX_ITER, cfg.INPUT.MIN_SIZE_TEST, model.NUM_OBJECT_QUERIES]
    assert [*found, model.TEST.MAX_NUM, cfg.MODEL.VITA.ENC_WINDOW_SIZE] == expected
    assert sampling == frames
    assert reach in (None, cfg.INPUT.SAMPLING_FRAME_RANGE)
    challenge = "challenge" in name
    depths = cfg.MODEL.VITA.ENC_LAYERS, cfg.MODEL.VITA.DEC_LAYERS
    assert depths == ((3, 6) if challenge else (6, 3))
    assert cfg.MODEL.VITA.TEST.CLIP_MODE is challenge
    if challenge:
        assert (cfg.MODEL.VITA.TEST.CLIP_LENGTH, cfg.MODEL.VITA.TEST.CLIP_STRIDE) == (18, 3)
        assert tuple(cfg.DATASETS.TEST) == ("ytvis_2022_val",)
