"""A sweep's yaml file: settings by name or as a grid, seeds, and rows that use the weights or results of other rows.

name: dvis_noise                # default: the name of the file
output: output/sweeps           # runs go to OUTPUT/<name>/<setting>/seed<k>; relative to where the command is run
config: ../dvis/x.yaml          # of every setting that names none; relative to this file
overrides: {SOLVER.MAX_ITER: 100}
seeds: [0, 1, 2]
baseline: none                  # default: the first setting
metrics: [AP, AP50, train_time]
settings:                       # or `grid: {KEY: [value, ...], ...}`
  none: {overrides: {MODEL.TRACKER.NOISE_MODE: none}, label: "no noise", published: 30.5}
  tested: {weights_from: none, eval_only: true, overrides: {INPUT.MIN_SIZE_TEST: 480}}
  scales: {weights_from: none, multi_scale: {sizes: [360, 480]}}
  fused: {ensemble: [none, scales]}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vis.config import closest
from vis.engine.plain_yaml import beside, check_keys, check_name, check_type, override_words, read_plain_yaml

_TOP = ("name", "output", "config", "overrides", "seeds", "baseline", "metrics", "settings", "grid", "num_gpus")
_SETTING: tuple[str, ...] = ("name", "label", "published", "config", "overrides", "seeds", "num_gpus", "in_table")
_SETTING += ("eval_only", "weights_from", "multi_scale", "ensemble")
_FUSION = ("weights", "iou", "max_num")
TRAIN, EVALUATE, MULTI_SCALE, ENSEMBLE = "training", "evaluation", "multi-scale test", "ensemble"
METRICS = ("AP", "AP50", "AP75", "AR1", "AR10", "train_time")


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        config: the yaml to run; None for an ensemble. opts: ``KEY VALUE ...`` over it.
        weights_from: the row whose ``model_final.pth`` it starts from or evaluates.
        members: rows, or result files (.json, .zip), of an ensemble.
        fusion: arguments of the multi-scale test or of the ensemble.
        published: what the paper gives for the first metric.
        in_table: False for a run that only makes weights for others.
    """

    name: str
    label: str
    kind: str
    config: Path | None
    opts: tuple[str, ...]
    seeds: tuple[int, ...]
    weights_from: str | None = None
    members: tuple[str, ...] = ()
    fusion: Mapping[str, Any] = field(default_factory=dict)
    published: float | None = None
    num_gpus: int = 1
    in_table: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows that have to be there first."""
        rows = tuple(name for name in self.members if not is_result_file(name))
        return rows if self.weights_from is None else (self.weights_from, *rows)


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says.

    Attributes:
        by_seed: a setting's folder has one for each seed; else it is that of its only run.
    """

    name: str
    folder: Path
    settings: dict[str, Setting]
    baseline: str
    metrics: tuple[str, ...]
    by_seed: bool = True


def is_result_file(name: str) -> bool:
    """Whether a member of an ensemble is a file, not a row."""
    return name.endswith((".json", ".zip"))


def read_sweep(path: str | Path, output: str | None = None) -> Sweep:
    """Read and check a sweep's file; configurations are not loaded.

    Args:
        output: takes the place of ``output`` in the file.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or says something that cannot be run.
    """
    file = Path(path)
    tree = read_plain_yaml(file, _TOP, "sweep")
    name = check_name(tree.get("name", file.stem), f"{file}: name")
    if ("settings" in tree) == ("grid" in tree):
        raise ValueError(f"{file}: give either `settings` (rows by name) or `grid` (values of keys)")
    bodies = _grid(tree["grid"], file) if "grid" in tree else named_bodies(tree["settings"], file)
    settings = make_settings(bodies, tree, file)
    rows = [name for name, setting in settings.items() if setting.in_table]
    baseline = str(tree.get("baseline", rows[0] if rows else ""))
    if baseline not in rows:
        raise ValueError(f"{file}: baseline {baseline!r} is not a row of the table.{closest(baseline, rows)}")
    metrics = check_type(tree.get("metrics", list(METRICS)), list, f"{file}: metrics", "a list of names")
    folder = Path(output or tree.get("output", "output/sweeps")) / name
    return Sweep(name, folder, settings, baseline, tuple(map(str, metrics)))


def make_settings(bodies: Mapping[str, dict[str, Any]], top: dict[str, Any], file: Path) -> dict[str, Setting]:
    """The settings that a file describes, checked against one another.

    Args:
        bodies: what the file says of each. top: what it says of all.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_sweep`.
    """
    settings = {name: _setting(name, body, top, file) for name, body in bodies.items()}
    _check_needs(settings, file)
    return _inherit(settings, file)


def named_bodies(bodies: Any, file: Path) -> dict[str, dict[str, Any]]:
    """Settings by name, from a mapping or from a list whose entries have a ``name``."""
    if isinstance(bodies, Mapping):
        bodies = [
            {"name": name, **check_keys(body or {}, _SETTING, f"{file}: {name}")} for name, body in bodies.items()
        ]
    named: dict[str, dict[str, Any]] = {}
    for body in check_type(bodies, list, f"{file}: settings", "rows by name, or a list of them"):
        body = check_keys(body, _SETTING, f"{file}: settings")
        name = check_name(body.get("name"), f"{file}: name of a setting")
        if name in named:
            raise ValueError(f"{file}: two settings are called {name!r}")
        named[name] = body
    if not named:
        raise ValueError(f"{file}: there are no settings")
    return named


def _grid(grid: Any, file: Path) -> dict[str, dict[str, Any]]:
    """Every combination of the values; a name tells the last part of each key and its value."""
    values = check_type(grid, Mapping, f"{file}: grid", "a mapping KEY: [value, ...]")
    for key, choices in values.items():
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"{file}: grid.{key} must be a list of values, found {choices!r}")
    named: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*values.values()):
        overrides = dict(zip(values, combination, strict=True))
        label = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in overrides.items())
        name = ",".join(f"{key.split('.')[-1]}={value}" for key, value in overrides.items())
        name = re.sub(r"[^A-Za-z0-9._=+,-]+", "_", name)
        if name in named:
            raise ValueError(
                f"{file}: two combinations of the grid would be called {name!r}: use `settings` with names"
            )
        named[name] = {"overrides": overrides, "label": label}
    return named


def _setting(name: str, body: dict[str, Any], top: dict[str, Any], file: Path) -> Setting:
    where = f"{file}: {name}"
    kinds = [key for key in ("eval_only", "multi_scale", "ensemble") if body.get(key)]
    if len(kinds) > 1:
        raise ValueError(
            f"{where}: {' and '.join(kinds)} exclude one another; a row of its own can use another's result"
        )
    kind = {"eval_only": EVALUATE, "multi_scale": MULTI_SCALE, "ensemble": ENSEMBLE}[kinds[0]] if kinds else TRAIN
    source = body.get("weights_from")
    config = body.get("config", top.get("config") if source is None or kind == TRAIN else None)
    if kind == ENSEMBLE:
        wrong = [key for key in ("config", "overrides", "weights_from") if key in body]
        if wrong:
            raise ValueError(f"{where}: an ensemble uses results of other rows; {', '.join(wrong)} mean nothing for it")
        config = None
    elif config is None and source is None:
        raise ValueError(f"{where}: no config; name one here or for the whole sweep")
    words: list[str] = []
    if config is not None:  # a test of another row's weights has what that row has
        words += override_words(top.get("overrides"), f"{file}: overrides")
    words += override_words(body.get("overrides"), f"{where}: overrides")
    published = body.get("published")
    if published is not None:
        published = float(check_type(published, (int, float), f"{where}: published", "a number"))
    members, fusion = _fusion(kind, body, where)
    return Setting(
        name=name,
        label=str(body.get("label", name)),
        kind=kind,
        config=None if config is None else beside(file, config, f"{where}: config"),
        opts=tuple(words),
        seeds=_seeds(body.get("seeds", top.get("seeds", [0])), f"{where}: seeds"),
        weights_from=None if source is None else check_type(source, str, f"{where}: weights_from", "a setting's name"),
        members=members,
        fusion=fusion,
        published=published,
        num_gpus=check_type(body.get("num_gpus", top.get("num_gpus", 1)), int, f"{where}: num_gpus", "a number"),
        in_table=check_type(body.get("in_table", True), bool, f"{where}: in_table", "true or false"),
    )


def _fusion(kind: str, body: dict[str, Any], where: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Members and options of a fusion; an ensemble is a list, or a mapping with ``of``."""
    if kind == MULTI_SCALE:
        options = check_keys(body["multi_scale"], ("sizes", *_FUSION), f"{where}: multi_scale")
        sizes = options.get("sizes")
        if not isinstance(sizes, list) or not sizes or not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"{where}: multi_scale needs sizes: [pixels, ...], found {sizes!r}")
        return (), options
    if kind != ENSEMBLE:
        return (), {}
    options = body["ensemble"]
    options = {"of": options} if isinstance(options, list) else check_keys(options, ("of", *_FUSION), where)
    members = check_type(options.pop("of", None), list, f"{where}: ensemble", "a list of settings")
    if len(members) < 2:
        raise ValueError(f"{where}: an ensemble needs two settings or result files, found {members}")
    return tuple(map(str, members)), dict(options)


def _seeds(seeds: Any, where: str) -> tuple[int, ...]:
    numbers = [seeds] if isinstance(seeds, int) else check_type(seeds, list, where, "a list of numbers")
    for seed in numbers:
        if check_type(seed, int, where, "numbers from 0 on") < 0:
            raise ValueError(f"{where}: {seed} would draw a seed by chance; use numbers from 0 on")
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"{where}: expected different numbers, found {numbers}")
    return tuple(numbers)


def _check_needs(settings: Mapping[str, Setting], file: Path) -> None:
    for setting in settings.values():
        where = f"{file}: {setting.name}"
        for name in setting.needs:
            if name not in settings:
                raise ValueError(f"{where} needs {name!r}, which is not a setting.{closest(name, settings)}")
            other = settings[name]
            if name == setting.weights_from and other.kind != TRAIN:
                raise ValueError(f"{where}: weights_from {name!r}, which trains nothing (it is {other.kind})")
            if len(other.seeds) > 1 and not set(setting.seeds) <= set(other.seeds):
                raise ValueError(f"{where} has seeds {list(setting.seeds)}, but {name!r} only {list(other.seeds)}")
        if (
            setting.kind in (EVALUATE, MULTI_SCALE)
            and setting.weights_from is None
            and "MODEL.WEIGHTS" not in setting.opts
        ):
            raise ValueError(f"{where}: {setting.kind} of what? Give weights_from, or MODEL.WEIGHTS in overrides")
        _check_circle(setting.name, settings, (), file)


def _check_circle(name: str, settings: Mapping[str, Setting], chain: tuple[str, ...], file: Path) -> None:
    if name in chain:
        raise ValueError(f"{file}: settings need one another in a circle: {' -> '.join((*chain, name))}")
    for other in settings[name].needs:
        if other in settings:
            _check_circle(other, settings, (*chain, name), file)


def _inherit(settings: dict[str, Setting], file: Path) -> dict[str, Setting]:
    """A row without a config takes that of the row whose weights it uses, with its overrides."""
    found = {}
    for name, setting in settings.items():
        if setting.config is None and setting.weights_from is not None:
            source = settings[setting.weights_from]
            if source.config is None:
                raise ValueError(f"{file}: {name}: name its config")
            setting = replace(setting, config=source.config, opts=(*source.opts, *setting.opts))
        found[name] = setting
    return found
