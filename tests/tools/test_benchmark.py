"""The benchmarks run on a small model and give figures that mean what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vis.engine.benchmarks import Settings, inference, linear, memory, op, train
from vis.engine.benchmarks.common import (
    MovingFrames,
    environment,
    in_subprocess,
    peak_bytes,
    resident_bytes,
    sampled_memory,
    settings_of,
    spread,
    summary,
)
from vis.engine.benchmarks.train import INSTANCES, labelled_clip

# A quarter of the width of everything: fractions of a second per frame.
TINY = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 48,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 11,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}


@pytest.fixture(scope="module")
def tool(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool_benchmark", project_root / "tools" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool: ModuleType, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    options = [str(part) for pair in TINY.items() for part in pair]
    sizes = ["--input-size", "64x96", "--output-size", "90x130", "--warmup", "0", "--repeats", "1"]
    assert tool.main([*arguments, *sizes, "--json", str(out), "--opts", *options]) == 0
    report = json.loads(out.read_text())
    assert {"threads", "input_size", "config_file"} <= set(report["settings"])
    assert {"torch", "cpu", "commit", "python"} <= set(report["environment"])
    return report["result"]


def test_inference(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tool, tmp_path, "inference", "--frames", "3")
    total, split = result["seconds_per_frame"]["median"], result["split"]
    assert result["frames"] == 3
    assert 0 < split["network"] < total
    assert sum(split.values()) == pytest.approx(total, rel=0.01) or split["masks"] == 0
    assert "network" in capsys.readouterr().out


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Python and importing torch takes longer than what is tested."""
    monkeypatch.setattr(memory, "in_subprocess", lambda name, settings: memory.run_once(settings))
    monkeypatch.setattr(train, "in_subprocess", lambda name, settings: train.run_once(settings))


@pytest.mark.usefixtures("in_this_process")
def test_memory_reports_every_length(tool: ModuleType, tmp_path: Path) -> None:
    result = run(tool, tmp_path, "memory", "--frames", "4", "2")
    assert [figures["frames"] for figures in result["runs"]] == [2, 4]
    assert result["ratio"] == pytest.approx(result["runs"][1]["peak_mib"] / result["runs"][0]["peak_mib"])
    for figures in result["runs"]:
        assert 0 < figures["sampled_peak_mib"] <= figures["peak_mib"] * 1.001


@pytest.mark.usefixtures("in_this_process")
def test_train(tool: ModuleType, tmp_path: Path) -> None:
    result = run(tool, tmp_path, "train", "--frames", "1")
    assert result["seconds_per_step"]["median"] > 0
    assert (result["clips"], result["instances_per_clip"]) == (2, 6)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tool: ModuleType, tmp_path: Path) -> None:
    block = torch.ones(256 << 20)  # this gigabyte must not count there
    result = run(tool, tmp_path, "memory", "--frames", "2")
    assert result["runs"][0]["peak_mib"] < block.numel() * 4 / 2**20
    assert result["ratio"] == 1.0


def test_a_failing_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")  # ends with status 1, whatever its arguments
    with pytest.raises(RuntimeError, match="memory:run_once ended with status 1"):
        in_subprocess("memory:run_once", Settings())


def test_memory_that_grows_gives_status_1(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def grown(name: str, settings: Settings) -> dict[str, Any]:
        figures = dict.fromkeys(("sampled_peak_mib", "before_mib", "maxrss_mib", "result_mib", "seconds"), 1.0)
        return {
            **figures,
            "frames": settings.frames[0],
            "peak_mib": 100.0 + settings.frames[0],
            "device_peak_mib": None,
        }

    monkeypatch.setattr(memory, "in_subprocess", grown)
    assert tool.main(["memory"]) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out
    assert tool.main(["memory", "--frames", "30", "35"]) == 0


def test_op_covers_every_backend_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "SIZES", ((64, 96), (32, 64)))
    result = op.measure_op(Settings(warmup=0, repeats=2))
    assert len(result["rows"]) == 2 * len(op.BACKENDS)
    assert [row["tokens"] for row in result["rows"]][:2] == [8 * 12 + 4 * 6 + 2 * 3, 4 * 8 + 2 * 4 + 2]
    assert len(op.lines(result)) == len(result["rows"])


def test_linear_layers_side_by_side(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SIZES", ((97, 5, 7), (3, 4, 2)))
    out = tmp_path / "linear.json"
    assert tool.main(["linear", "--repeats", "2", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["result"]["rows"]
    assert [row["size"] for row in rows] == [[97, 5, 7], [3, 4, 2]]
    assert all(row[who][kind] >= 0 for row in rows for who in ("vis", "torch") for kind in op.BARS)


@pytest.mark.slow
def test_data(tool: ModuleType, tmp_path: Path) -> None:
    result = run(tool, tmp_path, "data")
    assert result["train_samples_per_second"]["median"] > 0
    assert result["test_frames_per_second"]["median"] > 0


@pytest.mark.parametrize("argument", ["192", "192x", "0x320", "axb"])
def test_sizes_are_checked(tool: ModuleType, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(["inference", "--input-size", argument])
    assert stop.value.code == 2
    assert argument in capsys.readouterr().err


def test_a_wrong_configuration_ends_with_a_message(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(["inference", "--config-file", "nowhere.yaml"])
    assert stop.value.code == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_only_inference_and_training_have_a_plain_counterpart(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(["memory", "--against-plain"])
    assert stop.value.code == 2
    assert "belongs to inference and train, not to memory" in capsys.readouterr().err


def test_frames_are_lazy_repeatable_and_moving() -> None:
    frames = MovingFrames(length=5, size=(24, 40))
    assert len(frames) == 5
    assert torch.equal(frames[3], frames[3])
    assert not torch.equal(frames[3], frames[4])
    assert (frames[0].shape, frames[0].dtype) == ((3, 24, 40), torch.uint8)
    assert len(list(frames)) == 5
    assert len(frames[1:4]) == 3


def test_labelled_clip_has_six_visible_instances() -> None:
    clip = labelled_clip(Settings(input_size=(48, 80), frames=(2,)), seed=1)
    assert len(clip["image"]) == len(clip["instances"]) == 2
    for instances in clip["instances"]:
        assert len(instances) == INSTANCES
        assert bool(instances.gt_masks.tensor.flatten(1).any(1).all())


def test_memory_figures_follow_an_allocation() -> None:
    before = resident_bytes()
    with sampled_memory(every=0.001) as samples:
        block = torch.ones(16 << 20)  # 64 MiB: up to 32 can come from memory that was freed before and stayed resident
        while len(samples) < 3:
            pass
    assert max(samples) >= before
    assert peak_bytes() >= before + block.numel()


def test_figures_and_settings_survive_json() -> None:
    figures = summary([3.0, 1.0, 2.0])
    assert (figures["median"], figures["min"], figures["max"]) == (2.0, 1.0, 3.0)
    assert spread(figures, "s", 1) == "2.0 s (1.0 to 3.0, 3 runs)"
    settings = Settings(opts=("SEED", "1"), frames=(3, 4))
    assert settings_of(json.loads(json.dumps(vars(settings)))) == settings
    json.dumps(environment())


def test_clock_without_the_named_modules_stays_at_zero() -> None:
    clock = inference.ModuleClock(torch.nn.Linear(2, 3), ("tracker",), "cpu")
    assert clock.seconds == 0.0
