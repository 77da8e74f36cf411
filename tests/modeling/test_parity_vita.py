"""VITA against recordings of the released architecture with weights computed from names."""

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


def built(config: Path, losses: Path | None) -> nn.Module:
    return build_model(load_cfg(str(config), parity_options(load_cfg(str(config)), losses)))


@pytest.fixture(scope="module")
def recording(shared_dir: Path) -> Path:
    return shared_dir / "parity" / "vita_r50"


@pytest.fixture(scope="module")
def model(recording: Path, project_root: Path) -> nn.Module:
    model = built(project_root / "configs/vita/ytvis19_r50.yaml", recording.with_suffix(".train.json"))
    manifest = read_manifest(recording.with_suffix(".manifest.json.gz"))
    assert len(manifest) == 706
    assert [str(check) for check in check_state_dict(model, manifest) if not check.ok] == []
    fill_weights(model, manifest)
    return model


def test_outputs(model: nn.Module, recording: Path) -> None:
    checks = check_outputs(model, recording.with_suffix(".npz"))
    names = {check.name for check in checks}
    arrays = {f"vita.pred_{name}" for name in ("logits", "mask_embed", "fq_embed", "cq_embed")}
    assert {"backbone.res2", "backbone.res5", "scores", "labels", "areas", *arrays} <= names
    assert [str(check) for check in checks if not check.ok] == []


@pytest.mark.slow
def test_losses(model: nn.Module, recording: Path) -> None:
    checks = check_losses(model, recording.with_suffix(".train.json"))
    assert len(checks) == 40
    assert [str(check) for check in checks if not check.ok] == []


@pytest.mark.slow
def test_names_and_shapes_with_swin(project_root: Path, shared_dir: Path) -> None:
    manifest = read_manifest(shared_dir / "parity" / "vita_swinl.manifest.json.gz")
    assert len(manifest) == 798
    checks = check_state_dict(built(project_root / "configs/vita/ytvis21_swinl.yaml", None), manifest)
    assert [str(check) for check in checks if not check.ok] == []
