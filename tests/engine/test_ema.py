"""The average of the weights: what it is, that it survives a resume, and what is evaluated."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vis.checkpoint import read_checkpoint
from vis.engine import load_cfg
from vis.engine.ema import WeightAverage
from vis.engine.trainer import Trainer, evaluate_only

ON = ["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.9"]
TEST = ["DATASETS.TEST", "['training_stub_test']"]


@pytest.fixture
def train(stub_config: Callable[[str], Path]) -> Callable[..., Trainer]:
    """Train the stub with KEY VALUE pairs; gives the trainer."""

    def run(*opts: str, name: str = "out", resume: bool = False, calls: list[Any] | None = None) -> Trainer:
        torch.manual_seed(0)
        trainer = Trainer(load_cfg(str(stub_config(name)), ["SOLVER.MAX_ITER", "8", *opts]))
        trainer.resume_or_load(resume=resume)
        for call in calls or []:
            call(trainer)
        trainer.train()
        return trainer

    return run


class Small(nn.Module):
    """One of each: trained, frozen, running statistics, a counter, a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 2)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.second = self.first


def test_the_average_by_hand(tmp_path: Path) -> None:
    model = Small()
    average = WeightAverage(model, folder=tmp_path, decay=0.75, warmup=False)
    average.before_train()
    expected = model.first.weight.detach().double().clone()
    statistics = model.norm.running_mean.double().clone()
    for step in range(4):
        with torch.no_grad():
            model.first.weight += step + 1
            model.norm.running_mean += 2 * step
            model.norm.num_batches_tracked += 1
        average.update()
        expected = 0.75 * expected + 0.25 * model.first.weight.detach().double()
        statistics = 0.75 * statistics + 0.25 * model.norm.running_mean.double()
    state = average.state_dict()
    assert state["updates"] == 4
    names = {"first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert state["model"].keys() == names
    torch.testing.assert_close(state["model"]["first.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["model"]["norm.running_mean"].double(), statistics, rtol=1e-6, atol=1e-6)


def test_the_beginning_counts_less(tmp_path: Path) -> None:
    """After n updates the average keeps (1 + n) / (10 + n) of itself, until that is DECAY."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, folder=tmp_path, decay=0.2, warmup=True)
    average.before_train()
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.state_dict()["model"]["weight"].fill_(0.0)
    expected = 0.0
    for updates in range(5):
        average.update()
        keep = min(0.2, (1 + updates) / (10 + updates))
        expected = keep * expected + (1 - keep)
        assert average.state_dict()["model"]["weight"].item() == pytest.approx(expected)


def test_applied_and_taken_back_to_the_bit(tmp_path: Path) -> None:
    model = Small()
    average = WeightAverage(model, folder=tmp_path, decay=0.5)
    average.before_train()
    with torch.no_grad():
        model.first.weight *= 3
    average.update()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name: value.clone() for name, value in average.state_dict()["model"].items()}

    def evaluation() -> None:
        with average.applied():
            assert torch.equal(model.first.weight, averaged["first.weight"])
            assert torch.equal(model.second.weight, averaged["first.weight"])
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        evaluation()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in average.state_dict()["model"].items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_is_checked(tmp_path: Path, decay: float) -> None:
    with pytest.raises(ValueError, match="SOLVER.EMA.DECAY"):
        WeightAverage(nn.Linear(1, 1), folder=tmp_path, decay=decay)


def test_training_is_the_same_and_resumes_exactly(train: Callable[..., Trainer], tmp_path: Path) -> None:
    plain = train(name="plain")
    through = train(*ON, "SOLVER.CHECKPOINT_PERIOD", "3", name="through")
    for name, value in plain.module.state_dict().items():
        assert torch.equal(through.module.state_dict()[name], value), "averaging does not change the training"
    for checkpoint in ("model_0000002.pth", "model_0000005.pth"):
        (tmp_path / "through" / "last_checkpoint").write_text(checkpoint)
        resumed = train(*ON, "SOLVER.CHECKPOINT_PERIOD", "3", name="through", resume=True)
        assert resumed.average is not None
        assert through.average is not None
        state, other = resumed.average.state_dict(), through.average.state_dict()
        assert state["updates"] == other["updates"] == 8
        assert all(torch.equal(state["model"][name], value) for name, value in other["model"].items())


def test_files_and_what_is_evaluated(
    train: Callable[..., Trainer], stub_config: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(cfg: Any, model: nn.Module) -> OrderedDict[str, Any]:
        seen.append(model.class_embed.weight.detach().clone())
        return OrderedDict()

    monkeypatch.setattr("vis.engine.trainer.evaluate", evaluate)
    monkeypatch.setattr("vis.engine.evaluation.evaluate", evaluate)
    trainer = train(*ON, *TEST)
    final = read_checkpoint(tmp_path / "out" / "model_final.pth")
    average = final["parts"]["model_ema"]["model"]["class_embed.weight"]
    own = final["model"]["class_embed.weight"]
    assert torch.equal(trainer.module.class_embed.weight, own)
    assert not torch.equal(average, own)
    assert torch.equal(seen.pop(), average)
    alone = read_checkpoint(tmp_path / "out" / "model_final_ema.pth")
    assert torch.equal(alone["model"]["class_embed.weight"], average)
    assert alone["model"].keys() == final["model"].keys()

    config = str(stub_config("other"))
    weights = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    for more, expected in (
        (ON, average),
        ([], own),
        ([*ON, "SOLVER.EMA.EVALUATE", "False"], own),
        ([*ON, "MODEL.WEIGHTS", str(tmp_path / "out" / "model_final_ema.pth")], average),
    ):
        evaluate_only(load_cfg(config, [*TEST, *weights, *more]))
        assert torch.equal(seen.pop(), expected), more


def test_a_step_that_is_left_out_is_not_averaged(train: Callable[..., Trainer]) -> None:
    trainer = train(*ON, "MODEL.STUB.NAN_AT", "2", "SOLVER.NONFINITE.SKIP", "1", "SOLVER.NONFINITE.DUMPS", "0")
    assert trainer.average is not None
    assert trainer.average.updates == 7


def test_switched_on_later(train: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    """A run without an average continues with one that begins there; one of another model is refused."""
    train("SOLVER.MAX_ITER", "4")
    resumed = train(*ON, resume=True)
    assert resumed.average is not None
    assert resumed.average.updates == 4
    assert "no state of model_ema, which starts anew" in caplog.text
    other = WeightAverage(nn.Linear(1, 1), folder=resumed.folder, decay=0.5)
    with pytest.raises(ValueError, match="of other parameters than are trained here: backbone.0.bias"):
        other.load_state_dict(resumed.average.state_dict())
