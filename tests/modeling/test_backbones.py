"""Every backbone under MinVIS by its fragment alone: it builds, learns, and gives results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vis.config import CfgNode
from vis.engine.benchmarks import Settings
from vis.engine.benchmarks.train import INSTANCES, labelled_clip
from vis.engine.config import load_cfg
from vis.modeling import build_model

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": INSTANCES,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 24,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 40,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}
LARGE = pytest.mark.slow  # more than a few seconds, or more than a gigabyte
#: Fragment -> channels of res2..res5, queries.
BACKBONES = [
    pytest.param("r50", (256, 512, 1024, 2048), 100),
    pytest.param("r101", (256, 512, 1024, 2048), 100, marks=LARGE),
    pytest.param("swin_t", (96, 192, 384, 768), 100),
    pytest.param("swin_s", (96, 192, 384, 768), 100, marks=LARGE),
    pytest.param("swin_b", (128, 256, 512, 1024), 100, marks=LARGE),
    pytest.param("swin_l", (192, 384, 768, 1536), 200, marks=LARGE),
    pytest.param("vits_adapter", (384,) * 4, 100),
    pytest.param("vitb_adapter", (768,) * 4, 100, marks=LARGE),
    pytest.param("vitl_adapter", (1024,) * 4, 200, marks=LARGE),
]


@pytest.fixture
def configuration(project_root: Path, tmp_path: Path) -> Any:
    """``configuration(fragment)``: MinVIS with that backbone and a small decoder."""

    def load(fragment: str) -> CfgNode:
        bases = [str(project_root / "configs" / "_base_" / part) for part in ("models/minvis", f"backbones/{fragment}")]
        file = tmp_path / "config.yaml"
        file.write_text("_BASE_: [" + ", ".join(f'"{base}.yaml"' for base in bases) + "]\n")
        return load_cfg(str(file), [part for pair in SMALL.items() for part in pair])

    return load


def test_every_fragment_is_here(project_root: Path) -> None:
    files = {file.stem for file in (project_root / "configs" / "_base_" / "backbones").glob("*.yaml")}
    assert files == {parameter.values[0] for parameter in BACKBONES}


@pytest.mark.parametrize(("fragment", "channels", "queries"), BACKBONES)
def test_minvis_learns_with_it(configuration: Any, fragment: str, channels: tuple[int, ...], queries: int) -> None:
    torch.manual_seed(0)
    model: Any = build_model(configuration(fragment)).train()
    shapes = model.backbone.output_shape()
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {
        f"res{i + 2}": (count, 4 * 2**i) for i, count in enumerate(channels)
    }
    assert model.sem_seg_head.predictor.query_feat.weight.shape == (queries, 32)
    sample = labelled_clip(Settings(input_size=(64, 96), frames=(1,)), seed=0)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert any(name.startswith("backbone.") for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-4)
    for _ in range(2):
        losses = model([sample])
        total = torch.stack(list(losses.values())).sum()
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        # Data-parallel training waits for the gradient of everything that asks for one.
        assert [name for name, x in trained.items() if x.grad is None] == []
        optimizer.step()
    (found,) = model.eval()([{"image": sample["image"], "height": 70, "width": 110}])
    assert len(found) == 10
