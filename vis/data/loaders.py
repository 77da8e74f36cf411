"""Loaders: what turns ``cfg`` and the registered data sets into batches of :class:`ClipSample`."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vis.config import CfgNode, declare
from vis.data.categories import class_names
from vis.data.custom import register_custom
from vis.data.frame_reader import AheadFrames, LazyFrames, frame_source
from vis.data.image_mapper import build_mapper
from vis.data.layout import BatchLayout, batch_layout
from vis.data.mapper import ClipMapper
from vis.data.read_ahead import ReadAhead
from vis.data.registration import VideoDataset, get_dataset, registered
from vis.data.samplers import ClipBatchSampler, SampleIndex, pools_of, sample_generator, shared_numbers
from vis.data.transforms import shortest_edge_size
from vis.structures import ClipSample

__all__ = ["ClipDataset", "VideoLoader", "build_test_loader", "build_train_loader", "category_map"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@declare
def add_config(cfg: CfgNode) -> None:
    """Keys of the loaders."""
    # Odds of the training data sets; empty: in proportion to their sizes.
    cfg.DATASETS.DATASET_RATIO = []
    # Frames that may wait decoded while the model works on a test video, by DATALOADER.NUM_WORKERS threads (at least
    # one); a window of the model's keeps it busy. 0 decodes only when a frame is asked for.
    cfg.TEST.PREFETCH_FRAMES = 10


class ClipDataset(Dataset):
    """Training samples of several data sets, addressed by :class:`SampleIndex`.

    The records are held as one block of bytes per data set (detectron2's ``DatasetFromList``), so worker processes
    share them instead of copying them; one record is unpacked per sample.
    """

    def __init__(self, *, records: Sequence[Sequence[Record]], mappers: Sequence[ClipMapper], seed: int) -> None:
        self.records = [DatasetFromList(list(part), copy=False, serialize=True) for part in records]
        self.mappers = list(mappers)
        self.seed = seed

    def __len__(self) -> int:
        return sum(map(len, self.records))

    def __getitem__(self, index: SampleIndex) -> ClipSample:
        record = self.records[index.dataset][index.record]
        return self.mappers[index.dataset](record, sample_generator(self.seed, index.counter))


def _video_dataset(name: str) -> VideoDataset | None:
    """The registered video data set; None where other code registered records of our form under the name."""
    if name in DatasetCatalog and registered(name) is None and registered(f"{name}_video") is None:
        return None
    return get_dataset(name)  # raises for an unknown name, with the closest known one


def _records(name: str) -> list[Record]:
    dataset = _video_dataset(name)
    records = DatasetCatalog.get(name) if dataset is None else dataset()
    if not records:
        raise ValueError(f"Data set {name!r} has no video.")
    if "file_names" not in records[0]:
        get_dataset(name)  # records of detectron2's image form: says how to register them
    return records


def _classes(name: str) -> list[str]:
    dataset = _video_dataset(name)
    if dataset is not None:
        return class_names(dataset.known_categories())
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise ValueError(f"Data set {name!r} has no class names: set thing_classes of its metadata.")
    return list(classes)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def category_map(name: str, target: str) -> list[int | None] | None:
    """Classes of data set ``name`` as classes of ``target``, matched by name; None where both have the same classes.

    Raises:
        ValueError: no class has a counterpart.
    """
    classes, wanted = (_classes(each) for each in (name, target))
    if classes == wanted:
        return None
    places = {_plain(each): place for place, each in enumerate(wanted)}
    mapped = [places.get(_plain(each)) for each in classes]
    missing = [each for each, place in zip(classes, mapped, strict=True) if place is None]
    if len(missing) == len(classes):
        raise ValueError(
            f"No class of data set {name!r} has the name of a class of {target!r}, the last of DATASETS.TRAIN, whose "
            f"classes the model learns. Put the data set with the wanted classes last, or leave {name!r} out."
        )
    logger.info(
        "%s: %d of %d classes are trained as classes of %s%s",
        name,
        len(classes) - len(missing),
        len(classes),
        target,
        f"; instances of the others are left out: {', '.join(missing)}" if missing else "",
    )
    return mapped


def _training_set(cfg: CfgNode, name: str, target: str) -> tuple[list[Record], ClipMapper]:
    """The records of one data set that are trained on, and their mapper."""
    records = _records(name)
    still = all(record["length"] == 1 for record in records)
    mapper = build_mapper(cfg, dataset_name=name, still=still, categories=category_map(name, target))
    if not any("annotations" in record for record in records):
        raise ValueError(
            f"Data set {name!r} of DATASETS.TRAIN has no annotations: it can be tested on, not trained on."
        )
    kept = records
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        kept = [record for record in records if mapper.usable(record)]
        if not kept:
            raise ValueError(
                f"None of the {len(records)} records of data set {name!r} has an instance that can be trained on "
                f"(crowds and classes without a counterpart do not count)."
            )
    dropped = len(records) - len(kept)
    logger.info(
        "%s: %d %s%s",
        name,
        len(kept),
        "images" if still else "videos",
        f" ({dropped} without annotations left out)" if dropped else "",
    )
    return kept, mapper


def _init_worker(worker_id: int) -> None:
    """One thread per worker: workers are the parallelism."""
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


class _WorkerBatches(Iterator[list[ClipSample]]):
    """Batches of worker processes, which end at once when a worker failed.

    The traceback of torch's code in this process is dropped: it is part of a reference cycle that would keep the
    workers alive until some later garbage collection, which then waits for them in vain. The message has the worker's
    own traceback.
    """

    def __init__(self, batches: Iterator[list[ClipSample]]) -> None:
        self._batches = batches

    def __next__(self) -> list[ClipSample]:
        try:
            return next(self._batches)
        except Exception as error:
            raise error.with_traceback(None) from None


def _seed(cfg: CfgNode) -> int:
    if cfg.SEED >= 0:
        return cfg.SEED
    seed = comm.shared_random_seed()
    logger.warning("SEED is %d: batches follow the random seed %d and will not repeat when resumed", cfg.SEED, seed)
    return seed


def _prepare(cfg: CfgNode) -> None:
    register_custom(cfg)  # a process started by spawn has a catalog of its own
    if cfg.INPUT.FORMAT != "RGB":
        raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: frames are given to every model as 'RGB'.")


def build_train_loader(
    cfg: CfgNode, *, start_iter: int = 0, layout: BatchLayout | None = None
) -> Iterator[list[ClipSample]]:
    """Endless training batches of this process: the parts that it computes, ``layout.steps`` of them per iteration.

    What is in an iteration is a pure function of the data sets and ``cfg`` (and, where ``SOLVER.REFERENCE_WORLD_SIZE``
    is 0, of the number of processes): the same whatever ``DATALOADER.NUM_WORKERS``, and ``start_iter=k`` continues
    exactly where iteration k - 1 ended. Neither this nor the workers touch the global random state.

    Args:
        start_iter: iterations (of ``SOLVER.IMS_PER_BATCH`` clips over all processes and steps) to leave out.
        layout: None: what ``cfg`` asks for in this job.

    Raises:
        ValueError: unknown or empty data sets, classes that do not fit, a batch that cannot be divided over the
            processes, keys out of range.
        FileNotFoundError: a data set is not on disk.
    """
    _prepare(cfg)
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError("DATASETS.TRAIN is empty: name one or more registered data sets.")
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}, only 'TrainingSampler' is known."
        )
    seed = _seed(cfg)
    records, mappers = zip(*(_training_set(cfg, name, names[-1]) for name in names), strict=True)
    pools = pools_of(
        [[record["width"] > record["height"] for record in part] for part in records],
        ratios=cfg.DATASETS.DATASET_RATIO,
        group_by_orientation=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
    for pool in pools:
        share, name = 100 * pool.weight, names[pool.dataset]
        logger.info("%.1f %% of batches from %s: %d records (%s)", share, name, len(pool.records), pool.shape)
    sampler = ClipBatchSampler(
        pools=pools,
        layout=batch_layout(cfg) if layout is None else layout,
        seed=seed,
        rank=comm.get_rank(),
        start_iter=start_iter,
    )
    workers = cfg.DATALOADER.NUM_WORKERS
    loader: DataLoader = DataLoader(
        ClipDataset(records=records, mappers=mappers, seed=seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_init_worker,
        pin_memory=cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_available(),
        # A generator of its own: the loader draws a number when it starts, and the global state must stay as it is.
        generator=torch.Generator().manual_seed(seed),
    )
    return _WorkerBatches(iter(loader)) if workers else iter(loader)


class VideoLoader:
    """One video per item, as a list of one :class:`ClipSample` whose ``image`` is :class:`AheadFrames`.

    The processes of a job share the videos: each takes the next one when it is done with one, the most work first, so
    that the last ones to end are short.

    Args:
        records: all videos.
        min_size, max_size: INPUT.MIN_SIZE_TEST (0 keeps the size) and INPUT.MAX_SIZE_TEST.
        read_ahead: frames that may wait decoded while the model works, of this video and then of the next one; 0
            decodes in the caller's thread.
        threads: threads that decode.
    """

    def __init__(
        self, *, records: Sequence[Record], min_size: int, max_size: int, read_ahead: int = 2, threads: int = 1
    ) -> None:
        if read_ahead < 0:
            raise ValueError(f"TEST.PREFETCH_FRAMES is {read_ahead}, expected 0 (none) or more frames.")
        self.min_size = min_size
        self.max_size = max_size
        self.read_ahead = read_ahead
        self.threads = max(threads, 1)
        self.records = sorted(records, key=lambda record: -self._work(record))
        self._begun = 0

    def _size(self, record: Record) -> tuple[int, int]:
        return shortest_edge_size(record["height"], record["width"], self.min_size, self.max_size)

    def _work(self, record: Record) -> int:
        """Pixels that go through the model, and those of the masks that come out."""
        height, width = self._size(record)
        return record["length"] * (height * width + record["height"] * record["width"])

    def __len__(self) -> int:
        """Videos of all processes."""
        return len(self.records)

    def leave_out(self, video_ids: Collection[int]) -> None:
        """Videos that need not be computed; the same in every process, before the iteration."""
        left = [record for record in self.records if record["video_id"] not in video_ids]
        done, total = len(self.records) - len(left), len(self.records)
        if done == total:
            logger.info("continuing: all %d videos are finished, nothing is computed again", total)
        elif done:
            logger.info("continuing: %d of %d videos are finished", done, total)
        self.records = left

    def progress(self) -> tuple[int, float]:
        """Videos that the processes have begun, as far as this one knows, and their share of all work, 0 to 1."""
        work = [self._work(record) for record in self.records]
        return self._begun, sum(work[: self._begun]) / max(sum(work), 1)

    def __iter__(self) -> Iterator[list[ClipSample]]:
        self._begun = 0
        numbers = itertools.takewhile(lambda number: number < len(self.records), shared_numbers())
        yield from self._iterate_ahead(numbers) if self.read_ahead else self._iterate_plainly(numbers)
        self._begun = len(self.records)  # this process gets no more: the others have begun the rest

    def _iterate_plainly(self, numbers: Iterator[int]) -> Iterator[list[ClipSample]]:
        for number in numbers:
            yield [self._sample(number, LazyFrames(**self._frames(number), read_ahead=0))]

    def _iterate_ahead(self, numbers: Iterator[int]) -> Iterator[list[ClipSample]]:
        videos: deque[tuple[int, AheadFrames]] = deque()  # whose first frames are read, but which were not given yet

        def calls() -> Iterator[Callable[[], Tensor]]:
            for number in numbers:
                frames = AheadFrames(**self._frames(number))
                videos.append((number, frames))
                yield from frames.calls()

        with ReadAhead(calls(), depth=self.read_ahead, threads=self.threads) as reader:
            reader.fill()
            while videos:
                number, frames = videos.popleft()
                frames.begin(reader)
                yield [self._sample(number, frames)]
                frames.end()
                reader.fill()

    def _frames(self, number: int) -> dict[str, Any]:
        record = self.records[number]
        return {"source": frame_source(record), "size": self._size(record)}

    def _sample(self, number: int, frames: LazyFrames) -> ClipSample:
        self._begun = number + 1
        record = self.records[number]
        return ClipSample(
            image=frames,
            height=record["height"],
            width=record["width"],
            video_id=record["video_id"],
            frame_ids=list(range(record["length"])),
            length=record["length"],
            file_names=list(record["file_names"]),
        )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> VideoLoader:
    """The videos of a data set for this process, frames decoded while the model works.

    Raises:
        ValueError: no such data set, or it is empty.
        FileNotFoundError: it is not on disk.
    """
    _prepare(cfg)
    return VideoLoader(
        records=_records(dataset_name),
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        read_ahead=cfg.TEST.PREFETCH_FRAMES,
        threads=cfg.DATALOADER.NUM_WORKERS,
    )
