"""IDOL against recordings of the released architecture with weights computed from names."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from vis.engine.config import load_cfg
from vis.engine.parity import check_parity, parity_options, read_manifest
from vis.engine.parity.weights import check_state_dict
from vis.modeling import build_model

pytestmark = pytest.mark.parity

# Recording -> configuration, entries of its state dict.
MODELS = {"idol_r50": ("ovis_r50.yaml", 619), "idol_swinl": ("ytvis21_swinl.yaml", 711)}


def released(name: str, project_root: Path, losses: Path | None = None) -> nn.Module:
    config = str(project_root / "configs/idol" / MODELS[name][0])
    return build_model(load_cfg(config, parity_options(load_cfg(config), losses)))


@pytest.mark.parametrize("name", list(MODELS))
def test_names_and_shapes(name: str, project_root: Path, shared_dir: Path) -> None:
    manifest = read_manifest(shared_dir / "parity" / f"{name}.manifest.json.gz")
    assert len(manifest) == MODELS[name][1]
    assert [str(check) for check in check_state_dict(released(name, project_root), manifest) if not check.ok] == []


@pytest.mark.slow
def test_outputs_and_losses(project_root: Path, shared_dir: Path) -> None:
    """Arrays before tracking, scores, labels and areas of the result, and all 32 losses."""
    recording = shared_dir / "parity/idol_r50"
    losses = recording.with_suffix(".train.json")
    checks = check_parity(
        released("idol_r50", project_root, losses),
        recording.with_suffix(".manifest.json.gz"),
        recording.with_suffix(".npz"),
        losses,
    )
    names = {check.name for check in checks}
    assert {"pred_logits", "pred_boxes", "pred_inst_embed", "pred_masks", "reference_points"} <= names
    assert {"scores", "labels", "areas", "loss_reid", "loss_reid_aux", "loss_giou_4"} <= names
    assert len(checks) == 5 + 8 + 32
    assert [str(check) for check in checks if not check.ok] == []
