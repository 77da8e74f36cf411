"""The command that compares two result files."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def tool(project_root: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("compare_results", project_root / "tools" / "compare_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    handlers = logging.root.handlers[:]
    spec.loader.exec_module(module)
    yield module
    logging.root.handlers[:] = handlers


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], str]:
    """Two videos of 5 x 7 pixels with one object each; A finds the first, B both."""
    mask = {"size": [5, 7], "counts": "632000>"}

    def entry(video: int) -> dict[str, Any]:
        return {"video_id": video, "category_id": 3, "segmentations": [mask, None]}

    contents: dict[str, Any] = {
        "gt": {
            "videos": [{"id": i, "height": 5, "width": 7, "length": 2} for i in (1, 2)],
            "categories": [{"id": 3, "name": "cat"}],
            "annotations": [{**entry(i), "id": i, "iscrowd": 0} for i in (1, 2)],
        },
        "a": [{**entry(1), "score": 0.8}],
        "b": [{**entry(i), "score": 0.8} for i in (1, 2)],
        "bad": [{**entry(9), "score": 0.8}],
    }
    contents["hidden"] = {**contents["gt"], "annotations": None}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return lambda name: str(tmp_path / f"{name}.json")


def test_compares(
    tool: ModuleType, files: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [files("a"), files("b"), "--gt", files("gt"), "--bootstrap", "50", "--seed", "2"]
    assert tool.main([*command, "--json", str(tmp_path / "out" / "difference.json")]) == 0
    out = capsys.readouterr().out
    assert "2 videos, 50 draws, seed 2" in out
    assert "AP-cat" in out
    content = json.loads((tmp_path / "out" / "difference.json").read_text())
    assert content["results"] == [files("a"), files("b")]
    assert content["overall"]["AP"]["a"] == pytest.approx(51 / 101)
    assert content["overall"]["AP"]["b"] == pytest.approx(1)
    assert content["overall"]["HOTA"]["difference"] == pytest.approx(1 - 0.5**0.5)
    assert tool.main(command) == 0
    assert capsys.readouterr().out == out


def test_exit_status(tool: ModuleType, files: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([files("a"), files("b"), "--gt", files("hidden")]) == 3
    assert tool.main([files("a"), files("bad"), "--gt", files("gt")]) == 1
    assert tool.main([files("a"), files("none"), "--gt", files("gt")]) == 1
    assert tool.main([files("a"), files("b"), "--gt", files("gt"), "--bootstrap", "0"]) == 1
    assert capsys.readouterr().err.count("error: ") == 3
    with pytest.raises(SystemExit):
        tool.main([files("a"), "--gt", files("gt")])
