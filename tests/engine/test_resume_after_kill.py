"""A training that is killed at any moment and resumed ends with the same bits as one that ran through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vis.checkpoint import read_checkpoint
from vis.data.synthetic import generate
from vis.engine.state import LAST, all_checkpoints, last_checkpoint

pytestmark = pytest.mark.slow

EVALUATION = ["DATASETS.TEST", "['training_stub_test']", "TEST.EVAL_PERIOD", "4"]


class Processes:
    """Real processes that start in a tenth of a second: see ``training_stub.serve``."""

    def __init__(self, stub_path: str, folder: Path) -> None:
        self.errors = folder / "errors.txt"
        self.server = subprocess.Popen(
            [sys.executable, str(Path(stub_path) / "training_stub.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            env={**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(folder)},
            text=True,
        )

    def train(self, config: Path, opts: list[str], die_at: int = -1, kill_after: float | None = None) -> int:
        """Run with ``--resume``; the exit code, -9 if it was killed."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        job = {"config": str(config), "opts": opts, "die_at": die_at, "kill_after": kill_after}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, self.errors.read_text()
        code = int(answer)
        assert code in (0, -signal.SIGKILL), self.errors.read_text()
        return code


@pytest.fixture(scope="module")
def processes(stub_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """The server, which ends when its input does."""
    folder = tmp_path_factory.mktemp("server")
    generate("synthetic_ytvis", folder, num_videos={"train": 4, "val": 1})
    processes = Processes(stub_path, folder)
    yield processes
    assert processes.server.stdin is not None
    processes.server.stdin.close()
    processes.server.wait(10)


def assert_all_load(folder: Path) -> None:
    """No file with the name of a checkpoint is broken, and the pointer names one of them."""
    for path in all_checkpoints(folder):
        assert {"model", "optimizer", "random"} <= read_checkpoint(path).keys()
    if (folder / LAST).exists():
        assert last_checkpoint(folder) in all_checkpoints(folder)


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}.{number}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def final(folder: Path) -> dict[str, Any]:
    """Everything in the last checkpoint that a run determines: weights, moments, schedule, random states."""
    state = read_checkpoint(folder / "model_final.pth")
    return {key: value for key, value in state.items() if key not in ("config", "config_hash")}


@pytest.fixture
def reference(processes: Processes, stub_config: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """The end of the run that nothing stops, without workers and without evaluation."""
    assert processes.train(stub_config("through"), []) == 0
    state = final(tmp_path / "through")
    assert state["iteration"] == 12
    return state


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_at_each_write_of_a_file(
    processes: Processes, stub_config: Callable[[str], Path], tmp_path: Path, reference: dict[str, Any], workers: int
) -> None:
    """The process kills itself at a step of writing a checkpoint, is resumed and killed again further on."""
    opts = ["DATALOADER.NUM_WORKERS", str(workers), *EVALUATION]
    # A checkpoint and the pointer to it are eight steps. With workers, starting is slow and a few must do.
    for die_at in (2, 5) if workers else range(8):
        config = stub_config(f"killed_{die_at}")
        folder = tmp_path / f"killed_{die_at}"
        assert processes.train(config, opts, die_at=die_at) == -signal.SIGKILL
        assert_all_load(folder)
        assert processes.train(config, opts, die_at=die_at + 9) in (0, -signal.SIGKILL)
        assert_all_load(folder)
        assert processes.train(config, opts) == 0
        assert_same(final(folder), reference)
        assert not list(folder.glob(".*.tmp")), "what a killed process left half-written is removed"


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_at_any_time(
    processes: Processes, stub_config: Callable[[str], Path], tmp_path: Path, reference: dict[str, Any], workers: int
) -> None:
    """SIGKILL from outside after one delay after the other, whatever the training is doing then."""
    config, folder = stub_config("timed"), tmp_path / "timed"
    opts = ["DATALOADER.NUM_WORKERS", str(workers), "MODEL.STUB.SLEEP", "0.05", *EVALUATION]
    killed = 0
    for delay in (0.15, 0.5, 0.7, 0.9, 1.1):
        killed += processes.train(config, opts, kill_after=delay) == -signal.SIGKILL
        if folder.exists():
            assert_all_load(folder)
    assert killed
    assert processes.train(config, opts) == 0
    assert_same(final(folder), reference)


def test_a_real_model_is_killed_and_resumed(processes: Processes, project_root: Path, tmp_path: Path) -> None:
    """The tiny MinVIS of the demo, killed and with two workers, against the one with neither."""
    config = project_root / "configs" / "demo" / "minvis_synthetic.yaml"
    opts = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "12"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "4", "OUTPUT_DIR"]
    assert processes.train(config, [*opts, str(tmp_path / "through")]) == 0
    folder = tmp_path / "killed"
    killed = [*opts, str(folder), "DATALOADER.NUM_WORKERS", "2"]
    assert processes.train(config, killed, die_at=11) == -signal.SIGKILL  # in the flush after the second checkpoint
    assert_all_load(folder)
    processes.train(config, killed, kill_after=0.6)
    assert_all_load(folder)
    assert processes.train(config, killed) == 0
    assert_same(final(folder), final(tmp_path / "through"))


def test_the_tool_is_killed_and_resumed(
    stub_path: str, stub_config: Callable[[str], Path], tmp_path: Path, project_root: Path, reference: dict[str, Any]
) -> None:
    """The same through the command line; the log and the metrics tell one story."""
    config, folder = stub_config("tool"), tmp_path / "tool"
    command = [sys.executable, "tools/train_net.py", "--config-file", str(config), "--resume"]
    environment = {**os.environ, "PYTHONPATH": stub_path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "MODEL.STUB.SLEEP", "0.3"], cwd=project_root, env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (folder / "last_checkpoint").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 3, "total_loss": 1}\n{"iteration": 4, "total_loss": 2}\n{"iterat')
    done = subprocess.run([*command], cwd=project_root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Resumed from" in done.stdout
    assert "2 lines from iteration 4 on" in done.stdout
    assert_same(final(folder), reference)
