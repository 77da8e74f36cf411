"""Names and keys of released yaml files: what they mean here.

:func:`translate` is applied to the nested dict of a yaml file (and to the command line) before keys are checked. It

* replaces released class names by ours (:data:`VALUE_ALIASES`) and moves keys (:data:`MOVED_KEYS`),
* takes out keys that have nothing to steer here and says why (:data:`UNUSED_KEYS`); a value that asks for behaviour
  that does not exist here is an error, never ignored,
* fills in defaults of the release that its yaml files rely on without naming them (:data:`RELEASED_DEFAULTS`).

Names of data sets are not its business: their aliases are registered beside the data sets in ``vis.data``.

Covered: Mask2Former (instance segmentation of COCO images), MinVIS, DVIS and DVIS++ with its CTVIS segmenter, VITA,
IDOL. Another release is one more row in each table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]

#: Dotted key -> {released value: our value}.
VALUE_ALIASES: dict[str, dict[str, str]] = {
    "MODEL.META_ARCHITECTURE": {
        "VideoMaskFormer_frame": "MinVIS",
        # The image model is the same network: a video model that sees clips of one frame.
        "MaskFormer": "MinVIS",
        "DVIS_online": "DVISOnline",
        "DVIS_offline": "DVISOffline",
        # What DVIS++ changed are options of the parts: see RELEASED_DEFAULTS.
        "DVIS_Plus_online": "DVISOnline",
        "DVIS_Plus_offline": "DVISOffline",
        "CTMinVIS": "CTVIS",
        "Vita": "VITA",
    },
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": {
        "VideoMultiScaleMaskedTransformerDecoder_frame": "MultiScaleMaskedTransformerDecoder",
        "VideoMultiScaleMaskedTransformerDecoder_minvis": "MultiScaleMaskedTransformerDecoder",
        "VideoMultiScaleMaskedTransformerDecoder_dvis": "MultiScaleMaskedTransformerDecoder",
        "VideoMultiScaleMaskedTransformerDecoder_dvisPlus": "MultiScaleMaskedTransformerDecoder",
        "VitaMultiScaleMaskedTransformerDecoder": "MultiScaleMaskedTransformerDecoder",
    },
}

#: Released dotted key -> ours.
MOVED_KEYS: dict[str, str] = {
    "MODEL.TRACKER.USE_CL": "MODEL.CLIP_CRITERION.TRACKER_CONTRASTIVE",
    "MODEL.REFINER.USE_CL": "MODEL.CLIP_CRITERION.REFINER_CONTRASTIVE",
    "MODEL.VITA.TEST_RUN_CHUNK_SIZE": "MODEL.MASK_FORMER.TEST.WINDOW_SIZE",
    "MODEL.IDOL.NUM_CLASSES": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "MODEL.IDOL.BATCH_INFER_LEN": "MODEL.MASK_FORMER.TEST.WINDOW_SIZE",
    "INPUT.COCO_PRETRAIN": "INPUT.COCO_PAIRS",
}

#: Released name of the meta-architecture -> keys that only its release read, and ours.
MOVED_KEYS_OF: dict[str, dict[str, str]] = {
    "Vita": {"TEST.DETECTIONS_PER_IMAGE": "MODEL.MASK_FORMER.TEST.MAX_NUM"},
}

_DVIS_TESTS: dict[str, Any] = {
    "INPUT.SAMPLING_FRAME_RANGE": 20,
    "MODEL.MASK_FORMER.TEST.WINDOW_SIZE": 3,
    "MODEL.MASK_FORMER.TEST.MAX_NUM": 20,
}
# As its code works, mistakes included. MODEL.CLIP_CRITERION.RELEASED_LABELS, a mistake of its data mapper, is not among
# them: the losses of the released code are those without it.
_DVIS: dict[str, Any] = {
    **_DVIS_TESTS,
    "MODEL.TRACKER.NOISE_MODE": "none",
    "MODEL.TRACKER.MATCHING": "dvis_v1",
    "MODEL.CLIP_CRITERION.RELEASED_MATCHER": True,
}
_DVIS_PLUS: dict[str, Any] = {
    **_DVIS_TESTS,
    "MODEL.MASK_FORMER.REID_BRANCH": True,
    "MODEL.TRACKER.RAW_EMBEDS": True,
    "MODEL.TRACKER.REFERENCE_PROJ": True,
    "MODEL.TRACKER.MASK_FEATURE_PROJ": True,
    "MODEL.TRACKER.NOISE_MODE": "none",
    "MODEL.TRACKER.NOISE_RATIO": 0.5,
    "MODEL.TRACKER.NOISE_BASE": "unmatched",
    "MODEL.TRACKER.NOISE_PARTNER": "permutation",
    "MODEL.CLIP_CRITERION.TRACKER_CONTRASTIVE": True,
    "MODEL.CLIP_CRITERION.REFINER_CONTRASTIVE": True,
}

#: Released name (of the meta-architecture, or of the decoder where only that tells the release) -> {dotted key: value}
#: that its own code supplied where the yaml is silent.
RELEASED_DEFAULTS: dict[str, dict[str, Any]] = {
    "VideoMultiScaleMaskedTransformerDecoder_minvis": _DVIS_TESTS,
    "DVIS_online": _DVIS,
    "DVIS_offline": _DVIS,
    "DVIS_Plus_online": _DVIS_PLUS,
    "DVIS_Plus_offline": _DVIS_PLUS,
    "CTMinVIS": {**_DVIS_TESTS, "MODEL.MASK_FORMER.REID_BRANCH": True},
    "Vita": {
        "INPUT.SAMPLING_FRAME_NUM": 2,
        "INPUT.SAMPLING_FRAME_RANGE": 20,
        "MODEL.MASK_FORMER.TEST.WINDOW_SIZE": 18,
        "MODEL.MASK_FORMER.TEST.MAX_NUM": 100,
    },
    "VideoMaskFormer_frame": {
        "INPUT.SAMPLING_FRAME_RANGE": 20,
        "INPUT.SAMPLING_FRAME_SHUFFLE": False,
        "INPUT.SAMPLING_FRAME_RATIO": 1.0,
        # Constants in the released code: 30 frames a window, the ten best results of a video.
        "MODEL.MASK_FORMER.TEST.WINDOW_SIZE": 30,
        "MODEL.MASK_FORMER.TEST.MAX_NUM": 10,
    },
    "MaskFormer": {
        "INPUT.SAMPLING_FRAME_NUM": 1,
        # The image model reports TEST.DETECTIONS_PER_IMAGE results, 100 where nothing else is said.
        "MODEL.MASK_FORMER.TEST.MAX_NUM": 100,
        "MODEL.MASK_FORMER.TEST.MASK_SCORE": True,
    },
}


@dataclass(frozen=True)
class Unused:
    """A released key that steers nothing here.

    Attributes:
        reason: why, in words for a user.
        allowed: the values that ask for what happens here anyway; None where no value has an effect.
        each: the value is a list, whose items must be among ``allowed``.
    """

    reason: str
    allowed: tuple[Any, ...] | None = None
    each: bool = False


_OTHER_TASKS = "belongs to semantic and panoptic segmentation of images; results here are instances in video"
_STEM = "belongs to DeepLab's ResNet; the ResNet here is detectron2's, whose stem and last stage are these"
_IMAGE_MAPPERS = "was read by the mappers of semantic segmentation only"
_HEAD = "was read by no released video model"
_DATA = "is known from the data set itself: its file says what it holds, and classes are mapped by their names"
_CTVIS = "belongs to studies of CTVIS that no released video model used"
_VITA = "was read by no released VITA"
_VITA_MASKS = "set how many frames' masks are made together; here it is one, whatever the result"
_ENCODER = "steers the transformer of the first MaskFormer; here the encoder is in the pixel decoder"

_IDOL = "was read by nothing in the release of IDOL that had an effect"
_IDOL_MEMORY = "moved masks off the device; here they are encoded frame by frame"
_IDOL_PAIRS = "gave both frames of a pair of COCO the same window, which no released training did"

#: Dotted key -> why it is accepted without effect.
UNUSED_KEYS: dict[str, Unused] = {
    "MODEL.RESNETS.STEM_TYPE": Unused(_STEM, ("basic",)),
    "MODEL.RESNETS.RES5_MULTI_GRID": Unused(_STEM, ([1, 1, 1],)),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": Unused(_HEAD),
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": Unused(_HEAD),
    "MODEL.MASK_FORMER.ENC_LAYERS": Unused(_ENCODER, (0,)),
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": Unused(_ENCODER, ("multi_scale_pixel_decoder",)),
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": Unused(_OTHER_TASKS, (False,)),
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": Unused(_OTHER_TASKS, (True,)),
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": Unused(_OTHER_TASKS, (False,)),
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": Unused(_OTHER_TASKS),
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": Unused(_OTHER_TASKS),
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": Unused(_OTHER_TASKS),
    "MODEL.MASK_FORMER.TEST.TASK": Unused(_OTHER_TASKS, ("vis",)),
    "MODEL.SEM_SEG_HEAD.RETURN_TRANSFORMER_FEATURE": Unused(_HEAD, (False,)),
    "MODEL.MASK_FORMER.REID_HIDDEN_DIM": Unused(_HEAD, (256,)),
    "MODEL.MASK_FORMER.NUM_REID_HEAD_LAYERS": Unused(_HEAD, (3,)),
    "MODEL.CL_PLUGIN.CL_PLUGIN_NAME": Unused(_CTVIS, ("CTCLPlugin",)),
    "MODEL.CL_PLUGIN.FUSION_LOSS": Unused(_CTVIS, (False,)),
    "MODEL.CL_PLUGIN.BIO_CL": Unused(_CTVIS, (False,)),
    "MODEL.CL_PLUGIN.ONE_DIRECTION": Unused(_CTVIS, (True,)),
    "MODEL.CL_PLUGIN.NOISE_EMBED": Unused(_CTVIS, (False,)),
    "MODEL.VITA.MULTI_CLS_ON": Unused(_VITA),
    "MODEL.VITA.APPLY_CLS_THRES": Unused(_VITA),
    "MODEL.VITA.TEST_INTERPOLATE_CHUNK_SIZE": Unused(_VITA_MASKS),
    "DATASETS.DATASET_NEED_MAP": Unused(_DATA),
    "DATASETS.DATASET_TYPE": Unused(_DATA, ("video_instance", "image_instance"), each=True),
    "DATASETS.DATASET_TYPE_TEST": Unused(_DATA, ("video_instance",), each=True),
    "INPUT.COLOR_AUG_SSD": Unused(_IMAGE_MAPPERS, (False,)),
    "INPUT.SIZE_DIVISIBILITY": Unused(_IMAGE_MAPPERS),
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": Unused(_IMAGE_MAPPERS),
    "MODEL.IDOL.SET_COST_CLASS": Unused(_IDOL),
    "MODEL.IDOL.SET_COST_BOX": Unused(_IDOL),
    "MODEL.IDOL.SET_COST_GIOU": Unused(_IDOL),
    "MODEL.IDOL.MATCH_STRIDE": Unused(_IDOL),
    "MODEL.IDOL.CLIP_STRIDE": Unused(_IDOL),
    "MODEL.IDOL.MASK_STRIDE": Unused("is fixed: masks are predicted and compared at this stride", (4,)),
    "MODEL.IDOL.MERGE_ON_CPU": Unused(_IDOL_MEMORY),
    "FIND_UNUSED_PARAMETERS": Unused(_IDOL),
    "INPUT.PRETRAIN_SAME_CROP": Unused(_IDOL_PAIRS, (False,)),
}


def translate(tree: Mapping[str, Any]) -> tuple[Tree, list[str]]:
    """Give a released (or our own) yaml tree the names of this project.

    Args:
        tree: nested dict of upper-case keys, as read from yaml and merged over its bases. It is not changed.

    Returns:
        A new tree, and lines for the log, one per kind of change. A tree in our own names comes back equal, with none.

    Raises:
        ValueError: a released key has a value that asks for something that does not exist here.
    """
    result = _copy(tree)
    return result, [*_move_keys(result), *_rename_values(result), *_drop_unused(result)]


def _move_keys(tree: Tree, moved: Mapping[str, str] = MOVED_KEYS) -> list[str]:
    messages = []
    for released, ours in moved.items():
        value = _get(tree, released)
        if value is None:
            continue
        _remove(tree, released)
        if _get(tree, ours) is None:
            _set(tree, ours, value)
        messages.append(f"{released} is {ours} here")
    return messages


def _rename_values(tree: Tree) -> list[str]:
    messages = []
    for key, aliases in VALUE_ALIASES.items():
        released = _get(tree, key)
        if not isinstance(released, str) or released not in aliases:
            continue
        _set(tree, key, aliases[released])
        messages.append(f"{key}: the released name {released!r} is {aliases[released]!r} here")
        messages += _move_keys(tree, MOVED_KEYS_OF.get(released, {}))
        messages += _fill_defaults(tree, released)
    return messages


def _fill_defaults(tree: Tree, released: str) -> list[str]:
    missing = {key: value for key, value in RELEASED_DEFAULTS.get(released, {}).items() if _get(tree, key) is None}
    for key, value in missing.items():
        _set(tree, key, value)
    filled = ", ".join(f"{key} {value}" for key, value in missing.items())
    return [f"defaults of the release that the yaml does not name: {filled}"] if missing else []


def _drop_unused(tree: Tree) -> list[str]:
    dropped: dict[str, list[str]] = {}
    for key, unused in UNUSED_KEYS.items():
        value = _get(tree, key)
        if value is None:
            continue
        if not _is_allowed(unused, value):
            expected = " or ".join(repr(item) for item in unused.allowed or ())
            raise ValueError(
                f"{key} is {value!r}, but only {expected} can be had here: the key {unused.reason}. "
                "Remove the key or set it so."
            )
        _remove(tree, key)
        dropped.setdefault(unused.reason, []).append(key)
    return [f"accepted and not used: {', '.join(keys)} ({reason})" for reason, keys in dropped.items()]


def _is_allowed(unused: Unused, value: Any) -> bool:
    if unused.allowed is None:
        return True
    items = value if unused.each and isinstance(value, (list, tuple)) else [value]
    return all(_plain(item) in [_plain(allowed) for allowed in unused.allowed] for item in items)


def _plain(value: Any) -> Any:
    """Sequences as tuples, truth values apart from numbers: ``[1]`` equals ``(1,)``, ``True`` does not equal ``1``."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(item) for item in value)
    return (type(value), value) if isinstance(value, bool) else value


def _copy(tree: Mapping[str, Any]) -> Tree:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _get(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _set(tree: Tree, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):  # the check of keys, which comes after this, says what is wrong with the tree
            return
        node = child
    node[leaf] = value


def _remove(tree: Tree, key: str) -> None:
    """Delete ``key`` and the groups that are empty without it."""
    *parents, leaf = key.split(".")
    nodes = [tree]
    for part in parents:
        nodes.append(nodes[-1][part])
    del nodes[-1][leaf]
    for part, parent, child in reversed(list(zip(parents, nodes, nodes[1:], strict=False))):
        if not child:
            del parent[part]
