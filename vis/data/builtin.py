"""The known data sets: names, where their files may lie, and their categories.

Importing this module registers them all; no file is touched. datasets/README.md shows the folders. Several places are
tried for each: the archives of the data sets and the projects that use them do not agree on one layout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

from detectron2.data.catalog import DatasetCatalog

from vis.data.categories import (
    COCO,
    COCO_TO_OVIS,
    COCO_TO_YTVIS_2019,
    COCO_TO_YTVIS_2021,
    OVIS,
    YTVIS_2019,
    YTVIS_2021,
    Categories,
    Category,
)
from vis.data.registration import VideoDataset, register, registered
from vis.data.synthetic.presets import CATEGORIES as SYNTHETIC_NAMES

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# A split has different names in the archives: "valid" in most, "val" in some.
_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
_SYNTHETIC: Categories = tuple(Category(number, name) for number, name in enumerate(SYNTHETIC_NAMES, start=1))
# Names of the released code that mean the same data set.
ALIASES: Mapping[str, str] = {
    "ytvis_ovis_train": "ovis_train",
    "ytvis_ovis_val": "ovis_val",
    "ytvis_ovis_test": "ovis_test",
    "ytvis_2022_val_full": "ytvis_2022_val",
}


def _each(folder: str, *patterns: str, split: str) -> tuple[str, ...]:
    """``folder/pattern`` with ``{}`` replaced by every name of the split."""
    return tuple(f"{folder}/{pattern.format(part)}" for part in _FOLDERS[split] for pattern in patterns)


def _ytvis(folder: str, split: str, categories: Categories) -> VideoDataset:
    json_files = _each(folder, "{}.json", "{}/instances.json", "annotations/{}.json", split=split)
    # the first release of 2019 named its files so
    more = (f"{folder}/annotations/instances_{split}_sub.json",) if split != "test" else ()
    if folder == "ytvis_2022" and split == "val":
        more = (f"{folder}/instances.json",)
    return VideoDataset(
        name=f"{folder}_{split}",
        json_files=json_files + more,
        image_roots=_each(folder, "{}/JPEGImages", split=split),
        split=split,
        categories=categories,
    )


def _ovis(split: str) -> VideoDataset:
    patterns = ("annotations/annotations_{}.json", "annotations/{}.json", "annotations_{}.json", "{}.json")
    return VideoDataset(
        name=f"ovis_{split}",
        json_files=_each("ovis", *patterns, split=split),
        # JPEGImages first: where it exists, the folder of the split itself exists too
        image_roots=_each("ovis", "{}/JPEGImages", "{}", "{}_img", split=split),
        split=split,
        categories=OVIS,
    )


def _extra_video() -> Iterator[VideoDataset]:
    """Sets that only single projects have."""
    yield VideoDataset(
        name="ytvis_2019_val_all_frames",
        json_files=("ytvis_2019/valid_all_frames.json",),
        image_roots=("ytvis_2019/valid_all_frames/JPEGImages",),
        split="val",
        categories=YTVIS_2019,
    )
    yield VideoDataset(
        name="ytvis_2022_val_sub",
        json_files=("ytvis_2022/instances_sub.json",),
        image_roots=_each("ytvis_2022", "{}/JPEGImages", split="val"),
        split="val",
        categories=YTVIS_2021,
    )
    # a published division of OVIS' training videos, for development without the server
    for split in ("train", "val"):
        yield VideoDataset(
            name=f"ytvis_ovis_{split}_sub",
            json_files=(f"ovis/ovis_sub_{split}.json",),
            image_roots=("ovis/train/JPEGImages", "ovis/train", "ovis/train_img"),
            split=split,
            categories=OVIS,
        )
    for preset in ("synthetic_ytvis", "synthetic_ovis"):
        for split in ("train", "val"):
            yield VideoDataset(
                name=f"{preset}_{split}",
                json_files=(f"{preset}/{split}.json",),
                image_roots=(f"{preset}/{split}/JPEGImages",),
                split=split,
                categories=_SYNTHETIC,
            )


def _minival(train: VideoDataset) -> Iterator[VideoDataset]:
    """The two parts of a training set that datasets/prepare_minival.py writes beside its json."""
    for part, split in (("minitrain", "train"), ("minival", "val")):
        json_files = tuple(f"{path.removesuffix('.json')}_{part}.json" for path in train.json_files)
        name = f"{train.name.removesuffix('_train')}_{part}"
        yield replace(train, name=name, json_files=json_files, split=split)


def _coco() -> Iterator[VideoDataset]:
    """COCO's images as videos of one frame, with COCO's own classes and with those of the video data sets.

    detectron2 registers ``coco_2017_train`` for itself, with records of another kind: ours end in ``_video``.
    """
    targets = (
        ("coco2ytvis2019", YTVIS_2019, COCO_TO_YTVIS_2019),
        ("coco2ytvis2021", YTVIS_2021, COCO_TO_YTVIS_2021),
        ("coco2ytvis2022", YTVIS_2021, COCO_TO_YTVIS_2021),  # the same classes
        ("coco2ovis", OVIS, COCO_TO_OVIS),
    )
    for split in ("train", "val"):
        original = f"coco/annotations/instances_{split}2017.json"
        images = (f"coco/{split}2017",)
        yield VideoDataset(f"coco_2017_{split}_video", (original,), images, "coco", split, COCO)
        for name, categories, coco_map in targets:
            # COCO's own json serves as well: the map is applied when it is read
            json_files = (f"coco/annotations/{name}_{split}.json", original)
            pairs = tuple(coco_map.items())
            yield VideoDataset(f"{name}_{split}", json_files, images, "coco", split, categories, pairs)


def builtin_datasets() -> dict[str, VideoDataset]:
    """Every known data set by name, aliases included."""
    datasets = [_ytvis("ytvis_2019", split, YTVIS_2019) for split in SPLITS]
    datasets += [_ytvis("ytvis_2021", split, YTVIS_2021) for split in SPLITS]
    datasets += [_ytvis("ytvis_2022", split, YTVIS_2021) for split in ("val", "test")]
    datasets += [_ovis(split) for split in SPLITS]
    for train in (_ytvis("ytvis_2019", "train", YTVIS_2019), _ytvis("ytvis_2021", "train", YTVIS_2021), _ovis("train")):
        datasets += _minival(train)
    datasets += [*_extra_video(), *_coco()]
    return {dataset.name: dataset for dataset in datasets}


def register_builtin() -> None:
    """Registers the known data sets and their aliases; names that other code has taken before are left to it."""
    datasets = builtin_datasets()
    aliases = {alias: replace(datasets[name], name=alias) for alias, name in ALIASES.items()}
    for name, dataset in {**datasets, **aliases}.items():
        if name in DatasetCatalog and registered(name) is None:
            logger.warning(
                "data set %r was registered by other code before vis was imported and stays as it is; "
                "vis cannot train or evaluate on it under this name",
                name,
            )
        else:
            register(dataset)


register_builtin()
