"""A user's own data sets, from yaml alone.

    DATASETS:
      CUSTOM:
        - NAME: my_train
          JSON: my_data/train.json          # absolute, or relative to DETECTRON2_DATASETS; ~ and $VARIABLES work
          ROOT: my_data/frames              # the folder that file_names in the json are relative to
          SPLIT: train                      # optional: train (annotations must be there), val, test
          FORMAT: ytvis                     # optional: ytvis (default) or coco (every image a video of one frame)
          VIDEOS: [3, 5, 8]                 # optional: only the videos of these ids, to divide one json by video
      TRAIN: ("my_train",)

Categories, and with them NUM_CLASSES, come from the json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vis.config import CfgNode, closest, declare
from vis.data.builtin import builtin_datasets
from vis.data.registration import VideoDataset, class_names_of, num_classes_of, register
from vis.data.ytvis_format import FORMATS

__all__ = ["add_config", "class_names_of", "num_classes_of", "register_custom"]

_REQUIRED = ("NAME", "JSON", "ROOT")
_TEXTS = (*_REQUIRED, "SPLIT", "FORMAT")
_KEYS = (*_TEXTS, "VIDEOS")
_SPLITS = ("train", "val", "test")


@declare
def add_config(cfg: CfgNode) -> None:
    """``DATASETS.CUSTOM``: data sets to register, a list of {NAME, JSON, ROOT, SPLIT, FORMAT, VIDEOS}."""
    cfg.DATASETS.CUSTOM = []


def register_custom(cfg: CfgNode) -> list[str]:
    """Registers the data sets of ``DATASETS.CUSTOM``; no file is opened. Again with the same values is fine.

    Returns:
        Their names.

    Raises:
        ValueError: an entry lacks a key, has an unknown one or a wrong value, or its name is taken.
    """
    names = []
    for index, entry in enumerate(cfg.DATASETS.CUSTOM):
        dataset = _dataset(entry, f"DATASETS.CUSTOM[{index}]")
        if dataset.name in names:
            raise ValueError(
                f"DATASETS.CUSTOM[{index}] has the name {dataset.name!r} of an entry before it; rename one"
            )
        register(dataset)
        names.append(dataset.name)
    return names


def _dataset(entry: Any, place: str) -> VideoDataset:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place} must be {{NAME: ..., JSON: ..., ROOT: ...}}, found {entry!r}")
    for key in entry:
        if key not in _KEYS:
            raise ValueError(
                f"{place} has the unknown key {key!r}.{closest(str(key), _KEYS)} Known: {', '.join(_KEYS)}"
            )
    for key in _TEXTS:
        if key in _REQUIRED and key not in entry:
            raise ValueError(f"{place} lacks the key {key}; it needs {', '.join(_REQUIRED)}")
        if not isinstance(entry.get(key, ""), str) or (key in _REQUIRED and not entry[key].strip()):
            raise ValueError(f"{place}: {key} must be a text that is not empty, found {entry[key]!r}")
    split, file_format = entry.get("SPLIT", ""), entry.get("FORMAT", "ytvis")
    if split and split not in _SPLITS:
        raise ValueError(f"{place}: SPLIT {split!r} is not one of {', '.join(_SPLITS)}.{closest(split, _SPLITS)}")
    if file_format not in FORMATS:
        raise ValueError(f"{place}: FORMAT {file_format!r} is not one of {', '.join(FORMATS)}")
    name = entry["NAME"]
    if name in builtin_datasets():
        raise ValueError(f"{place}: the name {name!r} belongs to a known data set; choose another")
    videos = entry.get("VIDEOS")
    if videos is not None:
        good = isinstance(videos, (list, tuple)) and videos and all(type(video) is int for video in videos)
        if not good or len(set(videos)) != len(videos):
            raise ValueError(f"{place}: VIDEOS must be a list of different video ids, found {videos!r}")
        videos = tuple(sorted(videos))
    return VideoDataset(name, (entry["JSON"],), (entry["ROOT"],), file_format, split, videos=videos)
