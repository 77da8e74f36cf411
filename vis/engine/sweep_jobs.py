"""The runs of a sweep: one for each setting and seed, with its command, and what its folder says of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.data import MetadataCatalog

from vis.checkpoint import write_text_atomic
from vis.config import CfgNode
from vis.engine.config import load_cfg
from vis.engine.manifest import FINISHED, MANIFEST, iterations, now, read_manifest
from vis.engine.state import FINAL, config_changes, plain_config
from vis.engine.sweep_file import ENSEMBLE, EVALUATE, MULTI_SCALE, TRAIN, Setting, Sweep, is_result_file

RECORD = "sweep_run.json"
LOG = "console.txt"
Launcher = Callable[[str], list[str]]
_TOOLS = Path(__file__).resolve().parents[2] / "tools"
# Keys that say where and how fast a run works, not what comes of it.
_HARMLESS = ("OUTPUT_DIR:", "DATALOADER.NUM_WORKERS:", "TEST.PREFETCH_FRAMES:", "SOLVER.CHECKPOINT_")
_ABSENT = "(absent)"


@dataclass
class Job:
    """One run.

    Attributes:
        sources: the runs that it uses; the first is the one of ``weights_from``, if there is one.
        cfg: the resolved configuration, by which a finished run is known; None for an ensemble.
    """

    setting: Setting
    seed: int
    folder: Path
    cfg: CfgNode | None
    words: list[str]
    sources: list[Job] = field(default_factory=list)
    by_seed: bool = True

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.setting.name}/seed{self.seed}" if self.by_seed else self.setting.name

    @property
    def manifest(self) -> Path:
        """Where its tool writes the manifest."""
        inside = {EVALUATE: "inference", MULTI_SCALE: "fused"}.get(self.setting.kind, "")
        return self.folder / inside / MANIFEST

    def identity(self) -> str:
        """yaml text of everything that its result depends on, but for the runs that it uses."""
        own = {"kind": self.setting.kind, **self.setting.fusion, "of": list(self.setting.members)}
        return ("" if self.cfg is None else plain_config(self.cfg)) + yaml.safe_dump({"RUN": own})

    def results(self) -> Path:
        """The ``results.json`` that an ensemble takes of it.

        Raises:
            ValueError: it is of several data sets.
        """
        if self.setting.kind == ENSEMBLE:
            return self.folder / "results.json"
        sets = test_sets(self)
        inside = "inference" if self.setting.kind != MULTI_SCALE else f"fused/{sets[0]}"
        return self.folder / inside / "results.json"


def test_sets(job: Job) -> list[str]:
    """The one data set that a member of an ensemble was evaluated on.

    Raises:
        ValueError: there is none, or there are several.
    """
    while job.cfg is None:
        job = job.sources[0]
    sets = list(job.cfg.DATASETS.TEST)
    if len(sets) != 1:
        raise ValueError(f"{job.name} is a member of an ensemble and needs one set in DATASETS.TEST, found {sets}")
    return sets


def make_jobs(sweep: Sweep) -> list[Job]:
    """All runs of a sweep, those that others need first; every configuration is loaded, which finds its mistakes.

    Raises:
        FileNotFoundError, ValueError: a configuration cannot be loaded, or an ensemble cannot be made.
    """
    jobs: dict[tuple[str, int], Job] = {}
    loaded: dict[str, CfgNode] = {}

    def make(setting: Setting, seed: int) -> Job:
        if (setting.name, seed) in jobs:
            return jobs[setting.name, seed]
        sources = []
        for name in setting.needs:
            other = sweep.settings[name]
            sources.append(make(other, seed if len(other.seeds) > 1 else other.seeds[0]))
        folder = sweep.folder / setting.name / (f"seed{seed}" if sweep.by_seed else "")
        own = ["MODEL.WEIGHTS", str(sources[0].folder / FINAL)] if setting.weights_from is not None else []
        own += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
        cfg = None
        if setting.config is not None:
            if setting.name not in loaded:
                loaded[setting.name] = _load(setting)
            cfg = _with(loaded[setting.name], own)
        job = Job(setting, seed, folder, cfg, [*setting.opts, *own], sources, sweep.by_seed)
        if setting.kind == ENSEMBLE and not sources:
            raise ValueError(f"setting {setting.name!r}: an ensemble needs a row of the sweep, found files only")
        if setting.kind == ENSEMBLE:
            for source in sources:
                source.results()
        jobs[setting.name, seed] = job
        return job

    for setting in sweep.settings.values():
        for seed in setting.seeds:
            make(setting, seed)
    return list(jobs.values())


def _load(setting: Setting) -> CfgNode:
    try:
        return load_cfg(str(setting.config), setting.opts)
    except ValueError as error:
        raise ValueError(f"setting {setting.name!r}: {error}") from error


def _with(cfg: CfgNode, words: list[str]) -> CfgNode:
    """A copy with other values; what loading from the files again would give, without reading them for each seed."""
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list(words)
    copy.freeze()
    return copy


def interpreter(tool: str) -> list[str]:
    """The words that start a tool of ``tools/``."""
    return [sys.executable, str(_TOOLS / f"{tool}.py")]


def commands(job: Job, launcher: Launcher = interpreter) -> list[list[str]]:
    """What to run, one after the other.

    Args:
        launcher: gives the words that start a tool.
    """
    setting = job.setting
    if setting.kind == ENSEMBLE:
        return _ensemble(job, launcher)
    flags = ["--config-file", str(setting.config), "--num-gpus", str(setting.num_gpus)]
    if setting.kind == TRAIN:
        return [[*launcher("train_net"), *flags, "--resume", *job.words]]
    if setting.kind == EVALUATE:
        return [[*launcher("train_net"), *flags, "--eval-only", *job.words]]
    sizes = ["--sizes", *map(str, setting.fusion["sizes"])]
    return [[*launcher("multi_scale_test"), *sizes, *_options(setting.fusion), *flags, *job.words]]


def _ensemble(job: Job, launcher: Launcher) -> list[list[str]]:
    rows = iter(job.sources)
    files = [name if is_result_file(name) else str(next(rows).results()) for name in job.setting.members]
    videos = str(MetadataCatalog.get(test_sets(job)[0]).json_file)
    output = str(job.results())
    fuse = [*launcher("ensemble"), *files, "--gt-or-json", videos, "--output", output]
    command = [*fuse, *_options(job.setting.fusion)]
    if not has_annotations(videos):
        return [command]
    measure = [*launcher("evaluate"), "--gt", videos, "--results", output]
    return [command, [*measure, "--json", str(job.folder / "evaluation.json")]]


def has_annotations(file: str) -> bool:
    """Whether AP can be computed on a YouTube-VIS json."""
    return bool(json.loads(Path(file).read_text(encoding="utf-8")).get("annotations"))


def _options(fusion: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key in ("weights", "iou", "max_num"):
        if key in fusion:
            value = fusion[key]
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _stamps(job: Job) -> dict[str, str | None]:
    """When each run that this one uses was begun: another start is another result."""
    stamps = {}
    for source in job.sources:
        manifest = read_manifest(source.manifest)
        stamps[source.name] = None if manifest is None else manifest["sessions"][0]["started"]
    return stamps


def record_start(job: Job) -> None:
    """Write down what is run, before it is."""
    job.folder.mkdir(parents=True, exist_ok=True)
    content = {"identity": job.identity(), "sources": _stamps(job)}
    write_text_atomic(json.dumps(content, indent=1) + "\n", job.folder / RECORD)


def record_ensemble(job: Job, seconds: float) -> None:
    """The manifest of an ensemble, whose tools write none."""
    measured = job.folder / "evaluation.json"
    results: dict[str, Any] = {}
    if measured.is_file():
        found = json.loads(measured.read_text(encoding="utf-8"))
        stats = zip(found["names"], found["stats"], strict=True)
        results = {"segm": {name: value * 100 if value >= 0 else -1.0 for name, value in stats}}
    content = {
        "format": 1,
        "kind": ENSEMBLE,
        "status": FINISHED,
        "ended": now(),
        "seconds": round(seconds, 3),
        "sessions": [{"started": now(), "seconds": round(seconds, 3), "status": FINISHED}],
        "members": list(job.setting.members),
        "results": results,
    }
    write_text_atomic(json.dumps(content, indent=1) + "\n", job.manifest)


def is_finished(job: Job) -> bool:
    """Whether nothing is left to run."""
    manifest = read_manifest(job.manifest)
    return manifest is not None and manifest["status"] == FINISHED and (job.folder / RECORD).is_file()


def differences(job: Job) -> list[str]:
    """How the run in the folder differs from what the sweep's file says now; empty where it has not begun."""
    record = job.folder / RECORD
    if not record.is_file():
        manifest = read_manifest(job.manifest)
        return [f"{job.manifest} is there, but no {RECORD}: it was not run by a sweep"] if manifest else []
    content = json.loads(record.read_text(encoding="utf-8"))
    harmless = (*_HARMLESS, *(("MODEL.WEIGHTS:",) if job.setting.weights_from is not None else ()))
    changes = [
        change
        for change in config_changes(content["identity"], job.identity())
        # A key of the configuration that one of the two does not have came or went with the code.
        if not change.startswith(harmless) and (_ABSENT not in change or change.startswith("RUN."))
    ]
    stamps = _stamps(job)
    for name, stamp in content["sources"].items():
        if stamp is not None and name in stamps and stamps[name] != stamp:
            changes.append(f"{name}, which it uses, was run again since, or is gone")
    if stamps and content["sources"] and stamps.keys() != content["sources"].keys():
        changes.append(f"it uses {', '.join(stamps)} instead of {', '.join(content['sources'])}")
    return changes


def progress(job: Job) -> float:
    """Part of its iterations that a running training has done, 0 for others."""
    if job.setting.kind != TRAIN or job.cfg is None:
        return 0.0
    return iterations(job.folder, job.cfg.SOLVER.MAX_ITER)["done"] / max(job.cfg.SOLVER.MAX_ITER, 1)
