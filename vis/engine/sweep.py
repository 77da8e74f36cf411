"""Runs the settings of a sweep (:mod:`vis.engine.sweep_file`) and keeps its table.

Every run is a process of its own. What is finished stays; what failed or was killed is continued; this process may be
killed at any time, its children die with it, and the next call goes on.
"""

from __future__ import annotations

import datetime
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vis.engine.manifest import read_manifest
from vis.engine.processes import Child, FolderInUse, FolderLock, Running, stop_all
from vis.engine.sweep_file import ENSEMBLE, Sweep
from vis.engine.sweep_jobs import (
    LOG,
    RECORD,
    Job,
    Launcher,
    commands,
    differences,
    interpreter,
    is_finished,
    make_jobs,
    progress,
    record_ensemble,
    record_start,
)
from vis.engine.sweep_table import Row, write_tables

logger = logging.getLogger(__name__)

GRACE = 30.0  # seconds that a training gets for its checkpoint when the sweep is told to stop
_PATIENCE = 60.0  # seconds until a folder that somebody else works in is given up


class SweepChanged(ValueError):
    """Runs in the folder are of other settings than the sweep's file describes now."""


@dataclass
class Outcome:
    """What became of the runs of one call, by name."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class WrongWeights(ValueError):
    """What a run hands over is not what the next one can start from."""


class Places:
    """CUDA devices and threads for so many runs at a time.

    Args:
        jobs: how many run at a time.
        threads: of each; None: the cores are shared among them.
    """

    def __init__(self, jobs: int, threads: int | None = None) -> None:
        if jobs < 1:
            raise ValueError(f"--jobs {jobs}: at least one run at a time")
        self.threads = threads or max((os.cpu_count() or 1) // jobs, 1)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        self.free = list(range(jobs))

    def environment(self, place: int, num_gpus: int) -> dict[str, str]:
        """Variables of the run in a place. With fewer devices than places they are shared."""
        found = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        if self.devices and num_gpus > 0:
            first = place * num_gpus
            chosen = [self.devices[(first + index) % len(self.devices)] for index in range(num_gpus)]
            found["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(chosen))
        return found


Start = Callable[[Job, dict[str, str]], Running]


def local_start(launcher: Launcher = interpreter) -> Start:
    """Runs jobs as children of this process.

    Args:
        launcher: gives the words that start a tool.
    """

    def start(job: Job, environment: dict[str, str]) -> Running:
        words = commands(job, launcher)
        return Child(words, folder=job.folder, log=job.folder / LOG, environment=environment)

    return start


def run_sweep(
    sweep: Sweep,
    *,
    jobs: int = 1,
    threads: int | None = None,
    set_aside: bool = False,
    start: Start | None = None,
    report_every: float = 60.0,
    check: Callable[[Sequence[Job]], None] | None = None,
) -> Outcome:
    """Run what is not finished and write the table after each run.

    Args:
        jobs: runs at a time. threads: of each run; None: the cores are shared.
        set_aside: runs of other settings than the file's are renamed and done anew; else they are an error.
        start: where jobs run; None: here.
        report_every: seconds between lines of the log that say how far the runs are.
        check: looks at the runs that are not finished before the first starts, and raises what is wrong with them.

    Raises:
        SweepChanged: folders hold runs of other settings.
        FolderInUse: another process runs this sweep.
        FileNotFoundError, ValueError: a configuration cannot be loaded.
    """
    lock = FolderLock(sweep.folder)
    try:
        todo = make_jobs(sweep)
        _check_unchanged(todo, set_aside=set_aside)
        if check is not None:
            check([job for job in todo if not is_finished(job)])
        return _Runner(sweep, todo, Places(jobs, threads), start or local_start(), report_every).run()
    finally:
        lock.close()


def table(sweep: Sweep) -> str:
    """Write the table of what is finished; runs nothing."""
    return _table(sweep, make_jobs(sweep))


def _table(sweep: Sweep, jobs: Sequence[Job]) -> str:
    rows = {
        name: Row(name, setting.label, len(setting.seeds), setting.published)
        for name, setting in sweep.settings.items()
        if setting.in_table
    }
    for job in jobs:
        manifest = read_manifest(job.manifest) if is_finished(job) and job.setting.in_table else None
        if manifest is not None:
            rows[job.setting.name].add(job.seed, manifest, sweep.metrics)
    return write_tables(sweep.folder, list(rows.values()), sweep.metrics, sweep.baseline)


def _check_unchanged(jobs: Sequence[Job], *, set_aside: bool) -> None:
    changed = {job.name: found for job in jobs if (found := differences(job))}
    if not changed:
        return
    text = "\n".join(f"  {name}: {'; '.join(found[:4])}" for name, found in changed.items())
    if not set_aside:
        raise SweepChanged(
            f"{len(changed)} runs in {jobs[0].folder.parent} are of other settings than the file has now:\n{text}\n"
            "Give the setting another name, change it back, or use --rerun-changed, which renames the old runs to "
            "seed<k>.old<n> and does them anew"
        )
    for job in jobs:
        if job.name in changed:
            number = 1
            while (aside := job.folder.with_name(f"{job.folder.name}.old{number}")).exists():
                number += 1
            job.folder.rename(aside)
            logger.warning("%s is run again (%s); the old run is %s", job.name, "; ".join(changed[job.name][:4]), aside)
    # What uses a run that is done anew has to be done anew too; its source's new start will tell.
    again = [job for job in jobs if job.folder.exists() and any(source.name in changed for source in job.sources)]
    if again:
        for job in again:
            (job.folder / RECORD).unlink(missing_ok=True)
        _check_unchanged(again, set_aside=True)


class _Runner:
    """One call: which runs wait, which run, and what became of them."""

    def __init__(self, sweep: Sweep, jobs: list[Job], places: Places, start: Start, report_every: float) -> None:
        self.sweep, self.jobs, self.places, self.start, self.report_every = sweep, jobs, places, start, report_every
        self.outcome = Outcome()
        self.done: set[str] = set()
        self.waiting: list[Job] = []
        self.running: dict[str, tuple[Job, Running, int]] = {}
        self.seconds: list[float] = []
        self.busy_since: dict[str, float] = {}

    def run(self) -> Outcome:
        """Until nothing is left that can be run."""
        for job in self.jobs:
            if is_finished(job):
                self.outcome.skipped.append(job.name)
                self.done.add(job.name)
            else:
                self.waiting.append(job)
        if self.done:
            logger.info("%d of %d runs are finished and stay", len(self.done), len(self.jobs))
        _table(self.sweep, self.jobs)
        reported = time.monotonic()
        try:
            while self.waiting or self.running:
                self._start_some()
                self._look()
                if time.monotonic() - reported > self.report_every:
                    reported = time.monotonic()
                    self._report()
                time.sleep(0.05)
        except BaseException:
            if self.running:
                logger.warning("stopping %d runs; the next call continues them", len(self.running))
            stop_all([child for _, child, _ in self.running.values()], GRACE)
            raise
        return self.outcome

    def _start_some(self) -> None:
        for job in list(self.waiting):
            broken = [source.name for source in job.sources if source.name in self.outcome.failed]
            if broken:
                self.waiting.remove(job)
                self.outcome.failed[job.name] = f"needs {', '.join(broken)}, which failed"
                logger.error("%s cannot be run: it %s", job.name, self.outcome.failed[job.name])
            elif self.places.free and all(source.name in self.done for source in job.sources):
                self._start(job)

    def _start(self, job: Job) -> None:
        place = self.places.free[0]
        again = (job.folder / RECORD).exists()
        record_start(job)
        try:
            child = self.start(job, self.places.environment(place, job.setting.num_gpus))
        except WrongWeights as error:
            if not again:
                (job.folder / RECORD).unlink()
            self.waiting.remove(job)
            self._failed(job, str(error))
            return
        except FolderInUse as error:  # a child of a killed sweep that is about to die
            if time.monotonic() - self.busy_since.setdefault(job.name, time.monotonic()) > _PATIENCE:
                self.waiting.remove(job)
                self._failed(job, str(error))
            return
        self.places.free.remove(place)
        self.waiting.remove(job)
        self.running[job.name] = (job, child, place)
        logger.info("%s %s in %s", job.name, "continues" if again else "starts", job.folder)

    def _look(self) -> None:
        for name, (job, child, place) in list(self.running.items()):
            status = child.poll()
            if status is None:
                continue
            del self.running[name]
            self.places.free.append(place)
            self.places.free.sort()
            if status == 0 and job.setting.kind == ENSEMBLE:
                record_ensemble(job, child.seconds())
            if status == 0 and is_finished(job):
                self.done.add(name)
                self.outcome.finished.append(name)
                self.seconds.append(child.seconds())
                _table(self.sweep, self.jobs)
                logger.info("%s is finished after %s", name, _clock(child.seconds()))
                self._report()
            else:
                why = f"exit status {status}" if status else f"exit status 0, but {job.manifest} does not say finished"
                self._failed(job, f"{why}; the end of its output (in {job.folder}):\n{_indent(child.last_words())}")

    def _failed(self, job: Job, why: str) -> None:
        self.outcome.failed[job.name] = why
        logger.error("%s failed: %s", job.name, why)

    def _report(self) -> None:
        parts = {name: progress(job) for name, (job, _, _) in self.running.items()}
        running = ", ".join(f"{name} {part:.0%}" for name, part in parts.items())
        logger.info(
            "%d of %d runs finished, %d failed, %d wait%s%s",
            *(len(self.done), len(self.jobs), len(self.outcome.failed), len(self.waiting)),
            f"; running: {running}" if running else "",
            f"; eta {_clock(left)}" if (left := self._left(parts)) is not None else "",
        )

    def _left(self, parts: dict[str, float]) -> float | None:
        """Seconds until the end, if every run takes as long as those before, or as running ones look like."""
        guesses = list(self.seconds)
        guesses += [self.running[name][1].seconds() / part for name, part in parts.items() if part > 0.02]
        if not guesses:
            return None
        each = statistics.fmean(guesses)
        rest = sum(max(each - child.seconds(), 0.0) for _, child, _ in self.running.values())
        return (rest + each * len(self.waiting)) / (len(self.places.free) + len(self.running))


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (nothing)"
