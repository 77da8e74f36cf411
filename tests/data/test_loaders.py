"""Loaders: the same batches with any number of workers, from any iteration; frames of a test video one at a time."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from vis.config import CfgNode, get_cfg
from vis.data.frame_reader import LazyFrames, frame_source
from vis.data.loaders import VideoLoader, build_test_loader, build_train_loader
from vis.structures import ClipSample

MakeRecord = Callable[..., dict[str, Any]]
Register = Callable[[str, list[dict[str, Any]], list[str]], None]
CLASSES = ["cat", "giant panda"]


@pytest.fixture
def register() -> Iterator[Register]:
    """Registers records for one test."""
    names = []

    def add(name: str, records: list[dict[str, Any]], classes: list[str]) -> None:
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=classes)
        names.append(name)

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def cfg(register: Register, make_record: MakeRecord) -> CfgNode:
    """A training configuration over five small videos of both orientations, the last without instances."""
    track, other = [(4, 6, 20, 19)] * 4, [(9, 2, 27, 24), None, None, (1, 1, 9, 9)]
    records = [
        make_record(number, (30, 44) if number % 2 else (44, 30), [track, other] if number < 5 else [[None] * 4])
        for number in range(1, 6)
    ]
    register("toy_train", records, CLASSES)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("toy_train",)
    cfg.INPUT.SAMPLING_FRAME_NUM = 3
    cfg.INPUT.SAMPLING_FRAME_RANGE = 1
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 32)
    cfg.INPUT.MIN_SIZE_TEST = 22
    cfg.INPUT.AUGMENTATIONS = ["brightness", "rotation"]
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def take(cfg: CfgNode, count: int, start_iter: int = 0, workers: int = 0) -> list[list[ClipSample]]:
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = workers
    return list(islice(build_train_loader(cfg, start_iter=start_iter), count))


def flat(batches: list[list[ClipSample]]) -> list[Any]:
    """Everything in the batches, in a form that can be compared."""
    result: list[Any] = []
    for batch in batches:
        for sample in batch:
            result.append([value for key, value in sample.items() if key not in ("image", "instances")])
            result.extend(frame.tolist() for frame in sample["image"])
            for frame in sample["instances"]:
                masks, boxes = frame.gt_masks.tensor, frame.gt_boxes.tensor
                result.extend(part.tolist() for part in (masks, boxes, frame.gt_ids, frame.gt_classes))
    return result


def test_workers_and_resuming_do_not_change_the_batches(cfg: CfgNode) -> None:
    random_state = torch.get_rng_state()
    whole = flat(take(cfg, 6))
    assert whole == flat(take(cfg, 6, workers=2))
    assert flat(take(cfg, 2, start_iter=4)) == flat(take(cfg, 6)[4:])
    assert flat(take(cfg, 2, start_iter=4, workers=2)) == flat(take(cfg, 6)[4:])
    assert torch.equal(torch.get_rng_state(), random_state)
    cfg.SEED = 43
    assert whole != flat(take(cfg, 6))


def test_batches_have_one_orientation(cfg: CfgNode) -> None:
    for batch in take(cfg, 12):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1
    assert all(len(sample["image"]) == len(sample["instances"]) == 3 for sample in batch)


def test_videos_without_instances(cfg: CfgNode) -> None:
    assert {sample["video_id"] for batch in take(cfg, 20) for sample in batch} == {1, 2, 3, 4}
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    samples = [sample for batch in take(cfg, 20) for sample in batch]
    assert {len(sample["instances"][0]) for sample in samples if sample["video_id"] == 5} == {0}


def test_errors_of_workers_arrive(cfg: CfgNode) -> None:
    for record in DatasetCatalog.get("toy_train"):
        Path(record["file_names"][1]).unlink()
    for workers in (0, 1):
        with pytest.raises(FileNotFoundError, match="frame 1 of video . of data set 'toy'"):
            take(cfg, 1, workers=workers)


def test_workers_end_with_an_error(cfg: CfgNode) -> None:
    for record in DatasetCatalog.get("toy_train"):
        Path(record["file_names"][1]).unlink()
    cfg.DATALOADER.NUM_WORKERS = 1
    batches = build_train_loader(cfg)
    with contextlib.suppress(FileNotFoundError):
        next(batches)
    assert multiprocessing.active_children()
    del batches
    assert not multiprocessing.active_children()


def test_classes_follow_the_last_data_set(cfg: CfgNode, register: Register, make_record: MakeRecord) -> None:
    place = [(4, 6, 20, 19)]
    register("images", [make_record(50, (33, 40), [place, place, place])], ["Giant_Panda", "tree", "cat"])
    cfg.DATASETS.TRAIN = ("images", "toy_train")
    cfg.DATASETS.DATASET_RATIO = [1.0, 0.0]
    cfg.INPUT.PSEUDO.MIN_SIZE_TRAIN = (24,)
    sample = take(cfg, 1)[0][0]
    assert sample["instances"][0].gt_classes.tolist() == [1, 0]
    assert sample["file_names"] == [sample["file_names"][0]] * 3
    cfg.DATASETS.DATASET_RATIO = [1.0, 2.0]
    drawn = [batch[0]["video_id"] == 50 for batch in take(cfg, 120)]
    assert 20 < sum(drawn) < 60
    register("others", [make_record(60, (33, 40), [place])], ["bird"])
    cfg.DATASETS.TRAIN = ("others", "toy_train")
    with pytest.raises(ValueError, match="No class of data set 'others'"):
        take(cfg, 1)


def test_wrong_settings_are_named(cfg: CfgNode, register: Register, make_record: MakeRecord) -> None:
    def fails(message: str, *opts: Any) -> None:
        changed = cfg.clone()
        changed.merge_from_list(list(opts))
        with pytest.raises(ValueError, match=message):
            build_train_loader(changed)

    fails("DATASETS.TRAIN is empty", "DATASETS.TRAIN", ())
    fails("ytvis_2019_train", "DATASETS.TRAIN", ("ytvis2019_train",))
    register("images_of_detectron2", [{"file_name": "a.jpg", "image_id": 1, "annotations": []}], CLASSES)
    fails("registered by other code", "DATASETS.TRAIN", ("images_of_detectron2",))
    fails("DATASET_RATIO", "DATASETS.DATASET_RATIO", [1.0, 2.0])
    fails("must be divided|cannot be divided", "SOLVER.IMS_PER_BATCH", 0)
    fails("'RGB'", "INPUT.FORMAT", "BGR")
    fails("SAMPLER_TRAIN", "DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler")
    register("nothing", [], CLASSES)
    fails("has no video", "DATASETS.TRAIN", ("nothing",))
    register("empty", [make_record(70, (20, 21), [[None]])], CLASSES)
    fails("None of the 1 records", "DATASETS.TRAIN", ("empty",))
    bare = make_record(71, (20, 21), [[None]])
    del bare["annotations"]
    register("bare", [bare], CLASSES)
    fails("no annotations", "DATASETS.TRAIN", ("bare",))


def test_test_loader_gives_whole_videos(cfg: CfgNode) -> None:
    items = list(build_test_loader(cfg, "toy_train"))
    assert len(items) == 5
    (sample,) = items[0]
    assert (sample["height"], sample["width"], sample["length"]) == (30, 44, 4)
    assert sample["frame_ids"] == [0, 1, 2, 3]
    assert [tuple(frame.shape) for frame in sample["image"]] == [(3, 22, 32)] * 4
    assert [int(frame[0, -1, -1]) for frame in sample["image"]] == [0, 1, 2, 3]
    assert "instances" not in sample


def test_longest_videos_first_and_shared_by_the_ranks(make_record: MakeRecord) -> None:
    lengths = {1: 3, 2: 5, 3: 1, 4: 4, 5: 2}
    records = [make_record(number, (8, 9), [], length=length) for number, length in lengths.items()]
    ranks = [VideoLoader(records=records, min_size=0, max_size=99, rank=rank, world_size=2) for rank in range(2)]
    assert [[item[0]["video_id"] for item in rank] for rank in ranks] == [[2, 1, 3], [4, 5]]
    assert [len(rank) for rank in ranks] == [3, 2]


@pytest.fixture
def long_video(make_record: MakeRecord) -> dict[str, Any]:
    return make_record(1, (8, 9), [], length=30)


def test_lazy_frames_are_a_sequence(long_video: dict[str, Any]) -> None:
    frames = LazyFrames(source=frame_source(long_video))
    assert len(frames) == 30
    assert int(frames[7][0, 0, 0]) == 7
    assert int(frames[-1][0, 0, 0]) == 29
    assert [int(frame[0, 0, 0]) for frame in frames[3:9:2]] == [3, 5, 7]
    assert len(frames[25:99]) == 5
    with pytest.raises(IndexError):
        frames[30]


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_lazy_frames_never_hold_more_than_a_few(
    long_video: dict[str, Any], read_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    frames = LazyFrames(source=frame_source(long_video), read_ahead=read_ahead)
    decode = LazyFrames.__getitem__

    def counted(self: LazyFrames, index: Any) -> Any:
        nonlocal most
        frame = decode(self, index)
        alive.add(frame)
        most = max(most, len(alive))
        return frame

    monkeypatch.setattr(LazyFrames, "__getitem__", counted)
    seen = [int(frame[0, 0, 0]) for frame in frames]
    assert seen == list(range(30))
    assert most <= read_ahead + 2  # waiting, in the model's hands, and the one being taken over
    gc.collect()
    assert len(alive) == 0


def test_lazy_frames_read_ahead_stops_with_the_reader(long_video: dict[str, Any]) -> None:
    iterator = iter(LazyFrames(source=frame_source(long_video), read_ahead=2))
    assert int(next(iterator)[0, 0, 0]) == 0
    iterator.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "vis-read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_lazy_frames_raise_where_the_frame_would_come(long_video: dict[str, Any], read_ahead: int) -> None:
    Path(long_video["file_names"][4]).unlink()
    iterator = iter(LazyFrames(source=frame_source(long_video), read_ahead=read_ahead))
    assert [int(frame[0, 0, 0]) for frame in islice(iterator, 4)] == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match="frame 4 of video 1"):
        next(iterator)
