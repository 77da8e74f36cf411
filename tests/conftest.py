"""Fixtures and options of the whole suite."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two workers on two cores, one thread each

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def _shared_folder() -> Path | None:
    """The folder of recordings and real clips beside the checkout; ``VIS_SHARED`` names another place."""
    named = os.environ.get("VIS_SHARED")
    candidates = [Path(named)] if named else [ROOT / "shared", ROOT.parent / "shared"]
    return next((folder for folder in candidates if (folder / "parity").is_dir()), None)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Recorded outputs and real clips; the test is skipped, with the reason, where they are absent."""
    folder = _shared_folder()
    if folder is None:
        pytest.skip("no folder of recordings: set VIS_SHARED, or put it at ../shared")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips ``gpu`` tests without a GPU. torch is asked only if such a test was collected."""
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
