"""The command line of the report: what it refuses, and how it says so."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vis.structures.rle import encode

H, W, T = 24, 40, 3


@pytest.fixture(scope="module")
def tool(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("vis_tools_report", project_root / "tools" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a ground truth of one video and its result, changed as told; gives the arguments that name them."""

    def make(*, video: int = 1, truth: dict[str, Any] | None = None, category: int = 4, length: int = T) -> list[str]:
        mask = np.zeros((H, W), bool)
        mask[5:15, 8:20] = True
        content = {
            "videos": [{"id": 1, "height": H, "width": W, "length": T, "file_names": [f"v/{t}.png" for t in range(T)]}],
            "categories": [{"id": 4, "name": "dog"}],
            "annotations": [{"id": 1, "video_id": 1, "category_id": 4, "segmentations": [encode(mask)] * T}],
            **(truth or {}),
        }
        entry = {"video_id": video, "category_id": category, "score": 0.5, "segmentations": [encode(mask)] * length}
        (tmp_path / "gt.json").write_text(json.dumps(content))
        (tmp_path / "results.json").write_text(json.dumps([entry]))
        (tmp_path / "images" / "v").mkdir(parents=True)
        Image.new("RGB", (W, H)).save(tmp_path / "images" / "v" / "1.png")
        return ["--gt", str(tmp_path / "gt.json"), "--results", str(tmp_path / "results.json"),
                "--output", str(tmp_path / "r.html")]  # fmt: skip

    return make


def test_writes_the_file(tool: ModuleType, files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*files(), "--image-root", str(tmp_path / "images"), "--date", "some day"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "some day" in page
    assert "2 of 3 pictures cannot be shown" in page  # frames 0 and 2 are missing
    assert "open it in a browser" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": 7}, "another data set or split"),
        ({"category": 9}, "category_id 9 is not in the ground truth"),
        ({"length": T + 1}, "one entry per frame of the video (3), found 4"),
        ({"truth": {"videos": 5}}, "expected a YouTube-VIS json"),
        ({"truth": {"videos": [{"id": "<b>", "height": H, "width": W, "length": T}]}}, "which 'videos' does not list"),
    ],
)
def test_wrong_pairs(
    changes: dict[str, Any], message: str, tool: ModuleType, files: Any, tmp_path: Path, capsys: Any
) -> None:
    assert tool.main(files(**changes)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_ids_that_are_no_numbers(tool: ModuleType, files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    video = {"id": "x", "height": H, "width": W, "length": T}
    annotation = {"id": 1, "video_id": "x", "category_id": 4, "segmentations": [None] * T}
    assert tool.main(files(truth={"videos": [video], "annotations": [annotation]})) == 1
    assert "video 'x'" in capsys.readouterr().err


def test_without_annotations(tool: ModuleType, files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(files(truth={"annotations": None})) == 3
    assert "no report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-root", "nowhere"], "nowhere is not a folder"),
        (["--output", "nowhere/r.html"], "make it first"),
        (["--output", "."], "name a file in it"),
        (["--gt", "nowhere.json"], "nowhere.json: no such file"),
        (["--results", "nowhere.json"], "nowhere.json: no such file"),
        (["--results", "b.json", "--results", "c.json"], "one run or two side by side, not 3"),
        (["--names", "a", "b"], "2 names for 1 result files"),
        (["--max-mb", "0.01"], "1 videos do not fit"),
    ],
)
def test_wrong_arguments(more: list[str], message: str, tool: ModuleType, files: Any, capsys: Any) -> None:
    assert tool.main([*files(), *more]) == 1
    assert message in capsys.readouterr().err


def test_not_one_picture(tool: ModuleType, files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert tool.main([*files(), "--image-root", str(tmp_path / "empty")]) == 1
    assert "not one picture of 1 videos" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--videos", "0"], ["--max-mb", "-1"], ["--score-threshold", "30"]])
def test_wrong_usage(more: list[str], tool: ModuleType) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--gt", "a", "--results", "b", *more])
