"""Training losses of DVIS online against those recorded of the released code, weights computed from names.

With what a released yaml sets, mistakes included.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vis.config.compat import RELEASED_DEFAULTS
from vis.engine.config import load_cfg
from vis.engine.parity import check_parity, fill_weights, parity_options, read_manifest
from vis.engine.parity.common import read_npz
from vis.engine.parity.losses import ITERATION, labelled_sample
from vis.modeling import build_model

pytestmark = [pytest.mark.parity, pytest.mark.slow]
RELEASED = [str(part) for pair in RELEASED_DEFAULTS["DVIS_online"].items() for part in pair]


def test_losses(project_root: Path, shared_dir: Path) -> None:
    """Every loss within the bar; a class loss, which hardly depends on the random points, to five digits."""
    config = str(project_root / "configs/dvis/ovis_online_r50.yaml")
    recording = shared_dir / "parity/dvis_online_r50.train.json"
    manifest = shared_dir / "parity/dvis_online_r50.manifest.json.gz"
    options = [*parity_options(load_cfg(config), recording), *RELEASED]
    model = build_model(load_cfg(config, options))
    checks = check_parity(model, manifest, losses=recording)
    assert [str(check) for check in checks if not check.ok] == []
    assert len(checks) == 5 + 18

    fill_weights(model, read_manifest(manifest))
    clip = read_npz(recording.with_suffix(".npz"), "input", "gt_masks", "gt_masks_shape")
    assert model.criterion.released_matcher
    model.train().set_iteration(ITERATION)
    with torch.no_grad():
        found = model([labelled_sample(clip)])
    recorded = json.loads(recording.read_text())["loss"]
    for name in (name for name in recorded if name.startswith("loss_ce")):
        assert float(found[name]) == pytest.approx(recorded[name][0], rel=1e-4), name
