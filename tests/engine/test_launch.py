"""Starting one process or several."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vis.checkpoint import read_checkpoint
from vis.engine.launch import launch, uses_cuda

NO_GPU = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_one_process_on_the_cpu_is_a_call(num_gpus: int) -> None:
    seen = []
    launch(seen.append, device="cpu", num_gpus=num_gpus, args=(3,))
    assert seen == [3]


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_one_process_under_torchrun_is_a_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_gpus: int
) -> None:
    """Which decides how many there are, and that is said."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger("vis"), "propagate", True)  # a log of a training before may have ended it
    seen = []
    launch(seen.append, device="cpu", num_gpus=num_gpus, args=(3,))
    assert seen == [3]
    assert ("--num-gpus 4 is not used" in caplog.text) == (num_gpus == 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gpus": 999, "device": "cuda"}, "--num-gpus 999 was asked for, but"),
        ({"num_gpus": 0, "num_machines": 2, "device": "cpu"}, "--num-gpus 0 was asked for"),
        ({"num_gpus": 4096, "device": "cpu"}, "--num-gpus 4096 was asked for, but .* processes"),
        ({"num_gpus": -1}, "none negative"),
        ({"num_machines": 2, "machine_rank": 2}, "the rank must be between 0"),
        ({"num_machines": 0}, "--num-machines 0"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(print, **settings)


def test_several_machines_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="--dist-url tcp://HOST:PORT"):
        launch(print, device="cuda", num_gpus=8, num_machines=2)


def test_devices() -> None:
    assert uses_cuda("cuda:1")
    assert not uses_cuda("cpu")
    assert uses_cuda("auto") == torch.cuda.is_available()


@pytest.mark.slow
def test_two_processes_under_torchrun(
    stub_path: str, stub_config: Callable[[str], Path], tmp_path: Path, project_root: Path
) -> None:
    """Gloo on the CPU: both train on halves of the batches, stay equal, and the run resumes exactly."""
    environment = {**os.environ, "PYTHONPATH": stub_path, "OMP_NUM_THREADS": "1"}

    def train(name: str, *opts: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["tools/train_net.py", "--config-file", str(stub_config(name)), "--resume", *opts]
        done = subprocess.run(
            command, cwd=project_root, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    test = ["DATASETS.TEST", "['training_stub_test']"]
    assert "World size: 2" in train("through", *test)
    assert (tmp_path / "through" / "log.txt.rank1").exists()
    through = read_checkpoint(tmp_path / "through" / "model_final.pth")
    assert through["world_size"] == 2
    assert not torch.equal(through["random"][0]["torch"], through["random"][1]["torch"])

    shutil.copytree(tmp_path / "through", tmp_path / "resumed")
    (tmp_path / "resumed" / "last_checkpoint").write_text("model_0000007.pth")
    assert "model_0000007.pth: 8 of 12" in train("resumed")
    resumed = read_checkpoint(tmp_path / "resumed" / "model_final.pth")
    for name, value in through["model"].items():
        if "running" not in name:  # statistics of batch normalisation are of the first process
            assert torch.equal(resumed["model"][name], value), name
