"""Losses: functions of tensors."""

from __future__ import annotations

from vis.modeling.losses.masks import dice_cost, dice_loss, sigmoid_ce_cost, sigmoid_ce_loss

__all__ = ["dice_cost", "dice_loss", "sigmoid_ce_cost", "sigmoid_ce_loss"]
