"""A recipe: the stages of a method, each trained on the weights of the one before, from one yaml and one command.

    name: dvis_ovis_r50             # default: the name of the file
    output: output/recipes          # stages go to OUTPUT/<name>/<stage>; relative to where the command is run
    overrides: {SOLVER.AMP.ENABLED: false}   # of every stage with a config of its own
    seed: 0
    stages:
      - {name: segmenter, config: ../dvis/ovis_segmenter_r50.yaml}       # starts from MODEL.WEIGHTS of its config
      - {name: online, config: ../dvis/ovis_online_r50.yaml}             # starts from the stage before
      - {name: offline, config: ../dvis/ovis_offline_r50.yaml, weights_from: online, overrides: {...}}
      - {name: scales, multi_scale: {sizes: [360, 480]}}                  # tests the training before

A stage may be whatever a row of a sweep may be (:mod:`vis.engine.sweep_file`). ``weights_from: ""`` starts from the
config's own ``MODEL.WEIGHTS`` instead.

What a stage hands over is compared with what the next one accepts before the first one starts, on models that are built
for it, and again when the file is there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from vis.checkpoint import build_class_map, load_state, read_weights
from vis.checkpoint.files import WeightFile
from vis.config import CfgNode, closest
from vis.engine.manifest import RUNNING, iterations, read_manifest
from vis.engine.plain_yaml import check_type, read_plain_yaml
from vis.engine.processes import FolderInUse, FolderLock, Running
from vis.engine.state import FINAL
from vis.engine.sweep import Start, WrongWeights, local_start
from vis.engine.sweep_file import ENSEMBLE, TRAIN, Setting, Sweep, check_name, make_settings, named_bodies
from vis.engine.sweep_jobs import Job, is_finished
from vis.engine.sweep_table import measure
from vis.modeling import build_model

logger = logging.getLogger(__name__)

_TOP = ("name", "output", "config", "overrides", "seed", "num_gpus", "stages")
_METRICS = ("AP", "AP50", "AP75", "AR1", "AR10", "train_time")


def read_recipe(
    path: str | Path,
    *,
    output: str | None = None,
    first: str | None = None,
    weights: str | None = None,
    num_gpus: int | None = None,
) -> Sweep:
    """Read and check a recipe's file; its stages are settings of a sweep with one run each.

    Args:
        output, num_gpus: take the place of those in the file.
        first: the stage to begin with; those before it are left out of the result.
        weights: a file that this stage starts from, instead of the stage before it.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or says something that cannot be run.
    """
    file = Path(path)
    tree = read_plain_yaml(file, _TOP, "recipe")
    name = check_name(tree.get("name", file.stem), f"{file}: name")
    bodies = named_bodies(check_type(tree.get("stages"), list, f"{file}: stages", "a list"), file)
    wrong = [stage for stage, body in bodies.items() if "seeds" in body]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]}: a recipe has one seed, `seed: N` beside `stages`; sweeps have several")
    seed = check_type(tree.pop("seed", 0), int, f"{file}: seed", "a number from 0 on")
    top = {**tree, "seeds": [seed]}
    before = None
    for stage, body in bodies.items():
        fused = body.get("ensemble")
        if body.setdefault("weights_from", before) in (None, "") or fused:
            del body["weights_from"]
        if not fused and not body.get("eval_only") and not body.get("multi_scale"):
            before = stage
    settings = make_settings(bodies, top, file)
    if num_gpus is not None:
        settings = {key: replace(setting, num_gpus=num_gpus) for key, setting in settings.items()}
    folder = Path(output or tree.get("output", "output/recipes")) / name
    settings = _from_stage(settings, first, weights, folder, file)
    return Sweep(name, folder, settings, next(iter(settings)), _METRICS, by_seed=False)


def _from_stage(
    settings: dict[str, Setting], first: str | None, weights: str | None, folder: Path, file: Path
) -> dict[str, Setting]:
    """The stages from ``first`` on, with files in place of what they used of the earlier ones."""
    if first is None and weights is None:
        return settings
    first = first or next(iter(settings))
    if first not in settings:
        raise ValueError(f"{file} has no stage {first!r}.{closest(first, settings)} Stages: {', '.join(settings)}")
    names = list(settings)
    earlier = names[: names.index(first)]
    found = {}
    for name in names[len(earlier) :]:
        setting = settings[name]
        given = weights if name == first else None
        if given is None and setting.weights_from in earlier:
            given = str(folder / str(setting.weights_from) / FINAL)
            if not Path(given).is_file():
                raise FileNotFoundError(
                    f"stage {name!r} starts from stage {setting.weights_from!r}, but {given} does not exist: begin "
                    f"with --from {setting.weights_from}, or name a file by --from {name} --weights FILE"
                )
        if given is not None:
            setting = replace(setting, weights_from=None, opts=(*setting.opts, "MODEL.WEIGHTS", given))
        gone = [member for member in setting.members if member in earlier]
        if gone:
            raise ValueError(f"stage {name!r} is an ensemble of {gone[0]!r}, which --from {first} leaves out")
        found[name] = setting
    return found


def check_handovers(jobs: Sequence[Job]) -> None:
    """Compare what each stage will write with what the next one accepts, before hours of training.

    Models are built on the CPU for it, one after the other.

    Raises:
        WrongWeights: two stages do not fit together.
    """
    for job in jobs:
        source = job.sources[0] if job.setting.weights_from is not None else None
        if source is None or is_finished(source):
            continue  # a finished one is looked at itself
        assert source.cfg is not None
        state = {name: value.detach() for name, value in _model(source.cfg).state_dict().items()}
        _compare(job, f"what stage {source.setting.name!r} will write ({source.setting.config})", state)


def check_file(job: Job) -> None:
    """Compare the file that a stage starts from with its model.

    Raises:
        WrongWeights: it is not one that the stage accepts.
    """
    source = job.sources[0]
    path = source.folder / FINAL
    try:
        state = read_weights(path).state
    except (ValueError, FileNotFoundError) as error:
        raise WrongWeights(f"stage {job.setting.name!r}: {error}") from error
    _compare(job, str(path), state)


def _model(cfg: CfgNode) -> Any:
    copy = cfg.clone()
    copy.defrost()
    copy.MODEL.DEVICE = "cpu"
    copy.freeze()
    return build_model(copy)


def _compare(job: Job, what: str, state: dict[str, Tensor]) -> None:
    cfg = job.cfg
    assert cfg is not None
    training = job.setting.kind == TRAIN
    try:
        report = load_state(
            *(_model(cfg), WeightFile(state, backbone_only=False, path=Path(what)), what),
            allow_missing=tuple(cfg.MODEL.WEIGHTS_ALLOW_MISSING) if training else (),
            training=training,
            class_map=build_class_map(cfg) if training else None,
        )
    except ValueError as error:
        raise WrongWeights(f"stage {job.setting.name!r} ({job.setting.config}) cannot start: {error}") from error
    logger.info("%s takes %s", job.setting.name, report.summary())


def checked_start(start: Start | None = None) -> Start:
    """``start`` (here, by default), but a stage whose file does not fit is not started.

    Raises:
        WrongWeights: when it is called for such a stage.
    """
    inner = start or local_start()

    def begin(job: Job, environment: dict[str, str]) -> Running:
        if job.setting.weights_from is not None:
            check_file(job)
        return inner(job, environment)

    return begin


def status(jobs: Sequence[Job], metric: str = "AP") -> str:
    """A table: how far each stage is, what came of it and where it is."""
    lines = []
    for job in jobs:
        manifest = read_manifest(job.manifest)
        state = "not started" if manifest is None else manifest["status"]
        if state == RUNNING and not _in_use(job.folder):
            state = "killed"
        done = ""
        if job.setting.kind == TRAIN and job.cfg is not None:
            count = iterations(job.folder, job.cfg.SOLVER.MAX_ITER)
            done = f"{count['done']} / {count['total']}"
        numbers = measure(manifest or {}, [metric])
        weights = "" if job.cfg is None else job.cfg.MODEL.WEIGHTS
        source = job.setting.weights_from or (
            weights if job.setting.kind != ENSEMBLE else ", ".join(job.setting.members)
        )
        cells = [job.setting.name, job.setting.kind, state, done, ", ".join(f"{n:.2f}" for n in numbers.values())]
        lines.append([*cells, source, str(job.folder)])
    headers = ["stage", "kind", "status", "iterations", metric, "from", "folder"]
    return tabulate(lines, headers=headers, tablefmt="presto", disable_numparse=True)


def _in_use(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        FolderLock(folder).close()
    except FolderInUse:
        return True
    return False
