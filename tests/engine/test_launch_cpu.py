"""Several processes on the CPU as a user starts them: ``--num-gpus 2``, two machines, torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
import torch

from vis.checkpoint import read_checkpoint
from vis.engine import load_cfg
from vis.engine.launch import launch
from vis.engine.trainer import Trainer

pytestmark = pytest.mark.slow
OPTIONS = ["SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.REFERENCE_WORLD_SIZE", "2", "SEED", "1"]


@pytest.fixture
def expected(stub_config: Callable[[str], Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights of one process that computes the parts of two."""
    cfg = load_cfg(str(stub_config("one")), [*OPTIONS, "DATASETS.TEST", "()"])
    torch.manual_seed(cfg.SEED)
    trainer = Trainer(cfg)
    initial = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    torch.save(initial, tmp_path / "initial.pth")
    trainer.resume_or_load()
    trainer.train()
    return trainer.module.state_dict()


def start(command: list[str], stub_path: str, root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": stub_path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown[-3000:]
    return shown


def check(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = read_checkpoint(folder / "model_final.pth")
    assert found["world_size"] == 2
    for name, value in expected.items():
        if "running" not in name and "num_batches" not in name:  # statistics are those of the first process' parts
            assert torch.equal(found["model"][name], value), name


def test_two_processes(
    stub_path: str,
    stub_config: Callable[[str], Path],
    tmp_path: Path,
    project_root: Path,
    expected: dict[str, torch.Tensor],
) -> None:
    command = ["tools/train_net.py", "--num-gpus", "2", "--config-file", str(stub_config("two")), *OPTIONS]
    shown = finish(start([*command, "MODEL.WEIGHTS", str(tmp_path / "initial.pth")], stub_path, project_root))
    assert "World size: 2" in shown
    assert "4 clips per update = 2 processes x 1 step x 2 clips" in shown
    check(tmp_path / "two", expected)


def test_two_machines(
    stub_path: str,
    stub_config: Callable[[str], Path],
    tmp_path: Path,
    project_root: Path,
    expected: dict[str, torch.Tensor],
) -> None:
    """Both are this one."""
    url = f"tcp://127.0.0.1:{layouts.free_port()}"
    command = ["tools/train_net.py", "--num-gpus", "1", "--num-machines", "2", "--dist-url", url]
    options = ["--config-file", str(stub_config("two")), *OPTIONS, "MODEL.WEIGHTS", str(tmp_path / "initial.pth")]
    machines = [start([*command, "--machine-rank", str(rank), *options], stub_path, project_root) for rank in range(2)]
    for machine in machines:
        finish(machine)
    check(tmp_path / "two", expected)


def _weak(seen: str) -> None:
    rank = torch.distributed.get_rank()
    Path(f"{seen}_{rank}").write_text(str(torch.distributed.get_backend()))


def test_backend_on_the_cpu(tmp_path: Path) -> None:
    launch(_weak, device="cpu", num_gpus=2, args=(str(tmp_path / "seen"),))
    assert [(tmp_path / f"seen_{rank}").read_text() for rank in range(2)] == ["gloo", "gloo"]
