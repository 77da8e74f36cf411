"""manifest.json: at the start, at the end, of a failed run; the state of the checkout; hashes of data."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vis.config import CfgNode
from vis.engine import load_cfg, manifest
from vis.engine.manifest import data_set_files, git_state, iterations, read_manifest, run_manifest, versions
from vis.engine.state import config_hash, plain_config


@pytest.fixture
def cfg(stub_config: Callable[[str], Path]) -> CfgNode:
    return load_cfg(str(stub_config("run")), ["DATASETS.TEST", "['training_stub_test']"])


def read(path: Path) -> dict:
    content = read_manifest(path)
    assert content is not None
    return content


def test_start_and_end(cfg: CfgNode, tmp_path: Path, stub_data: Path) -> None:
    path = tmp_path / "run" / "manifest.json"
    with run_manifest(cfg, kind="training", config_file="some.yaml") as running:
        content = read(path)
        assert content["status"] == "running"
        assert content["iterations"] == {"done": 0, "total": 12}
        running.results = OrderedDict(segm={"AP": 12.5})
        (path.parent / "metrics.json").write_text(
            '{"iteration": 5, "time": 0.5}\n{"iteration": 9, "time": 1.5}\n{"iterat'
        )
    content = read(path)
    assert content["status"] == "finished"
    assert content["error"] is None
    assert content["results"] == {"segm": {"AP": 12.5}}
    assert content["iterations"] == {"done": 10, "total": 12, "seconds_each": 1.0, "train_seconds": 10.0}
    assert content["config_hash"] == config_hash(plain_config(cfg))
    assert yaml.safe_load(content["config"])["SEED"] == content["seed"] == cfg.SEED
    digest = hashlib.sha256((stub_data / "train.json").read_bytes()).hexdigest()
    assert content["data_sets"]["training_stub_train"]["sha256"] == digest
    assert set(content["data_sets"]) == {"training_stub_train", "training_stub_test"}
    assert content["op_backend"]["used"] in ("compiled", "torch")
    assert content["peak_memory_mib"] > 0
    assert content["versions"]["torch"] == versions()["torch"]


def test_an_error_is_kept(cfg: CfgNode, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError), run_manifest(cfg, kind="training"):
        raise FloatingPointError("the loss is not finite")
    content = read(tmp_path / "run" / "manifest.json")
    assert (content["status"], content["error"]) == ("failed", "FloatingPointError: the loss is not finite")


def test_an_evaluation_leaves_the_manifest_of_the_training(cfg: CfgNode, tmp_path: Path) -> None:
    with run_manifest(cfg, kind="training"):
        pass
    before = (tmp_path / "run" / "manifest.json").read_text()
    with run_manifest(cfg, kind="evaluation") as running:
        running.results = {"segm": {"AP": 1.0}}
    assert (tmp_path / "run" / "manifest.json").read_text() == before
    content = read(tmp_path / "run" / "inference" / "manifest.json")
    assert set(content["data_sets"]) == {"training_stub_test"}, "an evaluation does not open training data"
    assert "iterations" not in content


def test_sessions_of_a_run_that_was_killed(cfg: CfgNode, tmp_path: Path) -> None:
    path = tmp_path / "run" / "manifest.json"
    killed = run_manifest(cfg, kind="training")
    killed.__enter__()
    (path.parent / "log.txt").write_text("the last that it wrote")
    with run_manifest(cfg, kind="training", resume=True):
        pass
    content = read(path)
    assert [session["status"] for session in content["sessions"]] == ["killed", "finished"]
    assert content["seconds"] == pytest.approx(sum(session["seconds"] for session in content["sessions"]))
    with run_manifest(cfg, kind="training"):
        pass
    assert len(read(path)["sessions"]) == 1, "a run that starts anew"


def test_git_state(tmp_path: Path) -> None:
    """A commit, a changed file; nothing outside a checkout, nor inside somebody else's."""
    assert git_state(tmp_path) is None

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-q", "-m", "x")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False, "changed": []}
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "new.py").write_text("3")
    found = git_state(tmp_path)
    assert found is not None
    assert (found["dirty"], found["changed"]) == (True, ["a.py"])
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") is None


def test_a_file_is_hashed_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    monkeypatch.setattr(manifest, "MetadataCatalog", {"a_set": {"json_file": str(file)}})
    assert data_set_files("a_set") is None
    hashes = set()
    for text in ("one", "three"):
        file.write_text(text)
        found = data_set_files("a_set")
        assert found is not None
        hashes.add(found["sha256"])
    assert len(hashes) == 2


def test_not_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert read_manifest(path) is None
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(path)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="it has no status"):
        read_manifest(path)
    assert iterations(tmp_path, 5) == {"done": 0, "total": 5}
