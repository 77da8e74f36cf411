"""The memory of a whole evaluation is measured on what a user evaluates: files in, results on disk out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vis.engine.benchmarks import Settings, memory


def test_video_of_any_length_takes_the_space_of_a_few_pictures(tmp_path: Path) -> None:
    memory.write_video(tmp_path, 50, (90, 130), 3)
    content = json.loads((tmp_path / "video.json").read_text())
    (video,) = content["videos"]
    assert (video["height"], video["width"], video["length"]) == (90, 130, 50)
    assert [category["id"] for category in content["categories"]] == [1, 2, 3]
    assert "annotations" not in content
    frames = [tmp_path / "frames" / name for name in video["file_names"]]
    assert Image.open(frames[-1]).size == (130, 90)
    assert len({frame.stat().st_ino for frame in frames}) < 20
    assert all(one.stat().st_ino != other.stat().st_ino for one, other in zip(frames, frames[1:], strict=False))


def test_end_to_end(project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: starting Python and importing torch takes longer than what is tested."""
    asked = []

    def run(name: str, settings: Settings) -> dict[str, Any]:
        asked.append((name, settings.frames))
        return memory.run_end_to_end(settings)

    monkeypatch.setattr(memory, "in_subprocess", run)
    spec = importlib.util.spec_from_file_location("tool_benchmark_memory", project_root / "tools" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = tmp_path / "out.json"
    arguments = ["memory", "--end-to-end", "--frames", "9", "4", "--output-size", "90x130", "--json", str(out)]
    assert tool.main(arguments) == 0
    assert asked == [("memory:run_end_to_end", (4,)), ("memory:run_end_to_end", (9,))]
    report = json.loads(out.read_text())
    assert report["settings"]["config_file"].endswith("minvis_synthetic.yaml")
    assert [run["frames"] for run in report["result"]["runs"]] == [4, 9]
    assert [run["tracks"] for run in report["result"]["runs"]] == [10, 10]
    assert report["result"]["runs"][1]["result_mib"] > report["result"]["runs"][0]["result_mib"] > 0
    with pytest.raises(SystemExit):
        tool.main(["op", "--end-to-end"])
