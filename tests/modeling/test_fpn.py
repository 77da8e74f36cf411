"""The pyramid in two halves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import FPN
from torch import nn

from vis.config import CfgNode
from vis.engine.config import load_cfg
from vis.modeling.backbones.fpn import SplitFPN, build_fpn


@pytest.fixture(scope="module")
def cfg(project_root: Path) -> CfgNode:
    return load_cfg(str(project_root / "configs/_base_/models/condinst_tiny.yaml"), ["MODEL.DEVICE", "cpu"])


def small(cfg: CfgNode, **changes: object) -> SplitFPN:
    options = {"in_features": ("res3", "res4", "res5"), "out_channels": 24, "top": "p6p7", "norm_eval": True}
    torch.manual_seed(0)
    return build_fpn(cfg, **{**options, **changes})


def test_both_halves_are_detectron2s_pyramid(cfg: CfgNode) -> None:
    fpn = small(cfg).eval()
    images = torch.randn(2, 3, 96, 160)
    features = fpn.bottom_up(images)
    found = fpn.top_down(features)
    wanted = FPN.forward(fpn, images)
    assert [tuple(found[f"p{i}"].shape) for i in range(3, 8)] == [
        (2, 24, 12, 20),
        (2, 24, 6, 10),
        (2, 24, 3, 5),
        (2, 24, 2, 3),
        (2, 24, 1, 2),
    ]
    assert list(found) == list(wanted) == list(fpn(images))
    for name, level in wanted.items():
        torch.testing.assert_close(found[name], level)


def test_what_replaces_res5_reaches_every_level(cfg: CfgNode) -> None:
    fpn = small(cfg).eval()
    features = fpn.bottom_up(torch.randn(1, 3, 64, 96))
    assert fpn.last_channels == features["res5"].shape[1]
    changed = torch.randn_like(features["res5"])
    before, after = fpn.top_down(features), fpn.top_down({**features, "res5": changed})
    for name, level in before.items():
        assert (after[name] - level).abs().max() > 1e-3, name


def test_pool_adds_one_level(cfg: CfgNode) -> None:
    fpn = small(cfg, in_features=("res2", "res3", "res4", "res5"), top="pool").eval()
    pyramid = fpn(torch.randn(1, 3, 64, 96))
    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    torch.testing.assert_close(pyramid["p6"], pyramid["p5"][..., ::2, ::2])


def norms(fpn: SplitFPN) -> list[nn.BatchNorm2d]:
    return [module for module in fpn.bottom_up.modules() if isinstance(module, nn.BatchNorm2d)]


def test_norms_keep_statistics_and_are_trained(cfg: CfgNode) -> None:
    fpn = small(cfg).train()
    assert norms(fpn)
    assert not any(norm.training for norm in norms(fpn))
    assert fpn.training
    before = norms(fpn)[3].running_mean.clone()
    fpn(torch.randn(2, 3, 64, 96))["p3"].sum().backward()
    assert torch.equal(norms(fpn)[3].running_mean, before)
    assert norms(fpn)[3].weight.grad is not None
    free = small(cfg, norm_eval=False).train()
    assert all(norm.training for norm in norms(free))
    free.eval()
    assert not any(norm.training for norm in norms(free))


def test_frozen_stages_have_no_trained_norm(cfg: CfgNode) -> None:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    fpn = small(cfg)
    trained = {name.split(".")[0] for name, parameter in fpn.bottom_up.named_parameters() if parameter.requires_grad}
    assert trained == {"res3", "res4", "res5"}


def test_other_backbones(cfg: CfgNode) -> None:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS, cfg.MODEL.SWIN.NUM_HEADS = 12, [1, 1, 1, 1], [1, 1, 2, 2]
    fpn = small(cfg).train()
    pyramid = fpn(torch.randn(1, 3, 64, 96))
    assert fpn.last_channels == 96
    assert pyramid["p5"].shape == (1, 24, 2, 3)


def test_a_map_that_is_not_there(cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match="needs res6 of the backbone, which gives res2, res3, res4, res5"):
        small(cfg, in_features=("res5", "res6"))
