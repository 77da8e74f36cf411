"""Released yaml trees of DVIS and DVIS++: they load as they are and mean what our own files mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vis.config import CfgNode
from vis.config.compat import MOVED_KEYS, translate
from vis.engine import load_cfg

# All keys of the released segmenter files with the values of OVIS, R50, in an arrangement of our own; tuples are
# written as the strings that yaml makes of them.
BASE: dict[str, Any] = yaml.safe_load("""
MODEL:
  WEIGHTS: model_final_3c8ec9.pkl
  META_ARCHITECTURE: MinVIS
  MASK_ON: True
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 50, STEM_TYPE: basic, STEM_OUT_CHANNELS: 64, STRIDE_IN_1X1: False, RES5_MULTI_GRID: [1, 1, 1],
            OUT_FEATURES: [res2, res3, res4, res5]}
  SEM_SEG_HEAD: {NAME: MaskFormerHead, PIXEL_DECODER_NAME: MSDeformAttnPixelDecoder, NUM_CLASSES: 25, NORM: GN,
                 IGNORE_VALUE: 255, LOSS_WEIGHT: 1.0, MASK_DIM: 256, CONVS_DIM: 256, COMMON_STRIDE: 4,
                 TRANSFORMER_ENC_LAYERS: 6, IN_FEATURES: [res2, res3, res4, res5],
                 DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: [res3, res4, res5]}
  MASK_FORMER: {TRANSFORMER_DECODER_NAME: VideoMultiScaleMaskedTransformerDecoder_minvis,
                TRANSFORMER_IN_FEATURE: multi_scale_pixel_decoder, DEEP_SUPERVISION: True, NO_OBJECT_WEIGHT: 0.1,
                CLASS_WEIGHT: 2.0, MASK_WEIGHT: 5.0, DICE_WEIGHT: 5.0, HIDDEN_DIM: 256, NUM_OBJECT_QUERIES: 100,
                NHEADS: 8, DROPOUT: 0.0, DIM_FEEDFORWARD: 2048, ENC_LAYERS: 0, PRE_NORM: False, DEC_LAYERS: 10,
                ENFORCE_INPUT_PROJ: False, SIZE_DIVISIBILITY: 32, TRAIN_NUM_POINTS: 12544, OVERSAMPLE_RATIO: 3.0,
                IMPORTANCE_SAMPLE_RATIO: 0.75,
                TEST: {TASK: vis, WINDOW_SIZE: 3, WINDOW_INFERENCE: True, MAX_NUM: 20, OVERLAP_THRESHOLD: 0.8,
                       OBJECT_MASK_THRESHOLD: 0.8}}
SOLVER: {IMS_PER_BATCH: 8, BASE_LR: 0.0001, STEPS: "(14000,)", MAX_ITER: 20000, WARMUP_FACTOR: 1.0, WARMUP_ITERS: 10,
         WEIGHT_DECAY: 0.05, OPTIMIZER: ADAMW, BACKBONE_MULTIPLIER: 0.1, AMP: {ENABLED: True},
         CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 0.01, NORM_TYPE: 2.0}}
INPUT: {FORMAT: RGB, MIN_SIZE_TRAIN: "(240, 360, 480)", MIN_SIZE_TEST: 360, SAMPLING_FRAME_NUM: 1,
        SAMPLING_FRAME_SHUFFLE: False, MIN_SIZE_TRAIN_SAMPLING: choice_by_clip, RANDOM_FLIP: flip_by_clip,
        AUGMENTATIONS: [], CROP: {ENABLED: False, TYPE: absolute_range, SIZE: "(384, 600)"},
        PSEUDO: {AUGMENTATIONS: [rotation], MIN_SIZE_TRAIN: "(240, 360, 480)", MAX_SIZE_TRAIN: 768,
                 CROP: {ENABLED: False, TYPE: absolute_range, SIZE: "(384, 600)"}},
        LSJ_AUG: {ENABLED: False, IMAGE_SIZE: 768, MIN_SCALE: 0.1, MAX_SCALE: 2.0}}
DATASETS: {DATASET_RATIO: [1.0], DATASET_NEED_MAP: [False], DATASET_TYPE: [video_instance],
           DATASET_TYPE_TEST: [video_instance], TRAIN: '("ovis_train",)', TEST: '("ovis_val",)'}
DATALOADER: {FILTER_EMPTY_ANNOTATIONS: False, NUM_WORKERS: 4}
TEST: {EVAL_PERIOD: 0}
VERSION: 2
""")
JOINT = """
DATASETS: {DATASET_RATIO: [1.0, 1.0], DATASET_NEED_MAP: [True, False], DATASET_TYPE: [image_instance, video_instance],
           TRAIN: '("coco2ovis_train", "ovis_train")'}
DATALOADER: {FILTER_EMPTY_ANNOTATIONS: True}
"""
SIZES = "(320, 352, 392, 416, 448, 480, 512, 544, 576, 608, 640)"
PLUS = f"""
INPUT: {{MIN_SIZE_TRAIN: "{SIZES}", MAX_SIZE_TRAIN: 768, MIN_SIZE_TEST: 480, CROP: {{ENABLED: True}},
         PSEUDO: {{MIN_SIZE_TRAIN: "{SIZES}", CROP: {{ENABLED: True}}}}}}
SOLVER: {{STEPS: "(28000,)", MAX_ITER: 40000}}
"""
PLUS_DECODER = "TRANSFORMER_DECODER_NAME: VideoMultiScaleMaskedTransformerDecoder_dvisPlus, REID_BRANCH: True"
# Name -> layers of yaml over BASE, as the released files are based on one another.
ONLINE = """
MODEL: {META_ARCHITECTURE: DVIS_online,
        MASK_FORMER: {TRANSFORMER_DECODER_NAME: VideoMultiScaleMaskedTransformerDecoder_dvis},
        TRACKER: {DECODER_LAYERS: 6}}
INPUT: {SAMPLING_FRAME_NUM: 5, SAMPLING_FRAME_RANGE: 2}
"""
OFFLINE = """
MODEL: {META_ARCHITECTURE: DVIS_offline, REFINER: {DECODER_LAYERS: 6}}
INPUT: {SAMPLING_FRAME_NUM: 21, SAMPLING_FRAME_RANGE: 10, REVERSE_AGU: True, CROP: {ENABLED: True},
        PSEUDO: {CROP: {ENABLED: True}}}
"""
PLUS_ONLINE = f"""
MODEL: {{META_ARCHITECTURE: DVIS_Plus_online, MASK_FORMER: {{{PLUS_DECODER}}},
         TRACKER: {{NOISE_MODE: wa, NOISE_RATIO: 0.5}}}}
INPUT: {{SAMPLING_FRAME_NUM: 5, SAMPLING_FRAME_RANGE: 2}}
"""
PLUS_OFFLINE = """
MODEL: {META_ARCHITECTURE: DVIS_Plus_offline, REFINER: {USE_CL: False}}
INPUT: {SAMPLING_FRAME_NUM: 15, SAMPLING_FRAME_RANGE: 7, REVERSE_AGU: True}
"""
CTVIS = f"""
MODEL: {{META_ARCHITECTURE: CTMinVIS, MASK_FORMER: {{{PLUS_DECODER}}},
         CL_PLUGIN: {{CL_PLUGIN_NAME: CTCLPlugin, NUM_NEGATIVES: 99, MOMENTUM_EMBED: True, NOISE_EMBED: False}}}}
INPUT: {{SAMPLING_FRAME_NUM: 10, SAMPLING_FRAME_RANGE: 15}}
SOLVER: {{BASE_LR: 0.00005, STEPS: "(12000, 24000)", MAX_ITER: 32000}}
DATALOADER: {{FILTER_EMPTY_ANNOTATIONS: False, NUM_WORKERS: 8}}
"""
# our file -> the released layers
FILES: dict[str, tuple[str, ...]] = {
    "dvis/ovis_segmenter_r50.yaml": (),
    "dvis/ovis_online_r50.yaml": (ONLINE,),
    "dvis/ovis_offline_r50.yaml": (ONLINE, OFFLINE),
    "dvisplus/ovis_online_r50.yaml": (JOINT, PLUS, PLUS_ONLINE),
    "dvisplus/ovis_offline_r50.yaml": (JOINT, PLUS, PLUS_ONLINE, PLUS_OFFLINE),
    "ctvis/ovis_r50.yaml": (JOINT, PLUS, CTVIS),
}


def merged(into: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(into)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., CfgNode]:
    """``released(layer, ..., KEY VALUE ...)`` loads the layers over the base."""

    def load(*layers: str, opts: tuple[str, ...] = ()) -> CfgNode:
        tree = BASE
        for layer in layers:
            tree = merged(tree, yaml.safe_load(layer))
        file = tmp_path / "released.yaml"
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return load_cfg(str(file), opts)

    return load


def leaves(node: CfgNode, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        deeper = leaves(value, f"{path}{key}.") if isinstance(value, CfgNode) else {f"{path}{key}": value}
        found.update(deeper)
    return found


# Mistakes of DVIS' code that its published weights were trained with; large-scale jitter that nobody switches on;
# weights and folders; keys without meaning for one frame or for a method that has no tracker or refiner.
FREE = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.TRACKER.MATCHING",
    "MODEL.CLIP_CRITERION.RELEASED_MATCHER",
    "INPUT.LSJ_AUG.",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.REFERENCE_WORLD_SIZE",  # released files do not say how many GPUs they are for
    "DATASETS.DATASET_RATIO",
)
UNREAD = {
    "MinVIS": ("INPUT.SAMPLING_FRAME_RANGE", "MODEL.MASK_FORMER.TEST.WINDOW_SIZE"),
    "CTVIS": ("MODEL.MASK_FORMER.TEST.WINDOW_SIZE",),
    "DVISOnline": ("MODEL.CLIP_CRITERION.REFINER_CONTRASTIVE",),
    "DVISOffline": (),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_our_file_means_what_the_released_one_means(
    project_root: Path, released: Callable[..., CfgNode], name: str
) -> None:
    ours, theirs = leaves(load_cfg(str(project_root / "configs" / name))), leaves(released(*FILES[name]))
    free = (*FREE, *UNREAD[ours["MODEL.META_ARCHITECTURE"]])
    different = {
        key: (value, theirs[key])
        for key, value in ours.items()
        if value != theirs[key] and not (isinstance(value, (list, tuple)) and list(value) == list(theirs[key]))
    }
    assert {key: pair for key, pair in different.items() if not key.startswith(free)} == {}


def test_released_dvis_is_taken_with_its_mistakes(released: Callable[..., CfgNode], project_root: Path) -> None:
    for layers in ((ONLINE,), (ONLINE, OFFLINE)):
        cfg = released(*layers)
        assert (cfg.MODEL.TRACKER.MATCHING, cfg.MODEL.CLIP_CRITERION.RELEASED_MATCHER) == ("dvis_v1", True)
        assert cfg.MODEL.CLIP_CRITERION.RELEASED_LABELS is False  # its recorded losses are without
    assert released(PLUS_ONLINE).MODEL.TRACKER.MATCHING == "correct"
    assert released(PLUS_ONLINE).MODEL.CLIP_CRITERION.RELEASED_MATCHER is False
    ours = load_cfg(str(project_root / "configs/dvis/ovis_online_r50.yaml"))
    assert (ours.MODEL.TRACKER.MATCHING, ours.MODEL.CLIP_CRITERION.RELEASED_MATCHER) == ("correct", False)
    assert released(ONLINE, opts=("MODEL.TRACKER.MATCHING", "correct")).MODEL.TRACKER.MATCHING == "correct"


def test_defaults_where_the_yaml_is_silent(released: Callable[..., CfgNode]) -> None:
    cfg = released(PLUS_ONLINE.replace("TRACKER: {NOISE_MODE: wa, NOISE_RATIO: 0.5}", "TRACKER: {}"))
    assert cfg.MODEL.TRACKER.NOISE_MODE == "none"
    assert cfg.MODEL.CLIP_CRITERION.TRACKER_CONTRASTIVE is True
    assert released(PLUS_ONLINE).MODEL.TRACKER.NOISE_RATIO == 0.5
    tree = {"MODEL": {"MASK_FORMER": {"TRANSFORMER_DECODER_NAME": "VideoMultiScaleMaskedTransformerDecoder_minvis"}}}
    assert translate(tree)[0]["MODEL"]["MASK_FORMER"]["TEST"] == {"WINDOW_SIZE": 3, "MAX_NUM": 20}


def test_moved_keys(released: Callable[..., CfgNode]) -> None:
    cfg = released(PLUS_ONLINE, opts=("MODEL.TRACKER.USE_CL", "False"))
    assert cfg.MODEL.CLIP_CRITERION.TRACKER_CONTRASTIVE is False
    for old, new in MOVED_KEYS.items():
        nested: Any = True
        for part in reversed(old.split(".")):
            nested = {part: nested}
        tree, messages = translate(nested)
        assert messages == [f"{old} is {new} here"]
        assert translate(tree) == (tree, [])
    both = {"MODEL": {"TRACKER": {"USE_CL": True}, "CLIP_CRITERION": {"TRACKER_CONTRASTIVE": False}}}
    assert translate(both)[0] == {"MODEL": {"CLIP_CRITERION": {"TRACKER_CONTRASTIVE": False}}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.MASK_FORMER.TEST.TASK", "vps"),
        ("DATASETS.DATASET_TYPE", ["image_instance", "video_panoptic"]),
        ("DATASETS.DATASET_TYPE_TEST", ["video_semantic"]),
        ("MODEL.CL_PLUGIN.NOISE_EMBED", True),
        ("MODEL.CL_PLUGIN.CL_PLUGIN_NAME", "CLPlugin"),
    ],
)
def test_other_tasks_are_refused(released: Callable[..., CfgNode], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        released(opts=(key, str(value)))


PUBLISHED = {  # frames, range, iterations, smallest training size, test size, queries, noise, results
    "dvis/ovis_online_swinl_720p.yaml": (5, 2, 20000, 480, 720, 200, "none", 20),
    "dvis/ovis_offline_swinl.yaml": (21, 10, 20000, 360, 480, 200, "none", 20),
    "dvis/ytvis19_online_r50.yaml": (5, 2, 40000, 240, 360, 100, "none", 10),
    "dvis/ytvis21_offline_swinl.yaml": (21, 10, 40000, 360, 480, 200, "none", 10),
    "dvis/ovis_online_vitl.yaml": (5, 2, 40000, 288, 360, 200, "rs", 20),
    "dvis/ytvis21_online_vitl_160k.yaml": (5, 2, 160000, 288, 360, 200, "rs", 10),
    "dvis/ovis_online_r50_noise_cc.yaml": (5, 2, 40000, 240, 360, 100, "cc", 20),
    "dvisplus/ovis_online_r50_160k.yaml": (5, 2, 160000, 320, 480, 100, "wa", 20),
    "dvisplus/ytvis19_online_r50_80k.yaml": (5, 2, 80000, 320, 480, 100, "wa", 10),
    "dvisplus/ytvis21_offline_vitl.yaml": (21, 10, 40000, 320, 480, 200, "wa", 10),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_our_files_have_the_published_values(project_root: Path, name: str) -> None:
    cfg = load_cfg(str(project_root / "configs" / name))
    found = (cfg.INPUT.SAMPLING_FRAME_NUM, cfg.INPUT.SAMPLING_FRAME_RANGE, cfg.SOLVER.MAX_ITER)
    sizes = (min(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES)
    assert (*found, *sizes, cfg.MODEL.TRACKER.NOISE_MODE, cfg.MODEL.MASK_FORMER.TEST.MAX_NUM) == PUBLISHED[name]
    assert tuple(cfg.INPUT.PSEUDO.MIN_SIZE_TRAIN) == tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    assert cfg.SOLVER.IMS_PER_BATCH == 8
    assert list(cfg.SOLVER.STEPS) == [cfg.SOLVER.MAX_ITER * 7 // 10]
