from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from vis.modeling import build_model
from vis.modeling.build import resolve_device


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("MODEL.BACKBONE.NAME", "build_resnet_backbon", "build_resnet_backbone"),
        ("MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHed", "MaskFormerHead"),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformPixelDecoder", "MSDeformAttnPixelDecoder"),
        (
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
            "MultiScaleTransformerDecoder",
            "MultiScaleMaskedTransformerDecoder",
        ),
        ("MODEL.TRACKER.NAME", "QueryMatching", "QueryMatchingTracker"),
    ],
)
def test_unknown_names_get_a_hint(tiny_cfg: Any, key: str, value: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} is '{value}', which is not known. Did you mean '{hint}'"):
        build_model(tiny_cfg({key: value}))


def test_unknown_meta_architecture(tiny_cfg: Any) -> None:
    cfg = tiny_cfg().clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "MinVS"
    with pytest.raises(ValueError, match="META_ARCHITECTURE is 'MinVS'.*Did you mean 'MinVIS'"):
        build_model(cfg)


def test_number_of_classes_must_be_known(tiny_cfg: Any) -> None:
    with pytest.raises(ValueError, match="NUM_CLASSES is 0 and no data set"):
        build_model(tiny_cfg({"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 0}))


def test_features_that_the_backbone_does_not_give(tiny_cfg: Any) -> None:
    with pytest.raises(ValueError, match=r"IN_FEATURES names \['res6'\]; the backbone gives \['res2'"):
        build_model(tiny_cfg({"MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5", "res6"]}))


def test_two_levels_from_the_configuration(tiny_cfg: Any) -> None:
    model: Any = build_model(
        tiny_cfg({"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res4", "res5"]})
    )
    out = model.eval().segment(torch.zeros(1, 3, 64, 96))
    assert out["mask_features"].shape == (1, 24, 16, 24)
    assert out["pred_logits"].shape == (1, 9, 7)


def test_a_device_that_is_not_there(tiny_cfg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'cuda', but this machine has no CUDA device.*cpu"):
        build_model(tiny_cfg({"MODEL.DEVICE": "cuda"}))
    with pytest.raises(ValueError, match="'cuda:1', but"):
        resolve_device("cuda:1")
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'gpu'.*cpu, cuda.*auto"):
        resolve_device("gpu")


def test_auto_takes_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2', but this machine has 2 CUDA devices"):
        resolve_device("cuda:2")


def test_the_log_says_what_was_built(tiny_cfg: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vis"):
        model = build_model(tiny_cfg())
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"MinVIS on cpu, {millions:.1f} M parameters" in caplog.text
    assert model.training
