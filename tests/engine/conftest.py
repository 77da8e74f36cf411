"""A training of a second: data, config and processes for the tests of the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for layouts.py, which tests import

CONFIG = """
IMPORTS: ["training_stub"]
MODEL: {{META_ARCHITECTURE: TrainingStub, DEVICE: cpu}}
DATASETS:
  TRAIN: ["training_stub_train"]
  TEST: []
  CUSTOM:
    - {{NAME: training_stub_train, JSON: "{data}/train.json", ROOT: "{data}"}}
    - {{NAME: training_stub_test, JSON: "{data}/test.json", ROOT: "{data}"}}
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{MIN_SIZE_TRAIN: [32], MIN_SIZE_TEST: 32}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 12, BASE_LR: 0.01, CHECKPOINT_PERIOD: 4, WARMUP_ITERS: 3, STEPS: [7]}}
OUTPUT_DIR: "{output}"
"""


@pytest.fixture(scope="session")
def stub_path() -> Iterator[str]:
    """Makes ``training_stub`` importable here, and in processes that get this as PYTHONPATH."""
    sys.path.insert(0, str(HERE))
    yield str(HERE)
    sys.path.remove(str(HERE))


@pytest.fixture(scope="session")
def stub_data(stub_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data set."""
    import training_stub

    folder = tmp_path_factory.mktemp("stub_data")
    training_stub.write_data(folder)
    return folder


@pytest.fixture
def stub_config(stub_data: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Gives the yaml of a stub training that writes to ``tmp_path/<name>``."""

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(CONFIG.format(data=stub_data, output=tmp_path / name))
        return path

    return write


@pytest.fixture(scope="session")
def launcher(stub_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[str]]]:
    """Starts tools in a tenth of a second: see ``fork_server``."""
    path = str(tmp_path_factory.mktemp("server") / "socket")
    file = str(Path(stub_path) / "fork_server.py")
    root = str(Path(stub_path).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{stub_path}", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, file, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert server.stdout is not None
    assert server.stdin is not None
    assert server.stdout.readline() == "ready\n"
    yield lambda tool: [sys.executable, "-S", "-E", file, path, tool]
    server.stdin.close()
    server.wait(60)
