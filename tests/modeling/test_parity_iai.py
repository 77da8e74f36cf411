"""IAI against the recording of its release, with weights computed from names; and what the replay does not let pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vis.engine.config import load_cfg
from vis.engine.parity import check_parity, parity_options, read_manifest
from vis.engine.parity.compared import Comparison
from vis.engine.parity.weights import check_state_dict, in_our_names
from vis.modeling import build_model
from vis.modeling.meta_arch.iai import IAI


def released(project_root: Path) -> IAI:
    config = str(project_root / "configs/iai/ytvis19_r50.yaml")
    model = build_model(load_cfg(config, parity_options(load_cfg(config), None)))
    assert isinstance(model, IAI)
    return model


@pytest.mark.parity
def test_names_shapes_and_numbers_of_parameters(project_root: Path, shared_dir: Path) -> None:
    manifest = read_manifest(shared_dir / "parity/iai_r50.manifest.json.gz")
    assert len(manifest) == 463
    model = released(project_root)
    assert [str(check) for check in check_state_dict(model, in_our_names(model, manifest)) if not check.ok] == []
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    whole = {name: value for name, value in model.state_dict().items() if not name.endswith(statistics)}
    assert sum(value.numel() for value in whole.values()) == 45_433_337
    assert count(model.association.layers) + count(model.association.norms) == 1_200_322
    assert count(model.association.id_bank) == 5_854_720
    assert count(model.association.enc_proj) == 524_544
    assert count(model.association.cls_proj) == 3_147_264


@pytest.mark.parity
@pytest.mark.slow
def test_everything_that_is_recorded(project_root: Path, shared_dir: Path) -> None:
    recording = shared_dir / "parity/iai_r50"
    checks = check_parity(
        released(project_root), recording.with_suffix(".manifest.json.gz"), recording.with_suffix(".npz")
    )
    names = {check.name for check in checks}
    assert {"f5.hab", "forced.f3.c5p", "pad.res.areas", "hab.out", "bank.out", "idhead.out", "dyn.up8"} <= names
    assert {"train.bn_eval.b1.losses", "train.bn_batch.b1.grad.l2", "forced.det.assigned_column"} <= names
    assert [str(check) for check in checks if not check.ok] == []


def compared() -> Comparison:
    recorded = {
        "a": np.arange(6.0).reshape(2, 3) + 1,
        "b": np.array([[3, -1], [7, 2]]),
        "c": np.arange(0, 20, 3, dtype=np.float32),
        "c.shape": np.array([4, 5]),
        "c.stride": np.array(3),
        "run.d": np.zeros((2, 3, 4), dtype=np.uint8),
    }
    return Comparison(recorded)


def test_comparison_says_what_differs() -> None:
    comparison = compared()
    a = torch.arange(6.0).reshape(2, 3) + 1
    comparison.close("a", a + 0.003, 1e-3)
    comparison.equal("b", torch.tensor([[3, -1], [7, 2]]))
    comparison.close("c", torch.arange(20.0).reshape(4, 5), 1e-6)
    labels = torch.zeros(2, 3, 4, dtype=torch.uint8)
    labels[1, 0, :2] = 1
    comparison.differing("run.d", labels, 2)
    assert [check.ok for check in comparison.finished()] == [True] * 4
    comparison.close("a", a + 0.03, 1e-3)
    comparison.equal("b", torch.tensor([[3, -1], [7, 3]]))
    comparison.close("c", torch.arange(20.0).reshape(5, 4), 1e-6)
    comparison.differing("run.d", labels, 1)
    assert [check.ok for check in comparison.finished()] == [False] * 4


def test_pixels_and_masks_that_are_none() -> None:
    comparison = compared()
    for found, ok in (([[4, -1], [6, 3]], True), ([[5, -1], [7, 2]], False), ([[3, 0], [7, 2]], False)):
        comparison.pixels("b", torch.tensor(found), 1)
        assert next(check for check in comparison.finished() if check.name == "b").ok is ok
    order = np.array([1, 0])
    comparison.pixels("b", torch.tensor([[7, 2], [3, -1]]), 0, order=order)
    assert next(check for check in comparison.finished() if check.name == "b").ok


def test_what_nobody_offers_has_failed() -> None:
    comparison = compared()
    comparison.equal("b", torch.tensor([[3, -1], [7, 2]]))
    comparison.equal("e", torch.zeros(1))
    comparison.skip(lambda name: name == "a", "for a reason")
    found = {check.name: check for check in comparison.finished()}
    assert set(found) == {"a", "b", "c", "run.d", "e"}
    assert [name for name, check in found.items() if not check.ok] == ["c", "run.d", "e"]
    assert "for a reason" in found["a"].detail
    only = Comparison(compared().recorded, ["run."])
    assert [check.name for check in only.finished()] == ["run.d"]
    assert only.wanted("run.d")
    assert not only.wanted("c")
