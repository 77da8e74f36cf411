"""A MinVIS of fractions of a second: R50 at a quarter of its width, 32 channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vis.config import CfgNode
from vis.engine.config import load_cfg

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 6,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 24,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 9,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}


@pytest.fixture(scope="session")
def tiny_cfg(project_root: Path) -> Callable[..., CfgNode]:
    """``tiny_cfg({KEY: value, ...})``."""

    def load(changes: dict[str, Any] | None = None) -> CfgNode:
        values = {**SMALL, **(changes or {})}
        opts = [part for pair in values.items() for part in pair]
        return load_cfg(str(project_root / "configs/_base_/models/minvis_tiny.yaml"), opts)

    return load


@pytest.fixture(scope="session")
def tiny_model(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., Any]:
    """``tiny_model({KEY: value})``: always the same weights, spread so that masks and classes of frames differ."""
    from vis.modeling import build_model

    def build(changes: dict[str, Any] | None = None) -> Any:
        torch.manual_seed(0)
        model = build_model(tiny_cfg(changes))
        with torch.no_grad():
            for parameter in model.sem_seg_head.predictor.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return build
