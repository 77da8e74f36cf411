"""model_best.pth and the end of a training that gets no better, on made-up evaluations."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vis.checkpoint import read_checkpoint
from vis.engine import load_cfg
from vis.engine.best_checkpoint import progress
from vis.engine.trainer import Trainer

KEY = "SOLVER.BEST_CHECKPOINT."
ON = [f"{KEY}ENABLED", "True", "DATASETS.TEST", "['training_stub_test']", "TEST.EVAL_PERIOD", "2"]
# After so many iterations: its AP.
CURVE = {2: 10.0, 4: 30.0, 6: 20.0, 8: 25.0, 10: 40.0, 12: 35.0}


class Curve:
    """In place of the evaluation: AP by the iterations done, and when it was asked."""

    def __init__(self) -> None:
        self.values: dict[int, float] = dict(CURVE)
        self.trainer: Trainer | None = None
        self.asked: list[int] = []
        self.weights: dict[int, torch.Tensor] = {}
        self.dies_at = -1

    def __call__(self, cfg: Any, model: nn.Module) -> OrderedDict[str, Any]:
        assert self.trainer is not None
        done = min(self.trainer.iter + 1, self.trainer.max_iter)
        if done == self.dies_at:
            raise KeyboardInterrupt
        torch.rand(3)
        self.asked.append(done)
        self.weights[done] = model.class_embed.weight.detach().clone()
        return OrderedDict(segm={"AP": self.values[done], "AP50": 1.0})


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> Curve:
    found = Curve()
    monkeypatch.setattr("vis.engine.trainer.evaluate", found)
    return found


@pytest.fixture
def train(stub_config: Callable[[str], Path], curve: Curve) -> Callable[..., Trainer]:
    def run(*opts: str, name: str = "out", resume: bool = False) -> Trainer:
        torch.manual_seed(0)
        cfg = load_cfg(str(stub_config(name)), [*ON, "SOLVER.CHECKPOINT_PERIOD", "2", *opts])
        curve.trainer = trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer

    return run


def history(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "best_checkpoint.json").read_text())


@pytest.mark.parametrize(
    ("values", "mode", "delta", "expected"),
    [
        ([1, 3, 2, 3], "max", 0.0, (2, 3, 2)),
        ([1, 3, 2, 3], "min", 0.0, (1, 1, 3)),
        ([1, 1.5, 2, 1.9], "max", 1.0, (3, 2, 3)),
        ([math.nan, 2, math.nan], "max", 0.0, (2, 2, 1)),
        ([5, 4, 4.5, 3], "min", 0.0, (4, 3, 0)),
    ],
)
def test_progress(values: list[float], mode: str, delta: float, expected: tuple[int, float, int]) -> None:
    assert tuple(progress(list(enumerate(values, 1)), mode=mode, min_delta=delta)) == expected
    empty = progress([], mode=mode)
    assert (empty.iteration, empty.since) == (0, 0)
    assert math.isnan(empty.value)


def test_the_best_weights_are_kept(train: Callable[..., Trainer], curve: Curve, tmp_path: Path) -> None:
    train()
    assert curve.asked == [2, 4, 6, 8, 10, 12]
    best = read_checkpoint(tmp_path / "out" / "model_best.pth")
    assert (best["iteration"], best["value"], best["metric"]) == (10, 40.0, "segm/AP")
    assert torch.equal(best["model"]["class_embed.weight"], curve.weights[10])
    assert history(tmp_path / "out")["best"] == {"iteration": 10, "value": 40.0, "file": "model_best.pth"}


def test_with_an_average_the_evaluated_weights_are_kept(
    train: Callable[..., Trainer], curve: Curve, tmp_path: Path
) -> None:
    train("SOLVER.EMA.ENABLED", "True")
    best = read_checkpoint(tmp_path / "out" / "model_best.pth")["model"]["class_embed.weight"]
    final = read_checkpoint(tmp_path / "out" / "model_0000009.pth")
    assert torch.equal(best, curve.weights[10])
    assert torch.equal(best, final["parts"]["model_ema"]["model"]["class_embed.weight"])
    assert not torch.equal(best, final["model"]["class_embed.weight"])


def test_stops_when_it_gets_no_better(train: Callable[..., Trainer], curve: Curve, tmp_path: Path) -> None:
    trainer = train(f"{KEY}PATIENCE", "2")
    assert curve.asked == [2, 4, 6, 8], "and no other evaluation at the end"
    assert "2 evaluations without an improvement of segm/AP" in trainer.stop_reason
    assert "the best is 30 after 4 iterations" in trainer.stop_reason
    assert read_checkpoint(tmp_path / "out" / "model_final.pth")["iteration"] == 8
    assert read_checkpoint(tmp_path / "out" / "model_best.pth")["iteration"] == 4


def test_min_mode(train: Callable[..., Trainer], tmp_path: Path) -> None:
    train(f"{KEY}MODE", "min", f"{KEY}PATIENCE", "4")
    assert read_checkpoint(tmp_path / "out" / "model_best.pth")["iteration"] == 2


@pytest.mark.parametrize("checkpoint", ["model_0000003.pth", "model_0000005.pth"])
@pytest.mark.parametrize("patience", ["0", "2"])
def test_resumed_it_comes_to_the_same(
    train: Callable[..., Trainer], curve: Curve, tmp_path: Path, checkpoint: str, patience: str
) -> None:
    opts = [f"{KEY}PATIENCE", patience]
    through = train(*opts, name="through")
    asked, curve.asked = curve.asked, []
    best = read_checkpoint(tmp_path / "through" / "model_best.pth")
    (tmp_path / "through" / "last_checkpoint").write_text(checkpoint)
    resumed = train(*opts, name="through", resume=True)
    assert curve.asked == [done for done in asked if done > int(checkpoint[6:13]) + 1]
    assert resumed.stop_reason == through.stop_reason
    again = read_checkpoint(tmp_path / "through" / "model_best.pth")
    assert again["iteration"] == best["iteration"]
    assert torch.equal(again["model"]["class_embed.weight"], best["model"]["class_embed.weight"])
    assert all(
        torch.equal(resumed.module.state_dict()[name], value) for name, value in through.module.state_dict().items()
    )


@pytest.mark.parametrize("dies_at", [4, 8])
def test_killed_in_an_evaluation(train: Callable[..., Trainer], curve: Curve, tmp_path: Path, dies_at: int) -> None:
    """Between a checkpoint and the end of the evaluation of the same iteration: it is made up for."""
    through = train(f"{KEY}PATIENCE", "2", name="through")
    curve.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        train(f"{KEY}PATIENCE", "2", name="killed")
    curve.dies_at, curve.asked = -1, []
    resumed = train(f"{KEY}PATIENCE", "2", name="killed", resume=True)
    assert curve.asked == list(range(dies_at, 9, 2))
    assert resumed.stop_reason == through.stop_reason
    assert history(tmp_path / "killed") == history(tmp_path / "through")
    for name in ("model_final.pth", "model_best.pth"):
        one, other = (read_checkpoint(tmp_path / run / name) for run in ("through", "killed"))
        assert one["iteration"] == other["iteration"]
        assert all(torch.equal(other["model"][key], value) for key, value in one["model"].items())


def test_a_stopped_training_goes_on_with_more_patience(train: Callable[..., Trainer], curve: Curve) -> None:
    train(f"{KEY}PATIENCE", "2")
    again = train(f"{KEY}PATIENCE", "2", resume=True)
    assert again.stop_reason
    assert curve.asked == [2, 4, 6, 8], "stopped as it was"
    train(f"{KEY}PATIENCE", "3", resume=True)
    assert curve.asked == [2, 4, 6, 8, 10, 12]


def test_a_metric_that_is_not_there(
    train: Callable[..., Trainer], curve: Curve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(f"{KEY}METRIC", "segm/AP5")
    assert "'segm/AP5' is not in the results: there are segm/AP, segm/AP50. Did you mean 'segm/AP50'?" in caplog.text
    assert not (tmp_path / "out" / "model_best.pth").exists()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ([f"{KEY}MODE", "maximum"], "MODE 'maximum' is not one of max, min"),
        ([f"{KEY}METRIC", ""], "METRIC is empty"),
        ([f"{KEY}PATIENCE", "-1"], "must be 0 or more"),
        ([f"{KEY}PATIENCE", "2", "TEST.EVAL_PERIOD", "0"], "TEST.EVAL_PERIOD is 0"),
        (["DATASETS.TEST", "[]"], "needs data sets in DATASETS.TEST"),
        ([f"{KEY}ENABLED", "False", f"{KEY}PATIENCE", "2"], "PATIENCE is set"),
    ],
)
def test_settings_that_cannot_work(train: Callable[..., Trainer], opts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(*opts)
