"""Video data: data set formats and names, clip mappers, transforms, samplers, loaders."""

from __future__ import annotations

from vis.data.builtin import ALIASES, builtin_datasets, register_builtin
from vis.data.custom import register_custom
from vis.data.loaders import build_test_loader, build_train_loader
from vis.data.paths import datasets_root
from vis.data.problems import DatasetError, Problem
from vis.data.registration import VideoDataset, class_names_of, get_dataset, num_classes_of
from vis.data.ytvis_check import DatasetReport, check_ytvis_json
from vis.data.ytvis_format import load_ytvis_json

__all__ = [
    "ALIASES",
    "DatasetError",
    "DatasetReport",
    "Problem",
    "VideoDataset",
    "build_test_loader",
    "build_train_loader",
    "builtin_datasets",
    "check_ytvis_json",
    "class_names_of",
    "datasets_root",
    "get_dataset",
    "load_ytvis_json",
    "num_classes_of",
    "register_builtin",
    "register_custom",
]
