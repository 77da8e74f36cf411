"""Schedules of the learning rate by their released names, stepped once per iteration."""

from __future__ import annotations

import logging

from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer

from vis.config import CfgNode, closest

logger = logging.getLogger(__name__)

SCHEDULES = ("WarmupMultiStepLR", "WarmupPolyLR", "WarmupCosineLR")


class WarmupPoly(ParamScheduler):
    """``warmup(x) * (1 - x) ** power`` at the fraction x of the training, as DeepLab and Mask2Former define it.

    Args:
        warmup_fraction: part of the training in which the factor rises linearly from ``warmup_factor`` to 1 (or stays
            at ``warmup_factor`` where ``warmup_method`` is "constant").
        constant_ending: once warm, never below this fraction of the base rate.
    """

    def __init__(
        self,
        *,
        power: float,
        constant_ending: float,
        warmup_factor: float,
        warmup_fraction: float,
        warmup_method: str = "linear",
    ) -> None:
        self.power = power
        self.constant_ending = constant_ending
        self.warmup_factor = warmup_factor
        self.warmup_fraction = warmup_fraction
        self.warmup_method = warmup_method

    def __call__(self, where: float) -> float:
        poly = (1.0 - min(where, 1.0)) ** self.power
        if where >= self.warmup_fraction:
            return max(poly, self.constant_ending)
        if self.warmup_method == "constant":
            return self.warmup_factor * poly
        done = where / self.warmup_fraction
        return (self.warmup_factor * (1.0 - done) + done) * poly


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
    """The schedule named by ``SOLVER.LR_SCHEDULER_NAME``.

    Raises:
        ValueError: the name is not known, ``MAX_ITER`` is not positive, or ``STEPS`` do not increase.
    """
    solver = cfg.SOLVER
    name = solver.LR_SCHEDULER_NAME
    if name not in SCHEDULES:
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME {name!r} is not one of {', '.join(SCHEDULES)}.{closest(name, SCHEDULES)}"
        )
    if solver.MAX_ITER <= 0:
        raise ValueError(f"SOLVER.MAX_ITER must be at least 1, found {solver.MAX_ITER}")
    if solver.WARMUP_METHOD not in ("linear", "constant"):
        raise ValueError(f"SOLVER.WARMUP_METHOD {solver.WARMUP_METHOD!r} is not one of linear, constant")
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if warmup == 1.0:
        logger.warning(
            "the learning rate is still warming up when training ends: SOLVER.WARMUP_ITERS %d, MAX_ITER %d",
            *(solver.WARMUP_ITERS, solver.MAX_ITER),
        )
    schedule = _poly(cfg, warmup) if name == "WarmupPolyLR" else _with_warmup(cfg, warmup)
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)


def _poly(cfg: CfgNode, warmup: float) -> ParamScheduler:
    return WarmupPoly(
        power=cfg.SOLVER.POLY_LR_POWER,
        constant_ending=cfg.SOLVER.POLY_LR_CONSTANT_ENDING,
        warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
        warmup_fraction=warmup,
        warmup_method=cfg.SOLVER.WARMUP_METHOD,
    )


def _with_warmup(cfg: CfgNode, warmup: float) -> ParamScheduler:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        after: ParamScheduler = CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)
    else:
        after = _multi_step(solver.STEPS, solver.GAMMA, solver.MAX_ITER)
    if warmup == 0.0:
        return after
    return WarmupParamScheduler(after, solver.WARMUP_FACTOR, warmup, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL)


def _multi_step(steps: list[int], gamma: float, max_iter: int) -> ParamScheduler:
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"SOLVER.STEPS must increase, found {list(steps)}")
    used = [step for step in steps if 0 < step < max_iter]
    if len(used) != len(steps):
        logger.warning("SOLVER.STEPS %s: only %s lie inside the training of %d iterations", list(steps), used, max_iter)
    if not used:
        return LinearParamScheduler(1.0, 1.0)
    return MultiStepParamScheduler(
        [gamma**drops for drops in range(len(used) + 1)], milestones=used, num_updates=max_iter
    )
