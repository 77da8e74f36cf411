"""One process or many: started here, or by torchrun."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, start_processes

from vis.engine.peers import job_store, watch_peers
from vis.engine.preemption import passed_on

logger = logging.getLogger(__name__)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
TIMEOUT = 1800.0


def launch(
    function: Callable[..., Any],
    *,
    device: str = "auto",
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    timeout: float = TIMEOUT,
    args: tuple[Any, ...] = (),
) -> None:
    """Call ``function(*args)`` in every process of the job.

    Under torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` in the environment) this process is one of several already
    and joins the others: by NCCL on CUDA, by Gloo on the CPU. Otherwise ``num_gpus`` processes are started, one for
    each GPU, or on the CPU where that is the device; one alone is a plain call. When a process of the job ends before
    its time, the others end too and say which one it was (:mod:`vis.engine.peers`).

    Args:
        function: importable by name, since other processes call it.
        device: ``MODEL.DEVICE``.
        dist_url: where processes of several machines meet; "auto" takes a free port of this machine.
        timeout: seconds that a process waits for the others (``SOLVER.DDP.TIMEOUT``).

    Raises:
        ValueError: more GPUs are asked for than there are, or the settings of several machines do not fit together.
        ChildProcessError: a process was killed.
    """
    cuda = uses_cuda(device)
    if all(name in os.environ for name in _TORCHRUN):
        started = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        if num_gpus > 1 and str(num_gpus) != started and os.environ["RANK"] == "0":
            logger.warning("torchrun has started %s processes here: --num-gpus %d is not used", started, num_gpus)
        _join(function, cuda, timeout, args)
        return
    if num_gpus < 0 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: the rank must be "
            "between 0 and the number of machines less one, and none negative"
        )
    if num_gpus <= 1 and num_machines == 1:
        function(*args)
        return
    _check_number(device, num_gpus)
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError(
                "--num-machines > 1 needs --dist-url tcp://HOST:PORT, an address of machine 0 that the others can reach"
            )
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    _start(function, cuda, num_gpus, num_machines, machine_rank, dist_url, timeout, args)


def uses_cuda(device: str) -> bool:
    """Whether ``MODEL.DEVICE`` means CUDA on this machine."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _check_number(device: str, num_gpus: int) -> None:
    """On the CPU processes are started only where that is asked for, and not many more than it has cores."""
    if device == "cpu":
        most, what = max(os.cpu_count() or 1, 4), "processes can be started on the CPU here"
    else:
        most, what = torch.cuda.device_count(), "CUDA devices can be used here (MODEL.DEVICE cpu: processes on the CPU)"
    if not 1 <= num_gpus <= most:
        raise ValueError(f"--num-gpus {num_gpus} was asked for, but {most} {what}. Ask for fewer")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _start(
    function: Callable[..., Any],
    cuda: bool,
    per_machine: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    if not cuda:
        logger.info("%d processes on the CPU", per_machine)
    first, world_size = machine_rank * per_machine, num_machines * per_machine
    settings = (function, cuda, first, per_machine, world_size, dist_url, timeout, args)
    started = start_processes(_worker, settings, nprocs=per_machine, join=False, start_method="spawn")
    try:
        with passed_on(started.pids()):
            while not started.join():
                pass
    except ProcessExitedException as error:
        if not error.signal_name:
            raise  # it has printed its own message
        text = f"process {first + error.error_index} (pid {error.error_pid}) was killed by {error.signal_name}"
        if error.signal_name == signal.Signals.SIGKILL.name:
            text += ", as the system does for want of memory"
        _tell_others(dist_url, text, machines=num_machines)
        raise ChildProcessError(f"{text}; the other processes were ended") from error


def _tell_others(dist_url: str, text: str, *, machines: int) -> None:
    """Processes of other machines cannot see how one ended here."""
    place = urlparse(dist_url)
    if machines == 1 or place.hostname is None or place.port is None:
        return
    with contextlib.suppress(RuntimeError):  # the store went with process 0, which the others notice
        job_store(place.hostname, place.port).compare_set("ended", "", text)


def _worker(
    local_rank: int,
    function: Callable[..., Any],
    cuda: bool,
    first: int,
    per_machine: int,
    world_size: int,
    dist_url: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    if cuda:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // per_machine, 1))
    limit = timedelta(seconds=timeout)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(
        backend, init_method=dist_url, world_size=world_size, rank=first + local_rank, timeout=limit
    )
    _run(function, per_machine, args)


def _join(function: Callable[..., Any], cuda: bool, timeout: float, args: tuple[Any, ...]) -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started a process with LOCAL_RANK {local_rank}, but there are {torch.cuda.device_count()} "
                "CUDA devices here: lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    if int(os.environ["WORLD_SIZE"]) == 1:
        function(*args)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    _run(function, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])), args)


def _run(function: Callable[..., Any], per_machine: int, args: tuple[Any, ...]) -> None:
    try:
        with watch_peers():
            comm.create_local_process_group(per_machine)
            comm.synchronize()
            function(*args)
            # Everybody is done before anybody leaves, and models that are wrapped for data-parallel training are gone
            # before the process group is: Gloo's threads have been seen to abort a process that was left by its peers.
            comm.synchronize()
            gc.collect()
    finally:
        dist.destroy_process_group()
