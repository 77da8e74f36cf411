"""Arithmetic of the training: number formats, the loss scaler that float16 needs, and parts that are compiled.

Parameters, their updates and checkpoints are float32 always. ``SOLVER.AMP`` lets matrix products and convolutions run
in half precision; what would lose by it switches autocast off where it is written, and this is the list:

    sampling positions of deformable attention and of points in masks   half precision is off by up to a pixel
    the encoder of the pixel decoder (Mask2Former family)                as its authors have it
    matching costs, of masks and of boxes                                overflow, and ties that rounding makes
    mask, dice, focal, box and boundary losses                           sums of many small numbers
    products of embeddings in contrastive losses and in trackers         not normalised: they overflow float16
    boxes and their offsets (IDOL, CondInst, Mask R-CNN)                 pixels beyond 2048 are not whole any more
    softmax, normalisation layers, sums of losses                        torch's own list

A part of one's own does so by ``with torch.autocast(device_type=x.device.type, enabled=False)`` around ``x.float()``.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vis.config import CfgNode, closest, declare

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.SOLVER.COMPILE = node = CfgNode()
    # Modules that torch.compile makes one program of, by their names in the model ("backbone",
    # "sem_seg_head.pixel_decoder", ...). It takes minutes at the first iteration, and again for pictures of a new size
    # unless DYNAMIC; names in checkpoints stay.
    node.PARTS = []
    node.BACKEND = "inductor"
    node.DYNAMIC = True


def mixed_precision(cfg: CfgNode, device: torch.device) -> tuple[torch.dtype | None, torch.amp.GradScaler | None]:
    """The format that ``SOLVER.AMP`` asks autocast for (None: float32 throughout), and a scaler where it needs one.

    Raises:
        ValueError: the name of the format is not known.
    """
    amp = cfg.SOLVER.AMP
    if not amp.ENABLED:
        return None, None
    if amp.DTYPE not in _DTYPES:
        raise ValueError(f"SOLVER.AMP.DTYPE {amp.DTYPE!r} is not one of {', '.join(_DTYPES)}")
    dtype = _DTYPES[amp.DTYPE]
    if device.type != "cuda" and dtype is torch.float16:
        logger.warning(
            "SOLVER.AMP.ENABLED: mixed precision in float16 applies to CUDA only; this run on %s uses float32 "
            "(SOLVER.AMP.DTYPE bfloat16 works here)",
            device,
        )
        return None, None
    logger.info("mixed precision: %s%s", amp.DTYPE, " with a loss scaler" if dtype is torch.float16 else "")
    return dtype, torch.amp.GradScaler("cuda") if dtype is torch.float16 else None


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to ``dtype`` on the kind of ``device``; nothing where ``dtype`` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def compile_parts(cfg: CfgNode, model: nn.Module) -> None:
    """Have torch compile the parts that ``SOLVER.COMPILE.PARTS`` names, when they are first called.

    Raises:
        ValueError: the model has no such part, or torch no such backend.
    """
    node = cfg.SOLVER.COMPILE
    if not node.PARTS:
        return
    backends = torch.compiler.list_backends(exclude_tags=())
    if node.BACKEND not in backends:
        raise ValueError(f"SOLVER.COMPILE.BACKEND {node.BACKEND!r} is not one of {', '.join(backends)}")
    known = dict(model.named_modules())
    for name in node.PARTS:
        if not name or name not in known:
            raise ValueError(
                f"SOLVER.COMPILE.PARTS: the model has no part {name!r}.{closest(name, known)} Its largest are "
                f"{', '.join(part for part, _ in model.named_children())}"
            )
        known[name].compile(backend=node.BACKEND, dynamic=node.DYNAMIC or None)
    logger.info("compiled with %s at first use: %s", node.BACKEND, ", ".join(node.PARTS))
