"""Data-parallel training: the wrapper of the model that adds up the gradients of all processes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` for one of several processes; itself where there is only one."""
    if comm.get_world_size() == 1:
        return model
    # Each process keeps its own statistics of the batches; the option was renamed, and the old name warns.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    option: dict[str, Any] = {name: False}
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **option)
