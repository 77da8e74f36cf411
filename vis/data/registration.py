"""Data sets by name in detectron2's catalogs: files are looked for when a data set is used, not at registration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Importing any module of detectron2.data also registers detectron2's own data sets (coco_2017_train and others).
from detectron2.data.catalog import DatasetCatalog, Metadata, MetadataCatalog

from vis.config import closest
from vis.data.categories import Categories, class_colors, class_names, contiguous_ids
from vis.data.paths import first_existing
from vis.data.problems import DatasetError, ProblemLog
from vis.data.ytvis_format import Expected, Record, load_ytvis_json, read_categories, read_json


@dataclass(frozen=True)
class VideoDataset:
    """A data set as it is registered; calling it loads its records.

    Args:
        name: the name it is registered under.
        json_files: candidates for the annotation file, absolute or relative to ``DETECTRON2_DATASETS``; the first that
            exists is used.
        image_roots: candidates for the folder of the frames.
        file_format: ``"ytvis"`` or ``"coco"``.
        split: ``"train"`` (annotations must be there), ``"val"``, ``"test"`` or "" (nothing is known).
        categories: known beforehand, or None: those of the json.
        coco_map: (COCO id, id in ``categories``) pairs, see :class:`vis.data.ytvis_format.Expected`.
        videos: ids of the videos that belong to it, or None: all of the json.
    """

    name: str
    json_files: tuple[str, ...]
    image_roots: tuple[str, ...]
    file_format: str = "ytvis"
    split: str = ""
    categories: Categories | None = None
    coco_map: tuple[tuple[int, int], ...] | None = None
    videos: tuple[int, ...] | None = None

    @property
    def json_file(self) -> str:
        """The annotation file. Raises FileNotFoundError with all candidates where none exists."""
        return first_existing(self.json_files, what="annotation file", name=self.name, folder=False)

    @property
    def image_root(self) -> str:
        """The folder of the frames. Raises FileNotFoundError with all candidates where none exists."""
        return first_existing(self.image_roots, what="image folder", name=self.name, folder=True)

    @property
    def expected(self) -> Expected:
        """What its json must agree with."""
        coco_map = dict(self.coco_map) if self.coco_map is not None else None
        return Expected(categories=self.categories, coco_map=coco_map, annotated=self.split == "train")

    def known_categories(self) -> Categories:
        """The categories: those known beforehand, else those of the json (which then must exist)."""
        if self.categories is not None:
            return self.categories
        path = self.json_file
        status = os.stat(path)
        return _categories_of(path, status.st_mtime_ns, status.st_size)

    def __call__(self) -> list[Record]:
        """Reads the records; see :func:`vis.data.ytvis_format.load_ytvis_json`."""
        records = load_ytvis_json(
            self.json_file,
            self.image_root,
            dataset_name=self.name,
            file_format=self.file_format,
            expected=self.expected,
        )
        return records if self.videos is None else self._chosen(records, self.videos)

    def _chosen(self, records: list[Record], videos: tuple[int, ...]) -> list[Record]:
        unknown = sorted(set(videos) - {record["video_id"] for record in records})
        if unknown:
            ids = ", ".join(str(record["video_id"]) for record in records[:10]) + (", ..." if len(records) > 10 else "")
            raise ValueError(f"data set {self.name!r}: video {unknown[0]} is not in {self.json_file}; it has {ids}")
        return [record for record in records if record["video_id"] in videos]


class VideoMetadata(Metadata):
    """detectron2's metadata, with what depends on files on disk worked out when it is asked for."""

    dataset: VideoDataset

    @property
    def json_file(self) -> str:
        """The annotation file; FileNotFoundError where it is not on disk."""
        return self.dataset.json_file

    @property
    def image_root(self) -> str:
        """The folder of the frames; FileNotFoundError where it is not on disk."""
        return self.dataset.image_root

    @property
    def thing_classes(self) -> list[str]:
        """Class names in the order of the contiguous ids."""
        return class_names(self.dataset.known_categories())

    @property
    def thing_dataset_id_to_contiguous_id(self) -> dict[int, int]:
        """Category id of the data set -> contiguous class."""
        return contiguous_ids(self.dataset.known_categories())

    @property
    def thing_colors(self) -> list[tuple[int, int, int]]:
        """One RGB colour per class."""
        return class_colors(len(self.dataset.known_categories()))

    @property
    def video_ids(self) -> tuple[int, ...] | None:
        """Ids of the videos of the json that belong to the data set, None where all do: evaluation counts no other."""
        return self.dataset.videos

    def as_dict(self) -> dict[str, Any]:
        """All of it as a dict; needs the files of the data set."""
        names = ("json_file", "image_root", "thing_classes", "thing_dataset_id_to_contiguous_id", "thing_colors")
        return {**super().as_dict(), **{name: getattr(self, name) for name in names}}


def register(dataset: VideoDataset) -> None:
    """Registers a data set under its name; doing it again with the same values is fine.

    Raises:
        ValueError: the name is taken by another data set.
    """
    taken = registered(dataset.name)
    if taken == dataset:
        return
    if taken is not None:
        raise ValueError(
            f"data set {dataset.name!r} is already registered with other values ({_differing(taken, dataset)}); "
            "choose another name"
        )
    if dataset.name in DatasetCatalog:
        raise ValueError(
            f"data set {dataset.name!r} is already registered by other code (detectron2 or another project); "
            "choose another name"
        )
    DatasetCatalog.register(dataset.name, dataset)
    MetadataCatalog[dataset.name] = VideoMetadata(
        name=dataset.name, dataset=dataset, evaluator_type="ytvis", split=dataset.split
    )


def registered(name: str) -> VideoDataset | None:
    """The video data set of a name, or None where there is none."""
    loader = DatasetCatalog.data.get(name)  # the catalog's own get() would load the data set
    return loader if isinstance(loader, VideoDataset) else None


def get_dataset(name: str) -> VideoDataset:
    """The video data set of a name.

    Where detectron2 holds the name for image records (``coco_2017_train``), ours with ``_video`` at its end is meant.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    dataset = registered(name) or registered(f"{name}_video")
    if dataset is not None:
        return dataset
    known = [known for known in DatasetCatalog.list() if registered(known) is not None]
    if name in DatasetCatalog:
        raise ValueError(
            f"data set {name!r} is registered by other code and its records are not videos; register its json under "
            "another name with DATASETS.CUSTOM"
        )
    raise ValueError(
        f"unknown data set {name!r}.{closest(name, known)} A data set of your own is registered with DATASETS.CUSTOM; "
        "datasets/README.md lists the known ones"
    )


def class_names_of(names: Sequence[str]) -> list[str]:
    """The classes that several data sets share, in contiguous order.

    Raises:
        ValueError: no name was given, a name is unknown, or the data sets have different classes.
    """
    if not names:
        raise ValueError("no data set was named: set DATASETS.TRAIN or DATASETS.TEST")
    classes = {name: class_names(get_dataset(name).known_categories()) for name in names}
    first = names[0]
    for name in names[1:]:
        if classes[name] != classes[first]:
            raise ValueError(
                f"data sets used together must have the same classes: {first!r} has {_classes(classes[first])}, "
                f"{name!r} has {_classes(classes[name])}. Use data sets of one kind, or bring their json to one list"
            )
    return classes[first]


def num_classes_of(name: str) -> int:
    """Number of classes of a data set; opens its json only where its categories are not known beforehand.

    Raises:
        ValueError: the name is unknown, or the json is not valid.
        FileNotFoundError: the json is needed and does not exist.
    """
    return len(get_dataset(name).known_categories())


@lru_cache(maxsize=64)
def _categories_of(json_file: str, _mtime: int, _size: int) -> Categories:
    log = ProblemLog()
    tree = read_json(json_file, log)
    categories = read_categories(tree, log) if tree is not None else ()
    if log.errors:
        raise DatasetError(json_file, log.errors, log.error_count)
    return categories


def _differing(one: VideoDataset, other: VideoDataset) -> str:
    pairs = ((key, value, getattr(other, key)) for key, value in vars(one).items())
    return "; ".join(f"{key}: {before!r}, now {now!r}" for key, before, now in pairs if before != now)


def _classes(names: list[str]) -> str:
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} ({listed})"
