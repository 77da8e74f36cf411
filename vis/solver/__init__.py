"""Optimisation: parameter groups, optimizers, gradient clipping, schedules of the learning rate."""

from __future__ import annotations

from vis.solver.build import build_gradient_clipper, build_optimizer
from vis.solver.clipping import GradientClipper
from vis.solver.param_groups import parameter_groups
from vis.solver.schedule import build_lr_scheduler

__all__ = [
    "GradientClipper",
    "build_gradient_clipper",
    "build_lr_scheduler",
    "build_optimizer",
    "parameter_groups",
]
