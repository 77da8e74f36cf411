"""Which backend of the deformable-attention op runs, what is said about it, and the kernels for older processors."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vis.layers.ms_deform_attn import __main__ as report
from vis.layers.ms_deform_attn import backends, library, ms_deform_attn, set_backend

needs_library = pytest.mark.skipif(bool(library.problem("cpu")), reason=library.problem("cpu"))


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing is chosen and nothing asked for."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_configured", "auto")
    monkeypatch.setattr(backends, "_chosen", {})


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_PROBLEM", "vis._C is not built (a test)")


def call() -> torch.Tensor:
    return ms_deform_attn(
        torch.ones(1, 6, 1, 2), [(2, 3)], [0], torch.rand(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
    )


@needs_library
def test_the_compiled_kernels_are_the_first_choice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vis"):
        call()
        call()
    assert [record.getMessage() for record in caplog.records] == [
        "Deformable attention on cpu: compiled (first choice)"
    ]


@pytest.mark.usefixtures("not_built")
def test_without_the_library_pytorch_runs_and_the_log_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vis"):
        call()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "Deformable attention on cpu: torch (not compiled: vis._C is not built (a test))"


@pytest.mark.usefixtures("not_built")
@pytest.mark.parametrize("by", ["variable", "configuration"])
def test_what_is_asked_for_must_be_there(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "variable":
        monkeypatch.setenv(backends.VARIABLE, "compiled")
        source = "VIS_MS_DEFORM_ATTN"
    else:
        set_backend("compiled")
        source = "MODEL.MS_DEFORM_ATTN_BACKEND"
    message = f"{source} asks for the backend 'compiled', which is not there: vis._C is not built"
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message):
        set_backend("compiled", "cpu")  # as build_model does, before anything runs


def test_triton_does_not_run_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(
        ValueError, match="VIS_MS_DEFORM_ATTN asks for the backend 'triton', which is not there: .*Triton"
    ):
        call()


def test_the_environment_comes_before_the_configuration(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_backend("triton")
    monkeypatch.setenv(backends.VARIABLE, "torch")
    with caplog.at_level(logging.INFO, "vis"):
        assert backends.choose("cpu") == "torch"
    assert caplog.records[0].getMessage() == "Deformable attention on cpu: torch, as VIS_MS_DEFORM_ATTN asks"
    set_backend("auto")
    monkeypatch.delenv(backends.VARIABLE)
    assert backends.choose("cpu") == ("torch" if library.problem("cpu") else "compiled")


def test_unknown_names_get_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="MODEL.MS_DEFORM_ATTN_BACKEND is 'compile', .*Did you mean 'compiled'"):
        set_backend("compile")
    monkeypatch.setenv(backends.VARIABLE, "pytorch")
    with pytest.raises(ValueError, match="VIS_MS_DEFORM_ATTN is 'pytorch', expected auto, compiled, triton, torch"):
        call()


def test_a_device_without_kernels_runs_pytorch() -> None:
    assert backends.choose("meta") == "torch"
    assert library.problem("meta")


@needs_library
def test_a_kernel_that_fails_is_no_reason_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from vis.layers.ms_deform_attn import op

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("the kernel failed")

    monkeypatch.setitem(op.RUN, "compiled", broken)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        call()


@needs_library
def test_a_library_for_another_torch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.3.9+cpu")
    assert "was built with torch 2." in library._load()
    assert "this is 2.3.9: build it again" in library._load()


def test_a_library_that_does_not_load_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_text("no library")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(library, "_declare", lambda: None)
    assert "_C.so does not load, build it again: " in library._load()


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}; vis._C: ")
    assert any(line.startswith("cpu   torch     self-test passed") for line in lines)
    assert f"cpu   runs      {backends.choose('cpu')}" in lines


def test_report_of_a_wrong_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(report.RUN, "torch", lambda value, *_: value.flatten(2)[:, :9] * 1.0)
    monkeypatch.setattr(
        report, "_with_gradients", lambda run, inputs: [run(inputs[0], report.SHAPES, report.STARTS, *inputs[1:])]
    )
    assert report.main() == 1
    assert "cpu   torch     self-test FAILED" in capsys.readouterr().out


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_for_older_processors(capability: str) -> None:
    """torch's own switch for the instruction set also chooses ours."""
    variables = {**os.environ, "ATEN_CPU_CAPABILITY": capability, backends.VARIABLE: "compiled"}
    tests = Path(__file__).with_name("test_ms_deform_attn.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{tests}", "-k", "compiled and float64"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout
