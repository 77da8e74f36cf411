"""A process of a job that dies: the others end soon, and say which one it was and why."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist

from vis.engine import load_cfg, peers
from vis.engine.defaults import run_tool
from vis.engine.launch import launch
from vis.engine.trainer import Trainer


def train(config: str, end: Callable[[Trainer], None]) -> None:
    """The second process ends in its second iteration as it is told."""
    trainer = Trainer(load_cfg(config, ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "400"]))
    trainer.resume_or_load()
    step = trainer.run_step

    def run_step() -> None:
        if dist.get_rank() == 1 and trainer.iter == 2:
            end(trainer)
        step()

    trainer.run_step = run_step  # type: ignore[method-assign]
    trainer.train()


def _process(rank: int, port: int, folder: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    descriptor = os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    status = run_tool(functools.partial(launch, function, device="cpu", args=args))
    sys.stderr.flush()
    os._exit(status)


def two_processes(folder: Path, function: Callable[..., None], *args: Any) -> tuple[list[int | None], list[str], float]:
    """Exit codes, what each wrote to stderr, and the seconds from start to end."""
    context = multiprocessing.get_context("fork")
    port = layouts.free_port()
    processes = [context.Process(target=_process, args=(rank, port, folder, function, args)) for rank in range(2)]
    start = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    seconds = time.monotonic() - start
    return (
        [process.exitcode for process in processes],
        [(folder / f"stderr_{rank}").read_text() for rank in range(2)],
        seconds,
    )


def killed(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken(trainer: Trainer) -> None:
    raise ValueError("this clip is broken")


def first_is_broken() -> None:
    """The process that holds the store."""
    if dist.get_rank() == 0:
        raise ValueError("this clip is broken")
    dist.barrier()


def test_a_killed_process_is_named(stub_config: Callable[[str], Path], tmp_path: Path) -> None:
    codes, errors, seconds = two_processes(tmp_path, train, str(stub_config("out")), killed)
    assert codes == [1, -signal.SIGKILL]
    assert re.search(r"error: another process of this job ended: process 1 \(pid \d+ on \S+\) is gone", errors[0])
    assert seconds < 60


def test_the_own_error_comes_first_and_is_told(stub_config: Callable[[str], Path], tmp_path: Path) -> None:
    codes, errors, seconds = two_processes(tmp_path, train, str(stub_config("out")), broken)
    assert codes == [1, 1]
    assert "error: this clip is broken" in errors[1]
    assert "another process" not in errors[1]
    assert "error: another process of this job ended: process 1: ValueError: this clip is broken" in errors[0]
    assert seconds < 60


def test_what_the_first_process_has_to_say_is_read(tmp_path: Path) -> None:
    codes, errors, _ = two_processes(tmp_path, first_is_broken)
    assert codes == [1, 1]
    assert "error: another process of this job ended: process 0: ValueError: this clip is broken" in errors[1]


def wait_for_ever() -> None:
    """As NCCL does where a process is gone: no error comes."""
    peers.GRACE = 0.5
    if dist.get_rank() == 1:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(0.1)


def test_a_process_that_waits_for_ever_is_ended(tmp_path: Path) -> None:
    codes, errors, seconds = two_processes(tmp_path, wait_for_ever)
    assert codes == [1, -signal.SIGKILL]
    assert "error: another process of this job ended: process 1" in errors[0]
    assert seconds < 60


def leave_one_after_the_other() -> None:
    if dist.get_rank() == 0:
        time.sleep(2.5)


def test_an_orderly_end_is_no_loss(tmp_path: Path) -> None:
    codes, errors, _ = two_processes(tmp_path, leave_one_after_the_other)
    assert codes == [0, 0]
    assert not any("error" in text for text in errors)


class Store:
    """As the store of a job, in this process."""

    def __init__(self) -> None:
        self.content: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.content[key] = value

    def get(self, key: str) -> bytes:
        return self.content[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.content for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> None:
        self.content.setdefault(key, value)


def test_silence_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    watch = peers.Peers(store, 0, 3)
    for rank in (1, 2):
        store.set(f"place_{rank}", "elsewhere 7")
        store.set(f"alive_{rank}", "0")
    assert watch._look() == ""
    assert not watch._to_watch(2), "the next process watches it"
    monkeypatch.setattr(peers, "SILENCE", 0.0)
    assert "process 1 (pid 7 on elsewhere) has given no sign of life" in watch._look()
    assert peers.Peers(store, 2, 3)._look().startswith("process 1 "), "the others are told"


def _children(process: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_text()
        if "spawn_main" in words or "train_net" in words:
            found.append(int(child))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_the_tool(
    stub_path: str, stub_config: Callable[[str], Path], tmp_path: Path, project_root: Path, torchrun: bool
) -> None:
    """A process of ``--num-gpus 2`` or of torchrun is killed from outside."""
    several = [] if torchrun else ["--num-gpus", "2"]
    command = ["tools/train_net.py", *several, "--config-file", str(stub_config("out"))]
    command += ["SOLVER.MAX_ITER", "100000", "MODEL.STUB.SLEEP", "0.05", "SOLVER.CHECKPOINT_PERIOD", "100000"]
    if torchrun:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = {**os.environ, "PYTHONPATH": stub_path, "OMP_NUM_THREADS": "1"}
    out = (tmp_path / "shown").open("w")
    process = subprocess.Popen(
        [sys.executable, *command], cwd=project_root, env=environment, stdout=out, stderr=subprocess.STDOUT
    )
    try:
        end = time.monotonic() + 300  # two starts of Python, on a machine with other work to do
        while "Starting training" not in (tmp_path / "shown").read_text():
            assert process.poll() is None, (tmp_path / "shown").read_text()[-3000:]
            assert time.monotonic() < end, (tmp_path / "shown").read_text()[-3000:]
            time.sleep(0.2)
        time.sleep(1)
        os.kill(sorted(_children(process.pid))[-1], signal.SIGKILL)
        start = time.monotonic()
        assert process.wait(60) != 0
        assert time.monotonic() - start < 60
    finally:
        process.kill()
        out.close()
    shown = (tmp_path / "shown").read_text()
    if torchrun:
        assert "Signal 9 (SIGKILL)" in shown
    else:
        assert re.search(r"error: process 1 \(pid \d+\) was killed by SIGKILL.*; the other processes were ended", shown)
        assert "Traceback" not in shown
