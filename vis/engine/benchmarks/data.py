"""Clips per second of the mapper, beside decoding alone; samples and frames per second of the loaders.

All on the synthetic data set. What the mapper takes over decoding is transforms, masks and boxes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from detectron2.data import DatasetCatalog

from vis.config import CfgNode
from vis.data.frame_reader import frame_source
from vis.data.image_mapper import build_mapper
from vis.data.loaders import build_test_loader, build_train_loader
from vis.data.samplers import sample_generator
from vis.data.synthetic import generate
from vis.engine.benchmarks.common import Settings, spread, summary
from vis.engine.config import load_cfg

PRESET = "synthetic_ytvis"
VIDEOS = {"train": 8, "val": 4}
#: Training samples that one counted run draws.
SAMPLES = 64
_ROOT_KEY = "DETECTRON2_DATASETS"


def measure_data(settings: Settings) -> dict[str, Any]:
    """Training samples per second and test frames per second, from files in a temporary folder."""
    options = ["DATASETS.TRAIN", f"('{PRESET}_train',)", "DATASETS.TEST", f"('{PRESET}_val',)"]
    cfg = load_cfg(settings.config_file, [*options, *settings.opts])
    with tempfile.TemporaryDirectory(prefix="vis_benchmark_") as root, datasets_under(root):
        generate(PRESET, root, num_videos=VIDEOS)
        mapper = _mapper_alone(cfg, settings)
        loader = iter(build_train_loader(cfg))
        batches = max(SAMPLES // cfg.SOLVER.IMS_PER_BATCH, 1)
        samples = [_rate(_count_samples(islice(loader, batches))) for _ in range(settings.warmup + settings.repeats)]
        test = build_test_loader(cfg, cfg.DATASETS.TEST[0])
        frames = [_rate(_count_frames(test)) for _ in range(settings.warmup + settings.repeats)]
    return {
        **mapper,
        "train_samples_per_second": summary(samples[settings.warmup :]),
        "test_frames_per_second": summary(frames[settings.warmup :]),
        "workers": cfg.DATALOADER.NUM_WORKERS,
        "frames_per_sample": cfg.INPUT.SAMPLING_FRAME_NUM,
        "samples_per_run": batches * cfg.SOLVER.IMS_PER_BATCH,
        "preset": PRESET,
    }


def _mapper_alone(cfg: CfgNode, settings: Settings) -> dict[str, Any]:
    """The mapper in this process, without a loader, and reading the very frames that it read, without a mapper."""
    name = cfg.DATASETS.TRAIN[0]
    records = [record for record in DatasetCatalog.get(name) if record.get("annotations")]
    mapper = build_mapper(cfg, dataset_name=name, still=False, categories=None)
    chosen = [records[index % len(records)] for index in range(SAMPLES)]

    def clips() -> Iterator[int]:
        return (len([mapper(record, sample_generator(0, index))]) for index, record in enumerate(chosen))

    picks = [mapper(record, sample_generator(0, index))["frame_ids"] for index, record in enumerate(chosen)]

    def decoded() -> Iterator[int]:
        for record, frames in zip(chosen, picks, strict=True):
            source = frame_source(record)
            yield len([[source.read(frame) for frame in set(frames)]])

    runs = range(settings.warmup + settings.repeats)
    mapped, read = [_rate(clips()) for _ in runs], [_rate(decoded()) for _ in runs]
    return {
        "mapper_clips_per_second": summary(mapped[settings.warmup :]),
        "decoding_clips_per_second": summary(read[settings.warmup :]),
    }


def _rate(counts: Iterator[int]) -> float:
    start = time.perf_counter()
    total = sum(counts)
    return total / (time.perf_counter() - start)


def _count_samples(batches: Any) -> Iterator[int]:
    return (len(batch) for batch in batches)


def _count_frames(loader: Any) -> Iterator[int]:
    return (sum(1 for _ in sample["image"]) for batch in loader for sample in batch)


@contextmanager
def datasets_under(root: str) -> Iterator[None]:
    """Data sets are looked for under ``root`` inside."""
    before = os.environ.get(_ROOT_KEY)
    os.environ[_ROOT_KEY] = root
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ROOT_KEY]
        else:
            os.environ[_ROOT_KEY] = before


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    mapper, decoding = result["mapper_clips_per_second"], result["decoding_clips_per_second"]
    return [
        f"mapper alone: {spread(mapper, 'clips per second', 1)}",
        f"decoding alone: {spread(decoding, 'clips per second', 1)}, {decoding['median'] / mapper['median']:.1f} times "
        "the mapper's",
        f"training: {spread(result['train_samples_per_second'], 'samples per second', 1)}, "
        f"{result['frames_per_sample']} frame(s) each, {result['workers']} workers",
        f"test: {spread(result['test_frames_per_second'], 'frames per second', 1)}",
    ]
