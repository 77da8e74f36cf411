"""One process or many: detectron2's own launching, and starts under torchrun."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.launch import launch as spawn
from detectron2.utils import comm

logger = logging.getLogger(__name__)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launch(
    function: Callable[..., Any],
    *,
    device: str = "auto",
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
) -> None:
    """Call ``function(*args)`` in every process of the job.

    Under torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` in the environment) this process is one of several already
    and joins the others: by NCCL on CUDA, by Gloo on the CPU. Otherwise ``num_gpus`` processes are started where there
    is more than one GPU to use, and the function is simply called where there is not.

    Args:
        function: importable by name, since other processes call it.
        device: ``MODEL.DEVICE``.
        dist_url: where processes of several machines meet; "auto" takes a free port of this machine.

    Raises:
        ValueError: more GPUs are asked for than there are, or the settings of several machines do not fit together.
    """
    cuda = uses_cuda(device)
    if all(name in os.environ for name in _TORCHRUN):
        _join(function, cuda, args)
        return
    if num_gpus < 0 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: the rank must be "
            "between 0 and the number of machines less one, and none negative"
        )
    if num_gpus > 1 or num_machines > 1:
        _check_gpus(cuda, num_gpus)
        if num_machines > 1 and dist_url == "auto":
            raise ValueError(
                "--num-machines > 1 needs --dist-url tcp://HOST:PORT, an address of machine 0 that the others can reach"
            )
        spawn(function, num_gpus, num_machines, machine_rank, dist_url, args)
    else:
        function(*args)


def uses_cuda(device: str) -> bool:
    """Whether ``MODEL.DEVICE`` means CUDA on this machine."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _check_gpus(cuda: bool, num_gpus: int) -> None:
    present = torch.cuda.device_count()
    if not cuda or num_gpus > present or num_gpus < 1:
        raise ValueError(
            f"--num-gpus {num_gpus} was asked for, but {present} CUDA devices can be used here"
            + ("" if cuda else " and MODEL.DEVICE is not cuda")
            + ". Ask for fewer; several processes on the CPU start with `torchrun --nproc-per-node N ...`"
        )


def _join(function: Callable[..., Any], cuda: bool, args: tuple[Any, ...]) -> None:
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
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
        comm.synchronize()
        function(*args)
        # Everybody is done before anybody leaves, and models that are wrapped for data-parallel training are gone
        # before the process group is: Gloo's threads have been seen to abort a process that was left by its peers.
        comm.synchronize()
        gc.collect()
    finally:
        dist.destroy_process_group()
