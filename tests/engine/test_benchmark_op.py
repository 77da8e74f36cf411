"""The benchmarks of deformable attention: their arithmetic, their tables, and the script that runs them on a GPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from vis.engine.benchmarks import Settings, op, op_device


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("queries", "dtype", "memory", "l1", "arithmetic", "released"),
    [
        (5040, torch.float32, 3.4, 8.0, 1.8, 50),
        (19320, torch.float32, 12.9, 30.7, 7.1, 193),
        (19320, torch.bfloat16, 8.0, 15.4, 7.1, 193),
    ],
)
def test_floors(queries: int, dtype: torch.dtype, memory: float, l1: float, arithmetic: float, released: float) -> None:
    """Against figures worked out apart from this code; microseconds on an H200."""
    found = op_device.floors("cuda", queries, dtype, "forward")
    assert found is not None
    expected = {"memory": memory, "l1": l1, "arithmetic": arithmetic, "released_kernel_instructions": released}
    assert found == pytest.approx(expected, rel=0.03)
    both = op_device.floors("cuda", queries, dtype, "forward_backward")
    assert both is not None
    backward = {(5040, 4): 7.8, (19320, 4): 29.9, (19320, 2): 24.2}[queries, torch.finfo(dtype).bits // 8]
    assert both["memory"] - found["memory"] == pytest.approx(backward, rel=0.025)


def test_no_floors_for_a_device_that_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Something else")
    assert op_device.floors("cuda", 10, torch.float32, "forward") is None


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="no bfloat16 grid_sample for CPUs in this torch"
)
def test_dry_run_measures_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_device, "DRY_SIZES", ((32, 64), (32, 32)))
    result = op_device.measure_device(Settings(device="cpu", warmup=0, repeats=1))
    assert result["dry_run"]
    assert len(result["rows"]) == 2 * len(op_device.DRY_BATCHES) * len(op_device.DTYPES)
    assert all(row[name][kind] > 0 for row in result["rows"] for name in ("torch", "grid_sample") for kind in op.BARS)
    assert "deformops" in result["missing"]
    text = "\n".join(op_device.lines(result))
    assert "DRY RUN" in text
    assert text.count("forward_backward") == len(result["rows"])
    json.dumps(result)


@pytest.mark.usefixtures("named")
def test_table_has_the_floor_that_governs() -> None:
    row = {"input": [384, 640], "batch": 1, "dtype": "float32", "tokens": 5040}
    row["floors"] = {kind: op_device.floors("cuda", 5040, torch.float32, kind) for kind in op.BARS}
    row["compiled"] = dict.fromkeys(op.BARS, 16.0)
    missing = {name: "not here" for name in (*op.BACKENDS, "deformops") if name != "compiled"}
    text = op_device.lines({"rows": [row], "missing": missing, "dry_run": False})
    line = next(line for line in text if line.split()[3:4] == ["forward"])
    assert line.split()[4:] == ["16.0", "8.0", "l1", "2.00x", "50.4"]


def test_backends_take_turns() -> None:
    seen: list[str] = []
    runs = {name: (lambda name=name: seen.append(name)) for name in ("a", "b")}
    timed = op.in_turns(Settings(warmup=1, repeats=2), runs)
    assert seen == ["a", "b"] * 3
    assert len(timed["a"]["runs"]) == 2
    assert timed["a"]["best"] <= timed["a"]["cpu"]


def test_op_is_for_cpus() -> None:
    with pytest.raises(ValueError, match="op-device"):
        op.measure_op(Settings(device="cuda"))


def test_missing_backends_are_told_apart() -> None:
    row = {"backend": "compiled", "input": [360, 640], "tokens": 4760, "missing": "not built"}
    assert op.lines({"rows": [row]}) == ["compiled    360x640 (4760 tokens): not measured: not built"]
    figures = {"median": 9.0, "cpu": 8.0, "best": 7.0, "speedup": 5.5}
    [line] = op.lines({"rows": [{**row, "missing": "", "forward": figures, "forward_backward": figures}]})
    assert "5.50x (bar 6: DOES NOT HOLD)" in line
    assert "5.50x (bar 5: holds)" in line


def test_gpu_check_refuses_what_it_does_not_know(project_root: Path) -> None:
    script = str(project_root / "tools" / "gpu_check.sh")
    done = subprocess.run(["bash", script, "--fast"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--fast" in done.stderr
    done = subprocess.run(["bash", script, "--part", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown part trian; there are build tests op train compile inference" in done.stderr
    helped = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert "--dry-run" in helped.stdout
    assert "--part" in helped.stdout
