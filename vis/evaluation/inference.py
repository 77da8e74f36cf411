"""Runs a model over a data set, one batch of videos at a time, and says how far it is."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from vis.evaluation.results_writer import ResultsWriteError
from vis.structures import ClipSample

logger = logging.getLogger(__name__)


class VideoInferenceError(RuntimeError):
    """The inference of one video failed; the message names the video, ``__cause__`` is the error itself."""


class VideoInputError(VideoInferenceError, ValueError):
    """It failed by something that a user can put right, a damaged frame say."""


def inference_on_dataset(
    model: nn.Module,
    loader: Iterable[Sequence[ClipSample]],
    evaluator: DatasetEvaluator,
    *,
    log_period_s: float = 10.0,
) -> dict[str, Any]:
    """Run ``model`` in eval mode over ``loader`` and hand every batch to ``evaluator``.

    Args:
        model: maps a list of ClipSample to a list of VideoPrediction in eval mode. Each of its modules gets its
            training mode back at the end, also after an error.
        loader: batches of videos, this process' share of the data set.
        evaluator: gets ``reset``, ``process`` after each batch and ``evaluate`` at the end. Videos that it has in
            ``finished`` after ``reset`` are left out.
        log_period_s: least time between two progress lines, in seconds.

    Returns:
        What ``evaluator.evaluate`` returns, ``{}`` where it returns nothing.

    Raises:
        VideoInferenceError: a video failed; the results of the videos before it stay on disk. It is a ValueError too
            (``VideoInputError``) where its cause is a ValueError or an OSError.
        ResultsWriteError: results cannot be written.
    """
    evaluator.reset()
    _leave_out(loader, getattr(evaluator, "finished", frozenset()))
    progress = _Progress(loader, log_period_s)
    with _eval_mode(model), torch.inference_mode(), _iterator(loader) as batches:
        for inputs in batches:
            try:
                evaluator.process(inputs, model(inputs))
            except ResultsWriteError:  # its message says what is kept
                raise
            except Exception as error:
                kind = VideoInputError if isinstance(error, (ValueError, OSError)) else VideoInferenceError
                raise kind(_describe_failure(inputs, error, evaluator)) from error
            progress.update(inputs)
    progress.finish()
    return evaluator.evaluate() or {}


def _leave_out(loader: Any, finished: Collection[int]) -> None:
    if not finished:
        return
    if not hasattr(loader, "leave_out"):
        raise TypeError(
            f"{len(finished)} videos are finished, but a {type(loader).__name__} has no leave_out(video_ids): use the "
            "loader of build_test_loader, or an evaluator that starts anew"
        )
    loader.leave_out(finished)


@contextmanager
def _iterator(loader: Iterable[Sequence[ClipSample]]) -> Iterator[Iterator[Sequence[ClipSample]]]:
    """Iterates, and ends the loader's threads at once where the loop is left by an error."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own mode again (parts may be kept in eval mode on purpose)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _describe_failure(inputs: Sequence[ClipSample], error: Exception, evaluator: DatasetEvaluator) -> str:
    names = ", ".join(_name(sample) for sample in inputs)
    folder = getattr(evaluator, "output_dir", None)
    kept = f" The videos finished so far are kept in {folder}; evaluating again continues after them." if folder else ""
    return f"inference failed on {names}: {type(error).__name__}: {str(error).rstrip('.')}.{kept}"


def _name(sample: Mapping[str, Any]) -> str:
    files = sample.get("file_names") or ()
    where = f", frames in {Path(files[0]).parent}" if files else ""
    return f"video {sample.get('video_id')} ({sample.get('length')} frames{where})"


@runtime_checkable
class _SharedLoader(Protocol):
    """A loader whose videos several processes share, see ``vis.data.loaders.VideoLoader``."""

    def progress(self) -> tuple[int, float]: ...


class _Progress:
    """Counts videos and frames and logs a line at most once per period."""

    def __init__(self, loader: Iterable[Any], period_s: float) -> None:
        self.videos = 0
        self.frames = 0
        self._loader = loader
        self._total = len(loader) if isinstance(loader, Sized) else None
        self._period_s = period_s
        self._start = self._last = time.perf_counter()
        self._batches = 0

    def update(self, inputs: Sequence[ClipSample]) -> None:
        self._batches += 1
        self.videos += len(inputs)
        self.frames += sum(len(sample["image"]) if "image" in sample else sample["length"] for sample in inputs)
        now = time.perf_counter()
        if now - self._last >= self._period_s:
            self._last = now
            logger.info("inference: %s", self._line(now))

    def finish(self) -> None:
        elapsed = time.perf_counter() - self._start
        took = datetime.timedelta(seconds=int(elapsed))
        logger.info("inference done: %s, took %s", self._line(self._start + elapsed, eta=False), took)

    def _line(self, now: float, *, eta: bool = True) -> str:
        elapsed = max(now - self._start, 1e-9)
        counts, share = self._done()
        parts = [counts, f"{self.frames} frames", f"{self.frames / elapsed:.2f} frames/s"]
        if eta and share:
            parts.append(f"eta {datetime.timedelta(seconds=int(elapsed * (1 - share) / share))}")
        return ", ".join([*parts, *_memory()])

    def _done(self) -> tuple[str, float]:
        """Videos in words, and the share of the work that is done, 0 where it is not known."""
        if isinstance(self._loader, _SharedLoader):
            videos, share = self._loader.progress()
            here = f", {self.videos} of them here" if videos != self.videos else ""
            return f"{videos}/{self._total} videos{here}", share
        if not self._total or not self._batches:
            return f"{self.videos} videos", 0.0
        # a loader counts batches; of one batch or of all, the number of videos in it is that of the ones so far
        return f"{self.videos}/{self._total * self.videos // self._batches} videos", self._batches / self._total


def _memory() -> list[str]:
    """Peak memory of this process, and of the GPU where one is in use."""
    parts = []
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        parts.append(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MB")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MB")
    return parts
