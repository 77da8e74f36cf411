"""A training that is told to go: checkpoint, exit status, manifest, and the same weights in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.engine.train_loop import HookBase
from detectron2.utils.env import seed_all_rng

from vis.checkpoint import read_checkpoint
from vis.engine import load_cfg
from vis.engine.manifest import read_manifest, run_manifest
from vis.engine.preemption import EXIT_STATUS, Preempted
from vis.engine.state import last_checkpoint
from vis.engine.trainer import Trainer


class Signal(HookBase):
    """Sends this process a signal before a step."""

    def __init__(self, number: int, iteration: int) -> None:
        self.number, self.iteration = number, iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


def train(config: Path, *, resume: bool = False, hook: HookBase | None = None) -> None:
    cfg = load_cfg(str(config), [])
    seed_all_rng(cfg.SEED)
    with run_manifest(cfg, kind="training", resume=resume) as manifest:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.register_hooks([hook] if hook is not None else [])
        manifest.results = trainer.train()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("iteration", [5, 7, 11])
def test_told_to_go(stub_config: Callable[[str], Path], tmp_path: Path, number: int, iteration: int) -> None:
    """In the middle of a period, where a checkpoint is due anyway, and in the last step."""
    train(stub_config("through"))
    config, folder = stub_config("told"), tmp_path / "told"
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as stop:
        train(config, hook=Signal(number, iteration))
    assert stop.value.code == EXIT_STATUS
    assert stop.value.number == number
    assert signal.getsignal(number) is before
    path = last_checkpoint(folder)
    assert path is not None
    assert read_checkpoint(path)["iteration"] == iteration + 1
    manifest = read_manifest(folder / "manifest.json")
    assert manifest is not None
    assert manifest["status"] == "stopped"
    assert signal.Signals(number).name in manifest["error"]
    train(config, resume=True)
    manifest = read_manifest(folder / "manifest.json")
    assert manifest is not None
    assert [session["status"] for session in manifest["sessions"]] == ["stopped", "finished"]
    one, other = (read_checkpoint(tmp_path / name / "model_final.pth")["model"] for name in ("through", "told"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_two_processes_are_told(
    stub_path: str, stub_config: Callable[[str], Path], tmp_path: Path, project_root: Path, own: bool
) -> None:
    """One worker of torchrun, or the process that started both: both write one checkpoint and leave."""
    config, folder = stub_config("two"), tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable] if own else command
    flags = ["--num-gpus", "2"] if own else []
    opts = ["SOLVER.MAX_ITER", "4000", "SOLVER.CHECKPOINT_PERIOD", "4000", "MODEL.STUB.SLEEP", "0.01"]
    environment = {**os.environ, "PYTHONPATH": stub_path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "tools/train_net.py", "--config-file", str(config), *flags, *opts, "MODEL.DEVICE", "cpu"],
        cwd=project_root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 240
    log = folder / "log.txt"
    while not log.exists() or "Starting training from" not in log.read_text():
        assert time.monotonic() < end
        assert process.poll() is None, process.stdout
        time.sleep(0.05)
    time.sleep(0.2)  # from the line to the first step
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if own else int(workers[-1]), signal.SIGTERM if own else signal.SIGUSR1)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == EXIT_STATUS if own else process.returncode
    assert "told to go after iteration" in output
    path = last_checkpoint(folder)
    assert path is not None
    assert read_checkpoint(path)["iteration"] % 10 == 0
