"""DVIS and DVIS++ against recordings of the released architectures with weights computed from names."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from vis.engine.config import load_cfg
from vis.engine.parity import check_parity, parity_options, read_manifest
from vis.engine.parity.weights import check_state_dict
from vis.modeling import build_model

pytestmark = pytest.mark.parity

# Recording -> configuration, entries of its state dict, and what its released weights need.
MODELS = {
    "dvis_online_r50": ("dvis/ovis_online_r50.yaml", 676, ["MODEL.TRACKER.MATCHING", "dvis_v1"]),
    "dvis_offline_r50": ("dvis/ovis_offline_r50.yaml", 868, ["MODEL.TRACKER.MATCHING", "dvis_v1"]),
    "dvis_offline_swinl": ("dvis/ovis_offline_swinl.yaml", 960, ["MODEL.TRACKER.MATCHING", "dvis_v1"]),
    "dvisplus_online_r50": ("dvisplus/ovis_online_r50.yaml", 690, []),
    "dvisplus_offline_r50": ("dvisplus/ovis_offline_r50.yaml", 882, []),
    "dvisplus_online_vitl": ("dvisplus/ovis_online_vitl.yaml", 955, []),
    "dvisplus_offline_vitl": ("dvisplus/ovis_offline_vitl.yaml", 1147, []),
}
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("dvis_offline_swinl", "dvisplus_offline_vitl")]


def released(name: str, project_root: Path) -> nn.Module:
    config, _, needed = MODELS[name]
    config = str(project_root / "configs" / config)
    return build_model(load_cfg(config, [*parity_options(load_cfg(config, needed), None), *needed]))


@pytest.mark.parametrize("name", ["dvis_offline_r50", "dvisplus_online_r50", "dvisplus_offline_r50", *LARGE])
def test_names_and_shapes(name: str, project_root: Path, shared_dir: Path) -> None:
    manifest = read_manifest(shared_dir / "parity" / f"{name}.manifest.json.gz")
    assert len(manifest) == MODELS[name][1]
    assert [str(check) for check in check_state_dict(released(name, project_root), manifest) if not check.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dvis_online_r50", "dvisplus_online_vitl"])
def test_outputs(name: str, project_root: Path, shared_dir: Path) -> None:
    """Names and shapes, intermediate arrays, scores, labels and areas, all of which a recording has."""
    recording = shared_dir / "parity" / name
    checks = check_parity(
        released(name, project_root), recording.with_suffix(".manifest.json.gz"), recording.with_suffix(".npz")
    )
    names = {check.name for check in checks}
    assert {"backbone.res2", "tracker.pred_embds", "pred_cls", "pred_masks", "scores", "labels", "areas"} <= names
    assert [str(check) for check in checks if not check.ok] == []
