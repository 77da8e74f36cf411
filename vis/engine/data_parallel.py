"""Data-parallel training: the wrapper of the model that adds up the gradients of all processes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from vis.config import CfgNode, declare

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    node = cfg.SOLVER.DDP = CfgNode()
    # Parameters may be without a gradient in an iteration (every one costs a search of the graph). Otherwise such a
    # parameter is an error.
    node.FIND_UNUSED_PARAMETERS = False
    # The same parameters are used in the same order in every iteration, which saves the search. With gradients that are
    # accumulated they are exchanged after every part of a batch, not once.
    node.STATIC_GRAPH = False
    # Gradients share memory with the buffers of the exchange: saves that of one copy of the trained parameters.
    node.GRADIENT_AS_BUCKET_VIEW = False
    # All batch norms that are trained take their statistics over all processes, on CUDA; without it those of the ViT
    # adapter alone do.
    node.SYNC_BATCH_NORM = False
    # Seconds after which a process that waits for another gives up.
    node.TIMEOUT = 1800


def data_parallel(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` for one of several processes; itself where there is only one.

    Raises:
        ValueError: keys that exclude each other.
    """
    node = cfg.SOLVER.DDP
    if node.STATIC_GRAPH and node.FIND_UNUSED_PARAMETERS:
        raise ValueError("SOLVER.DDP.STATIC_GRAPH finds unused parameters by itself: FIND_UNUSED_PARAMETERS False")
    if comm.get_world_size() == 1:
        return model
    # Each process keeps its own statistics of the batches; the option was renamed, and the old name warns.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    option: dict[str, Any] = {name: False}
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=devices,
        find_unused_parameters=node.FIND_UNUSED_PARAMETERS,
        static_graph=node.STATIC_GRAPH,
        gradient_as_bucket_view=node.GRADIENT_AS_BUCKET_VIEW,
        **option,
    )


def synchronized_norms(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with its trained batch norms over all processes, where there are several and they are on CUDA.

    Names of parameters and buffers stay.
    """
    trained = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and any(parameter.requires_grad for parameter in module.parameters())
    ]
    if not trained or comm.get_world_size() == 1:
        return model
    if device.type != "cuda" or not cfg.SOLVER.DDP.SYNC_BATCH_NORM:
        logger.info("%d batch norms take their statistics in each process alone", len(trained))
        return model
    logger.info("%d batch norms take their statistics over all processes (SOLVER.DDP.SYNC_BATCH_NORM)", len(trained))
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def check_gradients(model: nn.Module) -> None:
    """In a job of several processes every trained parameter must have got a gradient.

    Raises:
        ValueError: one has none, so that the processes would wait for each other, or drift apart.
    """
    if comm.get_world_size() == 1:
        return
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise ValueError(
            f"{len(missing)} parameters got no gradient: {', '.join(missing[:8])}{' ...' * (len(missing) > 8)}. What a "
            "loss does not depend on must be frozen (requires_grad False) or added to a loss times 0; or set "
            "SOLVER.DDP.FIND_UNUSED_PARAMETERS True"
        )


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """A forward pass inside does not move the running statistics of batch norms."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
