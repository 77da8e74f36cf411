"""Jobs on SLURM: the script, options, and a job that is preempted, on this machine in place of a cluster."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vis.checkpoint import read_checkpoint
from vis.engine import slurm
from vis.engine.slurm import Command, SlurmOptions, SlurmRun, load_tool, options_of, script, slurm_start, submit
from vis.engine.sweep import run_sweep
from vis.engine.sweep_file import read_sweep
from vis.engine.sweep_jobs import make_jobs

pytest.importorskip("submitit", reason="submitit is not installed")


@pytest.fixture
def tool() -> ModuleType:
    return load_tool("slurm_train")


def test_script(tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--partition", "gpu", "--nodes", "2", "--gpus-per-node", "8", "--minutes", "300", "--dry-run"]
    words += ["--folder", str(tmp_path / "logs"), "--sbatch", "mail-type=END", "--setup", "module load cuda"]
    assert tool.main([*words, "--", "--config-file", "cfg.yaml", "OUTPUT_DIR", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=300", "signal=USR2@120", "mail-type=END"):
        assert f"#SBATCH --{line}" in lines
    assert "#SBATCH --requeue" in lines
    assert "module load cuda" in lines
    assert any(line.startswith("srun ") and f"submitit.core._submit {tmp_path}/logs" in line for line in lines)
    assert lines[-1].endswith("tools/train_net.py --config-file cfg.yaml OUTPUT_DIR out")
    assert not (tmp_path / "logs").exists()


def test_a_tool_that_does_not_spread_is_one_task(tmp_path: Path) -> None:
    text = script(SlurmOptions(gpus_per_node=4, cpus=6), [("run_recipe", ["r.yaml"])], tmp_path)
    assert "--ntasks-per-node=1" in text
    assert "--cpus-per-task=24" in text
    with pytest.raises(ValueError, match="--nodes 2: only train_net"):
        script(SlurmOptions(nodes=2), [("sweep", ["s.yaml"])], tmp_path)


def test_mistakes(tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool.main(["--dry-run"]) == 1
    assert "no command" in capsys.readouterr().err
    assert tool.main(["--dry-run", "--", "trane.py", "x"]) == 1
    assert "there is no tools/trane.py" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert tool.main(["--", "--config-file", "x.yaml"]) == 1
    assert '"srun"' in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tool.main(["--dry-run", "--", "--config-file", "x.yaml"]) == 1
    assert "pip install submitit" in capsys.readouterr().err


def fake_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]) -> None:
    """Shell scripts in place of SLURM's programs."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_submitted_to_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With programs in place of SLURM's: what is submitted is the script, and the job has the command."""
    sbatch = f'cp "$1" {tmp_path}/submitted; echo Submitted batch job 123'
    fake_cluster(tmp_path / "bin", monkeypatch, {"sbatch": sbatch, "srun": ""})
    tools = [("train_net", ["--config-file", "x.yaml"])]
    job = submit(SlurmOptions(gpus_per_node=2, requeues=7), tools, tmp_path / "logs")
    assert job.job_id == "123"
    assert (tmp_path / "submitted").read_text() == script(SlurmOptions(gpus_per_node=2), tools, tmp_path / "logs")
    delayed = job.submission()
    assert isinstance(delayed.function, Command)
    assert delayed.function.tools == [("train_net", ["--config-file", "x.yaml"])]
    assert delayed._timeout_countdown == 7


def test_options() -> None:
    found = options_of(["partition=gpu", "minutes=90", "setup=a b", "setup=c", "sbatch.exclusive", "sbatch.mem=1G"])
    assert (found.partition, found.minutes, found.setup) == ("gpu", 90, ("a b", "c"))
    assert found.parameters(spread=True)["additional_parameters"] == {"requeue": True, "exclusive": True, "mem": "1G"}
    with pytest.raises(ValueError, match="partitoin=x: expected KEY=VALUE. Did you mean 'partition'"):
        options_of(["partitoin=x"])
    with pytest.raises(ValueError, match="expected a number"):
        options_of(["minutes=1-00:00"])


SRUN = """
while [ "$1" != "{python}" ]; do
  [ "$1" = --output ] && out=$(echo "$2" | sed s/%j_%t/77_0/)
  shift
done
exec "$@" >"$out" 2>&1"""


@pytest.mark.slow
def test_a_sweep_on_a_cluster(
    stub_path: str,
    stub_config: Callable[[str], Path],
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each run is a job; one that is in the queue already is not submitted again."""
    monkeypatch.setenv("PYTHONPATH", f"{project_root}{os.pathsep}{stub_path}")
    sbatch = 'export SLURM_JOB_ID=77 SLURM_PROCID=0; (sh "$1" >/dev/null 2>&1 &)\n'
    sbatch += f"echo x >>{tmp_path}/submissions; echo Submitted batch job 77"
    srun = SRUN.format(python=sys.executable)
    fake_cluster(
        tmp_path / "bin", monkeypatch, {"sbatch": sbatch, "srun": srun, "sacct": "echo 'JobID|State|NodeList'"}
    )
    config = stub_config("unused")
    file = tmp_path / "sweep.yaml"
    file.write_text(f"output: {tmp_path}\nconfig: {config}\nsettings: {{one: {{}}}}\n")
    sweep = read_sweep(file)
    (job,) = make_jobs(sweep)
    start = slurm_start(options_of(["gpus_per_node=0", "minutes=9"]))
    job.folder.mkdir(parents=True)
    assert isinstance(start(job, {}), SlurmRun)
    outcome = run_sweep(sweep, start=start)
    assert outcome.finished == ["one/seed0"]
    assert (tmp_path / "submissions").read_text() == "x\n"


@pytest.mark.slow
def test_a_preempted_job_goes_on(
    stub_path: str,
    stub_config: Callable[[str], Path],
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """submitit's executor of this machine: signal, checkpoint, back into the queue, --resume, end."""
    import submitit

    monkeypatch.setenv("PYTHONPATH", f"{project_root}{os.pathsep}{stub_path}")
    config, folder = stub_config("job"), tmp_path / "job"
    executor = submitit.LocalExecutor(folder=str(tmp_path / "logs"))
    executor.update_parameters(timeout_min=8)
    words = ["--config-file", str(config), "MODEL.STUB.SLEEP", "0.2", "SOLVER.CHECKPOINT_PERIOD", "100"]
    words += ["SOLVER.MAX_ITER", "20", "DATALOADER.NUM_WORKERS", "0"]
    job = executor.submit(Command([("train_net", words)], str(tmp_path)))
    end = time.monotonic() + 240
    started = folder / "log.txt"
    while not started.exists() or "Starting training from" not in started.read_text():
        assert time.monotonic() < end, job.stdout()
        time.sleep(0.05)
    time.sleep(0.2)  # from the line to the first step
    (task,) = Path(f"/proc/{job._process.pid}/task/{job._process.pid}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)
    job.result()
    log = job.stdout()
    assert "told to go after iteration" in log
    assert "Resumed from" in log
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == 20
    assert slurm.load_tool("train_net") is slurm.load_tool("train_net")
