"""Trainings on a SLURM cluster through submitit: several nodes, requeued when they are preempted or their time is up.

One task runs for each GPU and joins the others as under torchrun. Before the end of the job's time, and on preemption,
every task gets a signal; the training writes a checkpoint after its step (:mod:`vis.engine.preemption`), the first task
puts the job back into the queue, and it goes on there with ``--resume``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from vis.checkpoint import write_text_atomic
from vis.config import closest
from vis.engine.preemption import EXIT_STATUS, Preempted
from vis.engine.processes import Running, tail
from vis.engine.sweep import Start
from vis.engine.sweep_jobs import Job, commands

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
#: Tools whose processes work together; of the others one task runs, which uses the GPUs of its node by itself.
SPREAD = ("train_net", "multi_scale_test")
JOB_FILE = "slurm_job.txt"
_WAIT = 600  # seconds that other tasks wait for the first one to requeue the job, which ends them


@dataclass
class SlurmOptions:
    """What a job asks for.

    Attributes:
        minutes: of one stay; a job that needs more is requeued up to ``requeues`` times.
        signal_before: seconds between the signal and the end, in which a step and a checkpoint have to fit.
        cpus: of each task. setup: shell lines before the job. more: any other option of sbatch, without the dashes.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int = 1
    cpus: int = 8
    memory: str | None = None
    minutes: int = 24 * 60
    requeues: int = 20
    signal_before: int = 120
    job_name: str = "vis"
    setup: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)

    def parameters(self, *, spread: bool) -> dict[str, Any]:
        """Arguments of submitit's executor.

        Raises:
            ValueError: a tool that works in one process is to run on several nodes.
        """
        if not spread and self.nodes > 1:
            raise ValueError(f"--nodes {self.nodes}: only {' and '.join(SPREAD)} work on several nodes together")
        tasks = max(self.gpus_per_node, 1) if spread else 1
        cpus = self.cpus if spread else self.cpus * max(self.gpus_per_node, 1)
        named = {"partition": self.partition, "account": self.account, "qos": self.qos, "constraint": self.constraint}
        found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.gpus_per_node:
            found["gpus_per_node"] = self.gpus_per_node
        if self.memory is not None:
            found["mem"] = self.memory
        python_path = f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
        return {
            **found,
            "job_name": self.job_name,
            "time": self.minutes,
            "nodes": self.nodes,
            "ntasks_per_node": tasks,
            "cpus_per_task": cpus,
            "signal_delay_s": self.signal_before,
            "setup": [python_path, *self.setup],
            "srun_args": [f"--cpus-per-task={cpus}"],  # srun does not take it from sbatch since SLURM 22.05
            "additional_parameters": {"requeue": True, **self.more},
        }


class Command:
    """Tools to run one after the other in every task of a job; submitit keeps it in a file.

    Args:
        tools: (name of a tool, its arguments).
        folder: where the command is run; paths in the arguments are relative to it.
        resume: continue what an earlier stay in the queue left.
    """

    def __init__(self, tools: Sequence[tuple[str, Sequence[str]]], folder: str, resume: bool = False) -> None:
        self.tools = [(name, list(words)) for name, words in tools]
        self.folder = folder
        self.resume = resume

    def __call__(self) -> None:
        """Run; in a job.

        Raises:
            RuntimeError: a tool ended with another status than 0.
        """
        os.chdir(self.folder)
        submitit = load_submitit()
        environment = submitit.JobEnvironment()
        number = environment._usr_sig()
        requeue = signal.getsignal(number)
        assert callable(requeue), "submitit sets a handler before it runs anything"
        if environment.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        resume = self.resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        for each in (number, signal.SIGTERM):
            signal.signal(each, _leave)  # until, and after, a training has handlers of its own
        try:
            for name, words in self.tools:
                again = ["--resume"] if resume and name == "train_net" and "--resume" not in words else []
                again = [] if "--eval-only" in words else again
                status = load_tool(name).main([*again, *words])
                if status:
                    raise RuntimeError(f"{name}.py ended with status {status}; its messages are above")
        except Preempted as stop:
            _requeue(stop.number, number, requeue, first=environment.global_rank == 0)

    def checkpoint(self) -> Any:
        """What submitit puts into the queue instead."""
        again = Command(self.tools, self.folder, resume=True)
        return load_submitit().helpers.DelayedSubmission(again)


def _leave(number: int, frame: FrameType | None) -> None:
    raise Preempted(number)


def _requeue(number: int, asked: int, requeue: Callable[..., Any], *, first: bool) -> None:
    """After the checkpoint. On SIGTERM alone SLURM itself requeues, or somebody cancelled the job."""
    if number == signal.SIGTERM:
        logger.warning("told to end: SLURM requeues a job that it preempts by itself")
        raise SystemExit(EXIT_STATUS)
    requeue(asked, None)  # in the first task it does not return
    if not first:
        time.sleep(_WAIT)
    raise SystemExit(EXIT_STATUS)


def load_submitit() -> ModuleType:
    """The package.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("jobs on SLURM need submitit, which is not installed: pip install submitit")
    return importlib.import_module("submitit")


def load_tool(name: str) -> ModuleType:
    """A file of ``tools/`` as a module.

    Raises:
        ValueError: there is no such tool.
    """
    file = ROOT / "tools" / f"{name}.py"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.py")))
        raise ValueError(f"there is no tools/{name}.py; there are {there}")
    found = f"vis_tool_{name}"
    if found not in sys.modules:
        spec = importlib.util.spec_from_file_location(found, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[found] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[found])
    return sys.modules[found]


def spreads(tools: Sequence[tuple[str, Sequence[str]]]) -> bool:
    """Whether one task for each GPU runs."""
    return all(name in SPREAD for name, _ in tools)


def script(options: SlurmOptions, tools: Sequence[tuple[str, Sequence[str]]], folder: Path) -> str:
    """The sbatch script that :func:`submit` would submit, as submitit writes it."""
    load_submitit()
    slurm = importlib.import_module("submitit.slurm.slurm")
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder.absolute()))}"
    text: str = slurm._make_sbatch_string(
        command=command, folder=folder.absolute(), **options.parameters(spread=spreads(tools))
    )
    return text


def submit(options: SlurmOptions, tools: Sequence[tuple[str, Sequence[str]]], folder: Path) -> Any:
    """Put the tools into the queue; pickles and logs of the job go to ``folder``, which all nodes must see.

    Returns:
        submitit's job.

    Raises:
        ValueError: submitit is not installed, or this is not a machine of a SLURM cluster.
    """
    submitit = load_submitit()
    try:
        executor = submitit.SlurmExecutor(folder=str(folder.absolute()), max_num_timeout=options.requeues)
    except RuntimeError as error:
        raise ValueError(f"{error} --dry-run shows the script on any machine") from error
    executor.update_parameters(**options.parameters(spread=spreads(tools)))
    return executor.submit(Command(tools, os.getcwd()))


class SlurmRun:
    """A job of the cluster as the run of a sweep or recipe. It stays in the queue when the sweep is stopped."""

    def __init__(self, job: Any) -> None:
        self.job = job
        self.started = time.monotonic()

    def poll(self) -> int | None:
        """0 or 1 when it is over, None before."""
        if not self.job.done():
            return None
        return 0 if self.job.exception() is None else 1

    def seconds(self) -> float:
        """Since this process knows of it, waiting included."""
        return time.monotonic() - self.started

    def last_words(self) -> str:
        """The end of its output."""
        return "\n".join(tail(path, 12) for path in (self.job.paths.stdout, self.job.paths.stderr))

    def terminate(self) -> None:
        """Leave it in the queue."""

    def kill(self) -> None:
        """Leave it in the queue."""


def slurm_start(options: SlurmOptions) -> Start:
    """Runs the jobs of a sweep on the cluster, with as many GPUs as a setting has (none with ``gpus_per_node`` 0).

    A job that an earlier call submitted and that is not over is waited for, not submitted again.
    """

    def start(job: Job, environment: dict[str, str]) -> Running:
        known = job.folder / JOB_FILE
        logs = job.folder / "slurm"
        if known.is_file():
            number = known.read_text(encoding="utf-8").strip()
            found = load_submitit().SlurmJob(folder=str(logs.absolute()), job_id=number)
            if not found.done(force_check=True):
                logger.info("%s is job %s already", job.name, number)
                return SlurmRun(found)
        gpus = job.setting.num_gpus if options.gpus_per_node else 0
        tools = [(words[0], words[1:]) for words in commands(job, lambda tool: [tool])]
        name = f"{options.job_name}-{job.name.replace('/', '-')}"
        found = submit(replace(options, gpus_per_node=gpus, job_name=name), tools, logs)
        write_text_atomic(f"{found.job_id}\n", known)
        logger.info("%s is job %s", job.name, found.job_id)
        return SlurmRun(found)

    return start


def options_of(words: Sequence[str]) -> SlurmOptions:
    """From ``KEY=VALUE`` words: fields of :class:`SlurmOptions`, and ``sbatch.KEY=VALUE`` for any other option.

    Raises:
        ValueError: a key is unknown, or a value is not what it should be.
    """
    known = {item.name: item for item in fields(SlurmOptions) if item.name not in ("more", "setup")}
    chosen: dict[str, Any] = {"more": {}, "setup": ()}
    for word in words:
        key, separator, value = word.partition("=")
        if key.startswith("sbatch."):
            chosen["more"][key.removeprefix("sbatch.")] = value if separator else True
        elif key == "setup":
            chosen["setup"] += (value,)
        elif key not in known or not separator:
            raise ValueError(
                f"--slurm {word}: expected KEY=VALUE.{closest(key, known)} Keys: {', '.join(known)}, setup"
            )
        elif isinstance(known[key].default, int):
            if not value.isdigit():
                raise ValueError(f"--slurm {word}: expected a number")
            chosen[key] = int(value)
        else:
            chosen[key] = value
    return SlurmOptions(**chosen)
