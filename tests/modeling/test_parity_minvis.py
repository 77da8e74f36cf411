"""MinVIS R50 against recordings of the released architecture with weights computed from names."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from vis.engine.config import load_cfg
from vis.engine.parity import fill_weights, parity_options, read_manifest
from vis.engine.parity.losses import check_losses
from vis.engine.parity.outputs import check_outputs
from vis.engine.parity.weights import check_state_dict
from vis.modeling import build_model

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def recording(shared_dir: Path) -> Path:
    """``<recording>.npz`` and so on."""
    return shared_dir / "parity" / "minvis_r50"


@pytest.fixture(scope="module")
def model(recording: Path, project_root: Path) -> nn.Module:
    config = str(project_root / "configs/minvis/ytvis19_r50.yaml")
    options = parity_options(load_cfg(config), recording.with_suffix(".train.json"))
    model = build_model(load_cfg(config, options))
    fill_weights(model, read_manifest(recording.with_suffix(".manifest.json.gz")))
    return model


def test_names_and_shapes(model: nn.Module, recording: Path) -> None:
    manifest = read_manifest(recording.with_suffix(".manifest.json.gz"))
    assert len(manifest) == 558
    checks = check_state_dict(model, manifest)
    assert [str(check) for check in checks if not check.ok] == []


def test_outputs(model: nn.Module, recording: Path) -> None:
    checks = check_outputs(model, recording.with_suffix(".npz"))
    assert {"backbone.res2", "backbone.res5", "pred_cls", "pred_masks", "scores", "labels"} <= {c.name for c in checks}
    assert any("areas" in check.name for check in checks)
    assert [str(check) for check in checks if not check.ok] == []


def test_losses(model: nn.Module, recording: Path) -> None:
    checks = check_losses(model, recording.with_suffix(".train.json"))
    assert len(checks) == 30
    assert [str(check) for check in checks if not check.ok] == []
