"""Sweeps: what the yaml may say, killing and continuing, what failed, and the table."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vis.engine import load_cfg
from vis.engine.manifest import read_manifest
from vis.engine.plain_yaml import override_words
from vis.engine.processes import FolderInUse, FolderLock
from vis.engine.sweep import Outcome, SweepChanged, local_start, run_sweep, table
from vis.engine.sweep_file import read_sweep
from vis.engine.sweep_jobs import Launcher, differences, make_jobs, record_start
from vis.engine.sweep_table import Row, as_csv, as_latex, as_markdown

SWEEP = """
name: tried
output: "{output}"
config: {config}
overrides: {{DATASETS.TEST: [training_stub_train], SOLVER.MAX_ITER: 8}}
seeds: [0, 1, 2]
metrics: [AP, AR10, train_time]
settings:
  base: {{label: "as it is"}}
  wide: {{overrides: {{MODEL.STUB.WIDTH: 7}}, published: 12.5}}
  longer: {{weights_from: base, overrides: {{SOLVER.MAX_ITER: 6}}}}
  tested: {{weights_from: base, eval_only: true, overrides: {{INPUT.MIN_SIZE_TEST: 40}}}}
"""


@pytest.fixture
def sweep_file(stub_config: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Writes a sweep of the stub training."""
    config = stub_config("unused")

    def write(text: str) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(text.format(output=tmp_path / "sweeps", config=config.name))
        return path

    return write


def run(path: Path, launcher: Launcher, **options: Any) -> Outcome:
    return run_sweep(read_sweep(path), jobs=2, threads=1, start=local_start(launcher), **options)


def finished(folder: Path) -> int:
    manifests = [read_manifest(path) for path in folder.rglob("manifest.json")]
    return sum(manifest is not None and manifest["status"] == "finished" for manifest in manifests)


@pytest.mark.slow
def test_killed_twice_and_continued(sweep_file: Callable[[str], Path], launcher: Launcher, tmp_path: Path) -> None:
    """Four settings, three seeds, SIGKILL to the sweep in the middle of its runs; the table is complete in the end."""
    path, folder = sweep_file(SWEEP), tmp_path / "sweeps" / "tried"
    for until in (2, 7):
        process = multiprocessing.get_context("fork").Process(target=run, args=(path, launcher))
        process.start()
        end = time.monotonic() + 240
        while finished(folder) < until:
            assert time.monotonic() < end
            assert process.is_alive()
            time.sleep(0.02)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert finished(folder) < 12
    outcome = run(path, launcher)
    assert not outcome.failed
    assert len(outcome.finished) + len(outcome.skipped) == 12
    assert len(outcome.skipped) >= 7
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["setting"], row["seeds"], row["AP n"]) for row in rows] == [
        (name, "3", "3") for name in ("base", "wide", "longer", "tested")
    ]
    assert [bool(row["train_time"]) for row in rows] == [True, True, True, False]
    text = (folder / "table.md").read_text()
    assert "| as it is | 3 | 0.00 ± 0.00 |  |" in text
    assert "| 12.5 |" in text

    again = run(path, launcher)
    assert again.finished == []
    assert len(again.skipped) == 12
    assert table(read_sweep(path)) == text

    changed = sweep_file(SWEEP.replace("WIDTH: 7", "WIDTH: 9"))
    with pytest.raises(SweepChanged, match=r"(?s)wide/seed0: MODEL.STUB.WIDTH: 7 -> 9.*--rerun-changed"):
        run(changed, launcher)
    assert sorted(run(changed, launcher, set_aside=True).finished) == ["wide/seed0", "wide/seed1", "wide/seed2"]
    assert (folder / "wide" / "seed0.old1" / "model_final.pth").exists()


@pytest.mark.slow
def test_what_uses_a_run_that_is_done_anew_is_done_anew(sweep_file: Callable[[str], Path], launcher: Launcher) -> None:
    text = SWEEP.replace("[0, 1, 2]", "[4]")
    run(sweep_file(text), launcher)
    time.sleep(1.1)  # starts are told apart by their second
    changed = sweep_file(text.replace("MAX_ITER: 8", "MAX_ITER: 9"))
    outcome = run(changed, launcher, set_aside=True)
    assert sorted(outcome.finished) == ["base/seed4", "longer/seed4", "tested/seed4", "wide/seed4"]
    assert not run(changed, launcher).finished


@pytest.mark.slow
def test_a_failing_run_is_told_and_the_others_go_on(sweep_file: Callable[[str], Path], launcher: Launcher) -> None:
    text = SWEEP.replace("[0, 1, 2]", "[0]") + "  bad: {{overrides: {{MODEL.STUB.NAN_AT: 5}}}}\n"
    text += (
        "  after: {{weights_from: bad}}\n  scales: {{weights_from: wide, multi_scale: {{sizes: [32, 40], iou: 0.6}}}}\n"
    )
    text += "  fused: {{ensemble: {{of: [base, scales], weights: [1, 2]}}}}\n"
    path = sweep_file(text)
    outcome = run(path, launcher)
    assert sorted(outcome.failed) == ["after/seed0", "bad/seed0"]
    assert "the loss is not finite at iteration 5" in outcome.failed["bad/seed0"]
    assert outcome.failed["after/seed0"] == "needs bad/seed0, which failed"
    assert sorted(outcome.finished) == [
        f"{name}/seed0" for name in ("base", "fused", "longer", "scales", "tested", "wide")
    ]
    manifest = read_manifest(read_sweep(path).folder / "bad" / "seed0" / "manifest.json")
    assert manifest is not None
    assert manifest["status"] == "failed"
    assert manifest["error"].startswith("FloatingPointError: the loss is not finite")
    assert "0 of 1" in table(read_sweep(path))
    # The stub counts the steps of its process, so that it gets past the bad one when it is continued.
    assert sorted(run(path, launcher).finished) == ["after/seed0", "bad/seed0"]
    assert "Resumed from" in (read_sweep(path).folder / "bad" / "seed0" / "console.txt").read_text()


def test_an_ensemble_is_of_the_same_seed(sweep_file: Callable[[str], Path]) -> None:
    text = SWEEP + "  one: {{seeds: [5]}}\n  fused: {{ensemble: [base, one]}}\n"
    jobs = {job.name: job for job in make_jobs(read_sweep(sweep_file(text)))}
    assert [job.name for job in jobs["fused/seed2"].sources] == ["base/seed2", "one/seed5"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metrics:", "metriks:", "unknown key 'metriks'. Did you mean 'metrics'"),
        ("eval_only:", "eval_onli:", "tested: unknown key 'eval_onli'. Did you mean 'eval_only'"),
        (
            "weights_from: base, eval",
            "weights_from: bas, eval",
            "tested needs 'bas', which is not a setting. Did you mean 'base'",
        ),
        ("[0, 1, 2]", "[0, 0]", "expected different numbers"),
        ("[0, 1, 2]", "[-1]", "would draw a seed by chance"),
        ("config: {config}", "config: nowhere.yaml", "'nowhere.yaml' does not exist"),
        ("name: tried", "name: ../tried", "becomes a folder"),
        ("settings:", "grid: {{}}\nsettings:", "either `settings` .* or `grid`"),
        ("weights_from: base, eval", "weights_from: tested, eval", "trains nothing"),
        ("name: tried", "name: !!python/object:os.path {{}}", "plain yaml"),
        ("weights_from: base, overrides", "weights_from: longer, overrides", "in a circle: longer -> longer"),
        ("published: 12.5", "published: good", "must be a number"),
        ("MODEL.STUB.WIDTH: 7", "MODEL.STUB.WIDTH: ", "has no value"),
    ],
)
def test_mistakes_in_the_file(sweep_file: Callable[[str], Path], old: str, new: str, message: str) -> None:
    assert old in SWEEP
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_sweep(sweep_file(SWEEP.replace(old, new)))


def test_a_wrong_key_of_the_configuration_is_found_before_anything_runs(
    sweep_file: Callable[[str], Path], launcher: Launcher, tmp_path: Path
) -> None:
    path = sweep_file(SWEEP.replace("STUB.WIDTH", "STUB.WITH"))
    with pytest.raises(ValueError, match=r"setting 'wide': .*MODEL.STUB.WITH.*WIDTH"):
        run(path, launcher)
    assert not list((tmp_path / "sweeps").rglob("seed*"))


def test_a_run_has_the_configuration_of_its_command(sweep_file: Callable[[str], Path]) -> None:
    for job in make_jobs(read_sweep(sweep_file(SWEEP))):
        assert job.cfg == load_cfg(str(job.setting.config), job.words)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weights_from: base, eval_only", "weights_from: wide, eval_only", "uses wide/seed0 instead of base/seed0"),
        ("sizes: [40]", "sizes: [40], iou: 0.7", "RUN.iou: (absent) -> 0.7"),
    ],
)
def test_changes_of_what_a_run_uses(sweep_file: Callable[[str], Path], old: str, new: str, message: str) -> None:
    """Other weights, and an option that was left out before."""
    text = SWEEP + "  sized: {{weights_from: base, multi_scale: {{sizes: [40]}}}}\n"
    for job in make_jobs(read_sweep(sweep_file(text))):
        record_start(job)
    assert not any(map(differences, make_jobs(read_sweep(sweep_file(text)))))
    found = [differences(job) for job in make_jobs(read_sweep(sweep_file(text.replace(old, new)))) if job.seed == 0]
    assert [message in "; ".join(changes) for changes in found if changes] == [True]


def test_a_grid(sweep_file: Callable[[str], Path]) -> None:
    text = SWEEP.split("settings:")[0] + "grid: {{MODEL.STUB.WIDTH: [5, 7], SOLVER.BASE_LR: [0.1, 0.2, 0.3]}}\n"
    sweep = read_sweep(sweep_file(text))
    assert list(sweep.settings)[:2] == ["WIDTH=5,BASE_LR=0.1", "WIDTH=5,BASE_LR=0.2"]
    jobs = make_jobs(sweep)
    assert len({job.folder for job in jobs}) == 18
    assert jobs[-1].cfg is not None
    assert (jobs[-1].cfg.MODEL.STUB.WIDTH, jobs[-1].cfg.SOLVER.BASE_LR, jobs[-1].cfg.SEED) == (7, 0.3, 2)


def test_override_words() -> None:
    tree = {"A.B": "rs", "C": {"D": [1, "x"], "E": {"F": "7"}}, "G": False}
    assert override_words(tree, "here") == ["A.B", "rs", "C.D", "[1, 'x']", "C.E.F", "'7'", "G", "False"]


def test_table() -> None:
    """Numbers worked out by hand; percent signs and underscores survive LaTeX."""
    metrics = ["AP", "train_time", "memory"]
    rows = [Row("a", "50%_a", 3), Row("b", "b", 3, published=31.0)]
    for seed, ap in enumerate((10.0, 11.0, 15.0)):
        manifest = {"results": {"segm": {"AP": ap, "AP50": 1.0}}, "iterations": {"train_seconds": 3600 + seed}}
        rows[0].add(seed, manifest, metrics)
    rows[1].add(0, {"results": {"segm": {"AP": 9.5}}, "peak_memory_mib": 312.4}, metrics)
    head, _, first, second = as_markdown(rows, metrics, "a").splitlines()
    assert head == "| setting | seeds | AP | Δ AP | train time | memory (MiB) | published |"
    assert first == "| 50%_a | 3 | 12.00 ± 2.65 |  | 1 h 00 min ± 1.0 s | – |  |"
    assert second == "| b | 1 of 3 | 9.50 | −2.50 | – | 312 | 31.0 |"
    assert r"50\%\_a & 3 & 12.00 $\pm$ 2.65 &  &" in as_latex(rows, metrics, "a")
    parsed = list(csv.DictReader(as_csv(rows, metrics, "a").splitlines()))
    assert (parsed[0]["AP"], parsed[0]["AP std"], parsed[0]["AP n"]) == ("12.0", "2.645751", "3")
    assert parsed[1]["AP delta"] == "-2.5"


def test_several_data_sets_and_what_was_not_measured() -> None:
    rows = [Row("a", "a", 1)]
    rows[0].add(0, {"results": {"x": {"segm": {"AP": 1.0}}, "y": {"segm": {"AP": 2.0, "APl": -1.0}}}}, ["AP", "APl"])
    assert rows[0].numbers == {"x/AP": [1.0], "y/AP": [2.0]}


def test_one_sweep_at_a_time(sweep_file: Callable[[str], Path], launcher: Launcher) -> None:
    path = sweep_file(SWEEP)
    lock = FolderLock(read_sweep(path).folder)
    with pytest.raises(FolderInUse, match=f"in use by another process .*{os.getpid()}"):
        run(path, launcher)
    lock.close()


def test_every_sweep_of_the_project_loads(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of settings, files and keys are right; runs have folders of their own."""
    monkeypatch.chdir(project_root)
    files = sorted((project_root / "configs" / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        jobs = make_jobs(read_sweep(file))
        assert len({job.folder for job in jobs}) == len(jobs) > 1
        assert json.dumps([job.identity() for job in jobs])
