"""What `tools/benchmark.py train --variants` and `data` give, and that variants are what they are called."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vis.engine.benchmarks import train_variants
from vis.engine.benchmarks.common import Settings

OPTIONS = ["--config-file", "configs/demo/minvis_synthetic.yaml", "--warmup", "0"]


@pytest.fixture(scope="module")
def tool(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool_benchmark_variants", project_root / "tools" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> None:
    """Starting Python and importing torch takes longer than what is tested."""
    monkeypatch.chdir(project_root)
    monkeypatch.setattr(train_variants, "in_subprocess", lambda name, settings: train_variants.run_variant(settings))


def run(tool: ModuleType, tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert tool.main([*words[:1], *OPTIONS, "--json", str(out), *words[1:]]) == 0
    return json.loads(out.read_text())


def test_variants(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["plain", "accumulate", "checkpoint"]
    report = run(tool, tmp_path, "train", "--variants", *names, "--input-size", "64x96", "--repeats", "1")
    results = report["result"]["variants"]
    assert list(results) == report["settings"]["variants"] == names
    for figures in results.values():
        assert figures["iterations_per_second"]["median"] == pytest.approx(1 / figures["seconds"]["median"])
        assert all(
            0 <= wait < whole
            for wait, whole in zip(figures["data_seconds"]["runs"], figures["seconds"]["runs"], strict=True)
        )
        assert 0 < figures["before_mib"] < figures["peak_mib"]
        assert (figures["clips"], figures["dtype"], figures["device_peak_mib"]) == (2, "float32", None)
    assert [figures["steps"] for figures in results.values()] == [1, 2, 1]
    assert results["checkpoint"]["losses"][0] == pytest.approx(results["plain"]["losses"][0], rel=1e-5)
    said = capsys.readouterr().out
    assert "2 clips in 2 step(s), float32" in said
    assert "of the time waits for data (0 workers)" in said


@pytest.mark.parametrize("method", ["minvis", "idol", "iai"])
def test_what_each_method_compiles_and_computes_again(method: str) -> None:
    """A backbone there is; a key that nothing reads would measure nothing."""
    from vis.engine.config import load_cfg
    from vis.modeling import build_model

    settings = Settings(config_file=f"configs/demo/{method}_synthetic.yaml", frames=(2,))
    cfg = train_variants._configuration(settings, "compile", "out")
    model = build_model(load_cfg(settings.config_file, ["MODEL.DEVICE", "cpu"]))
    (part,) = cfg.SOLVER.COMPILE.PARTS
    assert type(model.get_submodule(part)).__name__ == "ResNet"
    cfg = train_variants._configuration(settings, "checkpoint", "out")
    on = [key for key in train_variants._CHECKPOINT_KEYS if train_variants._value(cfg, key)]
    expected = {"minvis": ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_CHECKPOINT"], "idol": ["MODEL.IDOL.ENC_CHECKPOINT"]}
    assert on == expected.get(method, [])


def test_a_variant_that_is_not_there(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16 where training runs in it, else the reason."""
    report = run(tool, tmp_path, "train", "--variants", "bf16", "--input-size", "64x96", "--repeats", "1")
    (figures,) = report["result"]["variants"].values()
    assert figures.get("dtype") == "bfloat16" or "no bfloat16 there" in figures["reason"]
    assert "bf16" in capsys.readouterr().out
    report = run(tool, tmp_path, "train", "--variants", "fp16", "--input-size", "64x96", "--repeats", "1")
    assert "no float16 there" in report["result"]["variants"]["fp16"]["reason"]


@pytest.mark.parametrize("words", [["data", "--variants", "plain"], ["train", "--variants", "fast"]])
def test_wrong_commands(tool: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(words)
    assert stop.value.code == 2
    assert "variants" in capsys.readouterr().err


def test_mapper_beside_decoding(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vis.engine.benchmarks.data.SAMPLES", 6)
    monkeypatch.setattr("vis.engine.benchmarks.data.VIDEOS", {"train": 2, "val": 1})
    result = run(tool, tmp_path, "data", "--repeats", "2")["result"]
    for name in ("mapper_clips_per_second", "decoding_clips_per_second", "train_samples_per_second"):
        assert len(result[name]["runs"]) == 2
        assert result[name]["min"] > 0
    said = capsys.readouterr().out
    assert "mapper alone:" in said
    assert "decoding alone:" in said
