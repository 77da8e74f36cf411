"""Loaders: the same batches with any number of workers, from any iteration; frames of a test video one at a time."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import threading
import time
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
from vis.data import loaders
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
    fails("SOLVER.IMS_PER_BATCH 0", "SOLVER.IMS_PER_BATCH", 0)
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


LENGTHS = {1: 3, 2: 5, 3: 1, 4: 4, 5: 2}


@pytest.fixture
def videos(make_record: MakeRecord) -> list[dict[str, Any]]:
    """Five videos of different length."""
    return [make_record(number, (8, 9), [], length=length) for number, length in LENGTHS.items()]


def ids(loader: VideoLoader) -> list[int | None]:
    return [batch[0].get("video_id") for batch in loader]


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_processes_take_the_longest_video_that_is_left(
    videos: list[dict[str, Any]], read_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = itertools.count()
    monkeypatch.setattr(loaders, "shared_numbers", lambda: counter)
    ranks = [iter(VideoLoader(records=videos, min_size=0, max_size=99, read_ahead=read_ahead)) for _ in range(2)]
    taken: list[list[Any]] = [[], []]
    for rank in (0, 1, 1, 0, 1, 0, 1):
        for batch in islice(ranks[rank], 1):
            taken[rank].append(batch[0]["video_id"])
            assert len(list(batch[0]["image"])) == batch[0]["length"]
    assert sorted(taken[0] + taken[1]) == [1, 2, 3, 4, 5]
    assert taken[0][0] == 2
    for each in taken:
        assert [LENGTHS[number] for number in each] == sorted((LENGTHS[number] for number in each), reverse=True)


def test_size_counts_beside_length(make_record: MakeRecord) -> None:
    records = [make_record(1, (8, 9), [], length=4), make_record(2, (20, 30), [], length=3)]
    assert ids(VideoLoader(records=records, min_size=0, max_size=99)) == [2, 1]


def test_finished_videos_are_left_out(videos: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vis")
    loader = VideoLoader(records=videos, min_size=0, max_size=99)
    loader.leave_out({2, 5})
    assert "continuing: 2 of 5 videos are finished" in caplog.text
    assert len(loader) == 3
    assert ids(loader) == [4, 1, 3]
    assert loader.progress() == (3, 1.0)
    loader.leave_out({1, 3, 4})
    assert "all 3 videos are finished, nothing is computed again" in caplog.text
    assert ids(loader) == []


def test_progress_is_in_pixels(videos: list[dict[str, Any]]) -> None:
    loader = VideoLoader(records=videos, min_size=0, max_size=99)
    assert [loader.progress() for _ in loader] == [
        (n, pytest.approx(w / 15)) for n, w in enumerate((5, 9, 12, 14, 15), 1)
    ]


def test_frames_of_the_next_video_are_read_while_the_model_works_on_this_one(videos: list[dict[str, Any]]) -> None:
    """However a video is used, the next one has its own frames."""
    for record in videos:
        assert [int(frame[0, 0, 0]) for frame in LazyFrames(source=frame_source(record))] == list(
            range(record["length"])
        )
    for read_ahead in (1, 3, 100):
        loader = VideoLoader(records=videos, min_size=0, max_size=99, read_ahead=read_ahead, threads=2)
        for place, batch in enumerate(loader):
            frames = batch[0]["image"]
            assert int(frames[-1][0, 0, 0]) == len(frames) - 1  # random access beside the iteration
            if place == 0:
                iterator = iter(frames)
                assert [int(frame[0, 0, 0]) for frame in islice(iterator, 2)] == [0, 1]  # and no further
            elif place != 1:  # the second is not looked at
                for _ in range(2):
                    assert [int(frame[0, 0, 0]) for frame in frames] == list(range(len(frames)))
        assert not any(thread.name.startswith("vis-read-ahead") for thread in threading.enumerate())


def test_what_waits_over_all_videos_is_bounded(videos: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    alive = count_frames(monkeypatch)
    for batch in VideoLoader(records=videos, min_size=0, max_size=99, read_ahead=4, threads=3):
        assert sum(1 for _ in batch[0]["image"]) == batch[0]["length"]
    assert 3 <= alive.most <= 4 + 2
    gc.collect()
    assert not alive.frames


def test_frames_are_read_while_the_model_works(videos: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    alive = count_frames(monkeypatch)

    def work_until(waiting: int, held: int) -> None:
        deadline = time.monotonic() + 20
        while len(alive.frames) < waiting + held:
            assert time.monotonic() < deadline, "nothing is read ahead"
            time.sleep(0.001)

    batches = iter(VideoLoader(records=videos, min_size=0, max_size=99, read_ahead=4))
    frames = iter(next(batches)[0]["image"])
    window = list(islice(frames, 2))
    work_until(4, held=2)  # three of this video, one of the next
    window = list(islice(frames, 3))
    work_until(4, held=3)  # all of the next
    assert len(window) == 3
    assert next(batches)[0]["video_id"] == 4


def test_error_of_the_next_video_waits_for_its_turn(videos: list[dict[str, Any]]) -> None:
    Path(videos[3]["file_names"][1]).write_bytes(b"no picture")
    loader = VideoLoader(records=videos, min_size=0, max_size=99, read_ahead=100)
    batches = iter(loader)
    assert [int(frame[0, 0, 0]) for frame in next(batches)[0]["image"]] == [0, 1, 2, 3, 4]
    damaged = next(batches)[0]["image"]
    with pytest.raises(ValueError, match="Cannot decode frame 1 of video 4"):
        list(damaged)
    assert ids(loader) == [2, 4, 1, 5, 3], "a damaged frame that nobody asks for is nobody's error"


def test_depth_below_zero(videos: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="TEST.PREFETCH_FRAMES is -1"):
        VideoLoader(records=videos, min_size=0, max_size=99, read_ahead=-1)


def test_keys_reach_the_loader(cfg: CfgNode) -> None:
    cfg.TEST.PREFETCH_FRAMES = 7
    cfg.DATALOADER.NUM_WORKERS = 3
    loader = build_test_loader(cfg, "toy_train")
    assert (loader.read_ahead, loader.threads) == (7, 3)


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


class Alive:
    """Frames that exist, and the most there ever were."""

    def __init__(self) -> None:
        self.frames: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0


def count_frames(monkeypatch: pytest.MonkeyPatch) -> Alive:
    alive = Alive()
    decode = LazyFrames.read

    def counted(self: LazyFrames, position: int) -> Tensor:
        frame = decode(self, position)
        alive.frames.add(frame)
        alive.most = max(alive.most, len(alive.frames))
        return frame

    monkeypatch.setattr(LazyFrames, "read", counted)
    return alive


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_lazy_frames_never_hold_more_than_a_few(
    long_video: dict[str, Any], read_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = count_frames(monkeypatch)
    frames = LazyFrames(source=frame_source(long_video), read_ahead=read_ahead)
    assert [int(frame[0, 0, 0]) for frame in frames] == list(range(30))
    assert alive.most <= read_ahead + 2  # waiting, in the model's hands, and the one being taken over
    gc.collect()
    assert not alive.frames


def test_lazy_frames_read_ahead_stops_with_the_reader(long_video: dict[str, Any]) -> None:
    iterator = iter(LazyFrames(source=frame_source(long_video), read_ahead=2))
    assert int(next(iterator)[0, 0, 0]) == 0
    iterator.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("vis-read-ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_lazy_frames_raise_where_the_frame_would_come(long_video: dict[str, Any], read_ahead: int) -> None:
    Path(long_video["file_names"][4]).unlink()
    iterator = iter(LazyFrames(source=frame_source(long_video), read_ahead=read_ahead))
    assert [int(frame[0, 0, 0]) for frame in islice(iterator, 4)] == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match="frame 4 of video 1"):
        next(iterator)
