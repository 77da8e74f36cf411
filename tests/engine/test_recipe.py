"""Recipes: stages in a row, a kill in the second, hand-overs that do not fit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vis.data.synthetic import generate
from vis.engine.manifest import read_manifest
from vis.engine.processes import Child
from vis.engine.recipe import check_handovers, checked_start, read_recipe, status
from vis.engine.sweep import Outcome, WrongWeights, local_start, run_sweep
from vis.engine.sweep_jobs import Launcher, make_jobs

TINY = """
name: tiny
output: {output}
overrides:
  MODEL.DEVICE: cpu
  SOLVER: {{MAX_ITER: 3, CHECKPOINT_PERIOD: 1, IMS_PER_BATCH: 1}}
  INPUT: {{SAMPLING_FRAME_NUM: 2, SAMPLING_FRAME_RANGE: 1, MIN_SIZE_TRAIN: [48]}}
  TEST.EVAL_PERIOD: 0
  DATASETS.TEST: []
stages:
  - {{name: segmenter, config: {configs}/dvis_segmenter_synthetic.yaml, overrides: {{INPUT.SAMPLING_FRAME_NUM: 1}}}}
  - {{name: online, config: {configs}/dvis_online_synthetic.yaml}}
  - {{name: offline, config: {configs}/dvis_offline_synthetic.yaml}}
"""


@pytest.fixture
def recipe(tmp_path: Path, project_root: Path) -> Callable[[str], Path]:
    """Writes a recipe."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text.format(output=tmp_path / "recipes", configs=project_root / "configs" / "demo"))
        return path

    return write


def run(path: Path, launcher: Launcher, **options: Any) -> Outcome:
    start = checked_start(local_start(launcher))
    return run_sweep(read_recipe(path, **options), threads=1, start=start, check=check_handovers)


@pytest.mark.slow
def test_three_stages_killed_in_the_second(
    recipe: Callable[[str], Path],
    launcher: Launcher,
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tiny DVIS: one command trains its three stages; after SIGKILL in stage 2 it goes on there."""
    monkeypatch.chdir(project_root)  # where the weights that ship are named from
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    sizes = {"num_videos": {"train": 3, "val": 1}}
    generate("synthetic_ytvis", tmp_path, **sizes)
    generate("synthetic_ovis", tmp_path, **sizes)
    path, folder = recipe(TINY), tmp_path / "recipes" / "tiny"
    process = multiprocessing.get_context("fork").Process(target=run, args=(path, launcher))
    process.start()
    end = time.monotonic() + 240
    while not (folder / "online" / "model_0000000.pth").exists():
        assert time.monotonic() < end
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (folder / "offline").exists()
    assert "| finished" in status(make_jobs(read_recipe(path)))

    outcome = run(path, launcher)
    assert outcome.skipped == ["segmenter"]
    assert outcome.finished == ["online", "offline"]
    assert "Resumed from" in (folder / "online" / "console.txt").read_text()
    log = (folder / "offline" / "console.txt").read_text()
    assert f"{folder}/online/model_final.pth" in log
    manifest = read_manifest(folder / "online" / "manifest.json")
    assert manifest is not None
    assert [session["status"] for session in manifest["sessions"]] == ["killed", "finished"]
    assert manifest["iterations"]["done"] == 3
    assert run(path, launcher).skipped == ["segmenter", "online", "offline"]

    # A file of another stage in the place of the one that is handed over is found before the stage starts.
    (folder / "online" / "model_final.pth").write_bytes((folder / "segmenter" / "model_final.pth").read_bytes())
    (folder / "offline").rename(folder / "aside")
    outcome = run(path, launcher)
    assert "is a MinVIS segmenter" in outcome.failed["offline"]
    assert not (folder / "offline" / "console.txt").exists()
    # From a stage on, with a file.
    outcome = run(path, launcher, first="offline", weights=str(folder / "aside" / "model_final.pth"))
    assert outcome.finished == ["offline"]


def test_a_wrong_hand_over_is_refused_before_anything_runs(
    recipe: Callable[[str], Path], tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offline stage on a segmenter: the tracker would be random."""
    monkeypatch.chdir(project_root)
    lines = TINY.splitlines()
    path = recipe("\n".join(line for line in lines if "online_synthetic" not in line))
    started: list[str] = []

    def start(*args: Any) -> Child:
        started.append("")
        raise AssertionError

    with pytest.raises(WrongWeights, match=r"(?s)stage 'offline'.*what stage 'segmenter' will write.*MinVIS segmenter"):
        run_sweep(read_recipe(path), threads=1, start=start, check=check_handovers)
    assert not started


def test_from_a_stage_needs_what_it_starts_from(recipe: Callable[[str], Path], tmp_path: Path) -> None:
    path = recipe(TINY)
    with pytest.raises(FileNotFoundError, match=r"stage 'online' starts from stage 'segmenter', but .* does not exist"):
        read_recipe(path, first="online")
    with pytest.raises(ValueError, match="no stage 'onlin'. Did you mean 'online'"):
        read_recipe(path, first="onlin")
    found = read_recipe(path, first="online", weights="x.pth", num_gpus=3)
    assert list(found.settings) == ["online", "offline"]
    assert found.settings["online"].opts[-2:] == ("MODEL.WEIGHTS", "x.pth")
    assert found.settings["offline"].weights_from == "online"
    assert found.settings["offline"].num_gpus == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages:", "stagez:", "unknown key 'stagez'. Did you mean 'stages'"),
        ("name: offline,", "name: offline, seeds: [1],", "a recipe has one seed"),
        ("name: offline,", "name: online,", "two settings are called 'online'"),
        ("name: offline,", "name: offline, weights_from: segmentr,", "not a setting. Did you mean 'segmenter'"),
    ],
)
def test_mistakes_in_the_file(recipe: Callable[[str], Path], old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe(TINY.replace(old, new)))


def test_every_recipe_of_the_project_loads(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of stages, files and keys are right, and every stage has a folder of its own."""
    monkeypatch.chdir(project_root)
    files = sorted((project_root / "configs" / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        recipe = read_recipe(file)
        jobs = make_jobs(recipe)
        assert len({job.folder for job in jobs}) == len(jobs)
        assert json.dumps([job.identity() for job in jobs])


@pytest.mark.parametrize(
    "name", ["dvis_tiny", "minvis_tiny", "vita_tiny", "idol_tiny", "iai_tiny", "masktrack_rcnn_tiny"]
)
def test_the_tiny_recipes_hand_over_what_fits(
    project_root: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project_root)
    check_handovers(make_jobs(read_recipe(project_root / "configs" / "recipes" / f"{name}.yaml", output=str(tmp_path))))
