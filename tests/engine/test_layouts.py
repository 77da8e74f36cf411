"""Any number of processes and steps that share a batch train to the same weights.

Two statements, for every method. With parts of the same size (one process in two steps, two processes), a step computes
the same numbers, dropout and batch normalisation included: the weights are equal bit by bit where there are two parts,
whose sum has no order. With parts of any size and ``SOLVER.NORMALIZER "effective_batch"``, the same up to rounding,
where nothing looks at a whole part: batch normalisation over it, dropout and sampling with one stream for it, padding
to its largest picture.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch

from vis.checkpoint import read_checkpoint
from vis.data.synthetic import generate

REFERENCE = "SOLVER.REFERENCE_WORLD_SIZE"
EXACT = ["SOLVER.NORMALIZER", "effective_batch", "MODEL.IDOL.DROPOUT", "0.0", "MODEL.RESNETS.NORM", "FrozenBN"]
#: Of the largest number in a tensor. float32; measured: gradients 5e-5 (a bias whose gradient is all rounding: 2e-6
#: otherwise), weights 3e-7.
GRADIENTS, WEIGHTS = 3e-4, 3e-6

SLOW = ["ctvis", "dvis_offline", "vita", "idol"]
PARTS = ["minvis", *(pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW, "dvis_online", "iai", "masktrack"))]
ANY_SIZE = ["dvis_online", *(pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW, "minvis"))]

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts_data")
    for preset in ("synthetic_ytvis", "synthetic_ovis"):
        generate(preset, folder, seed=3, num_videos={"train": 6, "val": 1})
    return folder


@pytest.fixture
def train(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """``train(method, processes, steps, KEY, VALUE ...)``: what :func:`layouts.train` gives."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    numbers = itertools.count()

    def run(method: str, world_size: int, steps: int, *more: str, resume: bool = False, folder: str = "") -> Any:
        name = f"{method}_{world_size}_{steps}_{next(numbers)}"
        output = tmp_path / (folder or f"out_{name}")
        arguments = layouts.options(method, output, "SOLVER.ACCUMULATE_STEPS", str(steps), *more)
        return layouts.run(world_size, tmp_path / name, functools.partial(layouts.train, arguments, resume=resume))

    return run


@pytest.mark.parametrize("method", PARTS)
def test_parts_of_the_same_size(train: Train, method: str) -> None:
    one = train(method, 1, 2, REFERENCE, "2")
    two = train(method, 2, 1, REFERENCE, "2")
    assert layouts.difference(one, two, "gradients") == 0
    assert layouts.difference(one, two) == 0
    assert [value for value, _ in one["losses"]] == pytest.approx([value for value, _ in two["losses"]], rel=1e-6)


@pytest.mark.parametrize("method", ANY_SIZE)
def test_parts_of_any_size(train: Train, method: str) -> None:
    whole = train(method, 1, 1, REFERENCE, "1", *EXACT)
    for world_size, steps in ((1, 2), (2, 2)):
        parts = train(method, world_size, steps, REFERENCE, "1", *EXACT)
        assert layouts.difference(whole, parts, "gradients") < GRADIENTS
        assert layouts.difference(whole, parts) < WEIGHTS


@pytest.mark.slow
def test_the_normalizer_matters(train: Train) -> None:
    """What the statement about parts of any size is worth: counts of each part alone give other gradients."""
    plain = ["MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.MAX_ITER", "1"]
    whole, parts = (train("minvis", 1, steps, REFERENCE, "1", *plain) for steps in (1, 4))
    assert layouts.difference(whole, parts, "gradients") > 10 * GRADIENTS


def test_resuming_with_another_number_of_processes(train: Train, tmp_path: Path) -> None:
    """The batches stay those of the number of processes that the run began with, and so do the weights."""
    period = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "2"]
    through = train("minvis", 2, 0, *period, folder="run")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000000.pth")
    resumed = train("minvis", 1, 0, *period, resume=True, folder="run")
    assert len(resumed["losses"]) == 1
    assert layouts.difference(through, resumed) == 0
    saved = read_checkpoint(tmp_path / "run" / "model_final.pth")
    assert (saved["world_size"], saved["reference"]) == (1, 2), "and when it is resumed again"


@pytest.mark.slow
def test_torchrun_on_two_nodes(data: Path, tmp_path: Path, train: Train) -> None:
    """Two agents on this machine, one process each, find each other and train as one process does in two steps."""
    arguments = layouts.options("minvis", tmp_path / "out", REFERENCE, "2", "SOLVER.MAX_ITER", "1")
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
    port = layouts.free_port()
    nodes = [
        subprocess.Popen(
            [
                *[sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"],
                *["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)],
                *[layouts.__file__, str(tmp_path / "result"), *arguments],
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    for node in nodes:
        output, _ = node.communicate(timeout=120)
        assert node.returncode == 0, output[-3000:]
    result = torch.load(tmp_path / "result", weights_only=False)
    one = train("minvis", 1, 2, REFERENCE, "2", "SOLVER.MAX_ITER", "1")
    assert layouts.difference(one, result) == 0
