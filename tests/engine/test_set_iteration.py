"""A model whose losses change in the course of a training is told the iteration, a resumed one's too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vis.engine import load_cfg
from vis.engine.parity.losses import _mean_losses
from vis.engine.trainer import Trainer


def test_every_step_is_told(stub_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import training_stub

    told: list[int] = []
    stub = training_stub.TrainingStub
    monkeypatch.setattr(stub, "set_iteration", lambda self, iteration: told.append(iteration), raising=False)
    for last in ("4", "7"):  # the second one resumes
        trainer = Trainer(load_cfg(str(stub_config("told")), ["SOLVER.MAX_ITER", last]))
        trainer.resume_or_load(resume=True)
        trainer.train()
    assert told == list(range(7))


class Staged(nn.Module):
    """Its loss is the iteration."""

    iteration = 0

    def set_iteration(self, iteration: int) -> None:
        self.iteration = iteration

    def forward(self, _: Any) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(float(self.iteration))}


def test_recorded_losses_are_those_of_a_late_iteration() -> None:
    assert _mean_losses(Staged(), {}, seeds=2) == {"loss": 100_000.0}
