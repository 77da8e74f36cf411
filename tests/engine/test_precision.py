"""Number formats of a training, and parts that are compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch

from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.engine.trainer import Trainer
from vis.modeling.matchers.hungarian import HungarianMatcher

BF16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision_data")
    for preset in ("synthetic_ytvis", "synthetic_ovis"):
        generate(preset, folder, seed=3, num_videos={"train": 3, "val": 1})
    return folder


@pytest.fixture
def train(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Two iterations of a tiny model in this process."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))

    def run(method: str, *more: str) -> Trainer:
        config, *options = layouts.options(method, tmp_path / "out", "SOLVER.IMS_PER_BATCH", "2", *more)
        trainer = Trainer(load_cfg(str(layouts.ROOT / config), options))
        torch.manual_seed(3)
        trainer.resume_or_load()
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize(
    "method",
    ["minvis", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dvis_online", "vita", "idol", "iai"))],
)
def test_bfloat16_on_the_cpu(train: Callable[..., Trainer], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are made in half precision, what must not be is not, and the losses are about those of float32."""
    costs: list[torch.dtype] = []
    cost = HungarianMatcher.cost

    def seen(self: Any, *args: Any) -> Any:
        found = cost(self, *args)
        costs.append(found.dtype)
        return found

    monkeypatch.setattr(HungarianMatcher, "cost", seen)
    torch.manual_seed(0)
    full = train(method).storage.history("total_loss").values()[0][0]
    torch.manual_seed(0)
    half = train(method, *BF16)
    first = half.storage.history("total_loss").values()[0][0]
    assert first == pytest.approx(full, rel=0.05)
    assert first != full
    assert set(costs) <= {torch.float32}
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in half.module.parameters())


def test_float16_on_the_cpu_is_said(train: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    train("minvis", "SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", "1")
    assert "float16 applies to CUDA only; this run on cpu uses float32" in caplog.text


def test_compiled_parts_compute_the_same(stub_config: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """Backend "eager": what is traced is run as it is."""
    parts = ["SOLVER.COMPILE.PARTS", "['class_embed']", "SOLVER.COMPILE.BACKEND", "eager"]
    trained = []
    with caplog.at_level("INFO", logger="vis"):
        for options in ([], parts):
            torch.manual_seed(0)
            trainer = Trainer(load_cfg(str(stub_config("out")), ["SOLVER.MAX_ITER", "2", *options]))
            trainer.resume_or_load()
            trainer.train()
            trained.append(trainer.module)
    assert "compiled with eager at first use: class_embed" in caplog.text
    assert trained[1].class_embed._compiled_call_impl is not None
    state = trained[1].state_dict()
    assert trained[0].state_dict().keys() == state.keys()
    for name, value in trained[0].state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.COMPILE.PARTS", "['backbones']"], "no part 'backbones'. Did you mean 'backbone'"),
        (["SOLVER.COMPILE.PARTS", "['backbone']", "SOLVER.COMPILE.BACKEND", "fast"], "BACKEND 'fast' is not one of"),
    ],
)
def test_mistakes(stub_config: Callable[[str], Path], options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(load_cfg(str(stub_config("out")), options))
