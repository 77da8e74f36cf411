"""Arithmetic of the training: which number formats, and the loss scaler that float16 needs."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vis.config import CfgNode

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
    if device.type != "cuda":
        logger.warning("SOLVER.AMP.ENABLED: mixed precision applies to CUDA only; this run on %s uses float32", device)
        return None, None
    dtype = _DTYPES[amp.DTYPE]
    logger.info("mixed precision: %s%s", amp.DTYPE, " with a loss scaler" if dtype is torch.float16 else "")
    return dtype, torch.amp.GradScaler("cuda") if dtype is torch.float16 else None


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to ``dtype`` on the kind of ``device``; nothing where ``dtype`` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
