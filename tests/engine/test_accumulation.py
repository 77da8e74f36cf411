"""Gradients of several parts of a batch in one update, and the wrapper that adds up those of several processes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from vis.engine import load_cfg
from vis.engine.data_parallel import data_parallel, statistics_kept
from vis.engine.trainer import Trainer
from vis.layers.effective_batch import effective_mean

STEPS = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", "4"]


@pytest.fixture
def trainer(stub_config: Callable[[str], Path]) -> Callable[..., Trainer]:
    def make(*opts: str) -> Trainer:
        torch.manual_seed(0)
        made = Trainer(load_cfg(str(stub_config("out")), ["SOLVER.MAX_ITER", "2", *STEPS, *opts]))
        made.resume_or_load()
        return made

    return make


def test_one_update_from_several_parts(trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    made = trainer("SOLVER.OPTIMIZER", "SGD")
    seen: list[tuple[int, ...]] = []
    updates = []
    forward, step = made.module.forward, made.optimizer.step

    def watched(batch: list[Any]) -> Any:
        seen.append(tuple(sample["video_id"] for sample in batch))
        return forward(batch)

    made.module.forward = watched  # type: ignore[method-assign]
    made.optimizer.step = lambda *a, **k: updates.append(len(seen)) or step(*a, **k)  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO, logger="vis"):
        made.train()
    assert "4 clips per update = 1 process x 4 steps x 1 clip. An iteration is one update: 2 iterations" in caplog.text
    assert all(len(videos) == 1 for videos in seen)
    # The first part is run once more to find out that nothing is counted.
    assert updates == [5, 9]


class Counted(torch.nn.Module):
    """A loss that is a sum divided by a count of its own kind; batch normalisation, whose statistics move."""

    def __init__(self, by_targets: bool) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 1)
        self.norm = torch.nn.BatchNorm1d(2)
        self.calls = 0
        if by_targets:
            self.target_counts = lambda batch: {"items": len(batch)}

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls += 1
        items = torch.stack(batch)
        self.norm(items)
        return {"loss": self.inner(items).square().sum() / effective_mean("items", len(batch))}


@pytest.mark.parametrize("by_targets", [True, False])
def test_counts_are_those_of_the_whole_batch(
    trainer: Callable[..., Trainer], by_targets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts of two and of five items: as if all seven were computed at once, and half of that for each part."""
    step = trainer().step
    step.module = step.model = model = Counted(by_targets)
    step.parameters = list(model.parameters())
    step.optimizer = torch.optim.SGD(step.parameters, lr=0.0)
    kept: list[torch.Tensor] = []
    step._update = lambda *args: kept.append(model.inner.weight.grad.clone())  # type: ignore[method-assign]
    items = list(torch.randn(7, 2))
    before = model.norm.num_batches_tracked.clone()
    with caplog.at_level(logging.INFO, logger="vis"):
        step(0, [items[:2], items[2:]])
        step(1, [items[:2], items[2:]])
    whole = model.inner(torch.stack(items)).square().mean()
    (expected,) = torch.autograd.grad(whole, model.inner.weight)
    for gradient in kept:
        torch.testing.assert_close(gradient, expected)
    assert model.calls == (4 if by_targets else 8)
    assert int(model.norm.num_batches_tracked - before) == 4, "counting moves no statistics"
    assert caplog.text.count("run forward once more to count") == (0 if by_targets else 1)


def test_statistics_are_kept() -> None:
    norm = torch.nn.BatchNorm2d(3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with statistics_kept(norm):
        norm(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(torch.randn(2, 3, 4, 4))
    assert int(norm.num_batches_tracked) == 1
    assert not torch.equal(norm.running_mean, before["running_mean"])


def _options(config: str, opts: list[str]) -> dict[str, Any]:
    """What a training in two processes was wrapped with, how often it exchanged gradients, and what it came to."""
    made = Trainer(load_cfg(config, opts))
    made.resume_or_load()
    assert isinstance(made.model, DistributedDataParallel)
    exchanged: list[int] = []
    made.model.register_comm_hook(exchanged, _exchange)
    try:
        made.train()
        error = ""
    except ValueError as caught:
        error = str(caught)
    model = made.model
    found = (model.find_unused_parameters, model.static_graph, model.gradient_as_bucket_view)
    return {"keys": found, "exchanged": len(exchanged), "error": error, "weights": made.module.state_dict()}


def _exchange(seen, bucket):  # type: ignore[no-untyped-def]  # torch looks at the annotations of a hook
    seen.append(bucket.index())
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0] / dist.get_world_size())


def _unused(config: str, opts: list[str]) -> dict[str, Any]:
    """As above, with a parameter that no loss depends on."""
    import training_stub

    made = training_stub.TrainingStub.__init__

    def init(self: Any, cfg: Any) -> None:
        made(self, cfg)
        self.idle = torch.nn.Parameter(torch.ones(2))

    training_stub.TrainingStub.__init__ = init
    return _options(config, opts)


def test_keys_of_the_wrapper(stub_config: Callable[[str], Path], tmp_path: Path) -> None:
    opts = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", "2"]
    config = str(stub_config("out"))
    load_cfg(config)  # imports what the processes need
    plain = layouts.run(2, tmp_path / "plain", functools.partial(_options, config, opts))
    assert plain["keys"] == (False, False, False)
    assert plain["exchanged"] == 2, "once per update, not once per part"
    view = ["SOLVER.DDP.GRADIENT_AS_BUCKET_VIEW", "True"]
    static = ["SOLVER.DDP.STATIC_GRAPH", "True"]
    for more, keys, exchanged in ((view, (False, False, True), 2), (static, (False, True, False), 4)):
        other = layouts.run(2, tmp_path / more[0], functools.partial(_options, config, [*opts, *more]))
        assert other["keys"] == keys
        assert other["exchanged"] == exchanged
        assert layouts.difference(plain, other) < 1e-6


def test_a_parameter_without_a_gradient_is_named(stub_config: Callable[[str], Path], tmp_path: Path) -> None:
    opts = ["SOLVER.MAX_ITER", "2"]
    config = str(stub_config("out"))
    load_cfg(config)
    failed = layouts.run(2, tmp_path / "failed", functools.partial(_unused, config, opts))
    assert "1 parameters got no gradient: idle." in failed["error"]
    assert "SOLVER.DDP.FIND_UNUSED_PARAMETERS True" in failed["error"]
    found = ["SOLVER.DDP.FIND_UNUSED_PARAMETERS", "True"]
    trained = layouts.run(2, tmp_path / "found", functools.partial(_unused, config, [*opts, *found]))
    assert trained["keys"] == (True, False, False)
    assert not trained["error"]


def test_keys_that_exclude_each_other(stub_config: Callable[[str], Path]) -> None:
    both = ["SOLVER.DDP.FIND_UNUSED_PARAMETERS", "True", "SOLVER.DDP.STATIC_GRAPH", "True"]
    cfg = load_cfg(str(stub_config("out")), both)
    with pytest.raises(ValueError, match="STATIC_GRAPH finds unused parameters by itself"):
        data_parallel(cfg, torch.nn.Linear(1, 1), torch.device("cpu"))
    cfg = load_cfg(str(stub_config("out")), ["SOLVER.NORMALIZER", "mean"])
    with pytest.raises(ValueError, match="SOLVER.NORMALIZER is 'mean', expected one of released, effective_batch"):
        Trainer(cfg)
