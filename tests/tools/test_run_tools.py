"""The commands of sweeps and recipes: what runs nothing, and mistakes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vis.engine.slurm import load_tool


@pytest.fixture(autouse=True)
def _in_the_root(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(project_root)
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers


def test_table_of_a_sweep_that_has_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("sweep")
    before = signal.getsignal(signal.SIGTERM)
    words = ["configs/sweeps/minvis_challenge_tiny.yaml", "--table-only", "--output", str(tmp_path)]
    assert tool.main(words) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    printed = capsys.readouterr().out
    for label in ("MinVIS", "+ quality head", "+ boundary branch", "+ BatchFormer", "+ multi-scale test", "+ ensemble"):
        assert f"| {label} | 0 of 3 |" in printed
    assert (tmp_path / "minvis_challenge_tiny" / "table.csv").is_file()


def test_status_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("run_recipe")
    assert tool.main(["configs/recipes/dvis_tiny.yaml", "--status", "--output", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "not started" in line]
    assert [line.split("|")[0].strip() for line in lines] == ["segmenter", "online", "offline"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        ("sweep", ["nowhere.yaml"], "sweep 'nowhere.yaml' does not exist"),
        ("sweep", ["configs/recipes/dvis_tiny.yaml"], "unknown key 'stages'"),
        ("sweep", ["configs/sweeps/vita_tiny.yaml", "--slurm", "partitoin=x"], "Did you mean 'partition'"),
        ("run_recipe", ["configs/recipes/dvis_tiny.yaml", "--from", "onlin"], "Did you mean 'online'"),
    ],
)
def test_mistakes(
    tool: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_tool(tool).main([*words, "--output", str(tmp_path)] if "--slurm" not in words else words) == 1
    assert message in capsys.readouterr().err
