"""What our model is timed against computes the same, without fused operations, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vis.engine.benchmarks import Settings, against_plain, plain
from vis.engine.config import load_cfg
from vis.layers.linear import Linear
from vis.layers.ms_deform_attn import op
from vis.modeling import build_model
from vis.modeling.backbones import D2VitAdapterDinoV2


class Both(nn.Module):
    """A small segmenter with the ViT adapter as its backbone."""

    def __init__(self, project_root: Path, **decoder: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        values = {"MODEL.DEVICE": "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5, **decoder}
        options = [part for pair in values.items() for part in pair]
        model: Any = build_model(load_cfg(str(project_root / "configs/_base_/models/minvis_tiny.yaml"), options))
        self.normalizer, self.sem_seg_head, self.backbone = model.normalizer, model.sem_seg_head, model.backbone
        self.vit = D2VitAdapterDinoV2(embed_dim=32, depth=4, num_heads=2, pretrain_grid=3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        self.eval()

    def forward(self, frames: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        images = self.normalizer(frames)
        output = self.sem_seg_head(self.backbone(images))
        return {**{k: v for k, v in output.items() if isinstance(v, torch.Tensor)}, **self.vit(images)}


@pytest.fixture
def frames() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 256, (3, 64, 96), generator=generator).float() for _ in range(3)]


def test_plain_computes_the_same(
    project_root: Path, frames: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Both(project_root)
    with torch.no_grad():
        ours = model(frames)
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
        run = dict(op.RUN)
        with plain.plain(model):
            assert not any(function in op.RUN.values() for function in run.values())
            assert not any(type(module) is Linear for module in model.modules())
            theirs = model(frames)
    assert set(ours) == set(theirs)
    assert {"pred_logits", "pred_embeds", "mask_embeds", "mask_features", "res2", "res5"} <= set(ours)
    for name, x in ours.items():
        torch.testing.assert_close(theirs[name], x, rtol=1e-3, atol=1e-4, msg=name)


def test_plain_is_taken_back_also_after_an_error(project_root: Path) -> None:
    model = Both(project_root)
    types, run = [type(module) for module in model.modules()], dict(op.RUN)

    def fail() -> None:
        with plain.plain(model):
            assert [type(module) for module in model.modules()] != types
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [type(module) for module in model.modules()] == types
    assert run == op.RUN
    assert all(block.attn.fused_attn for block in model.vit.vit_module.blocks)


def test_figures(project_root: Path) -> None:
    tiny = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1")
    settings = Settings(
        config_file=str(project_root / "configs/_base_/models/minvis_tiny.yaml"),
        opts=(*tiny, "MODEL.MASK_FORMER.DEC_LAYERS", "2"),
        input_size=(64, 96),
        output_size=(70, 110),
        frames=(2,),
        warmup=0,
        repeats=2,
    )
    result = against_plain.measure_against_plain(settings)
    for name in ("ours", "plain"):
        assert len(result[name]["seconds_per_frame"]["runs"]) == 2
        assert 0 < result[name]["network"]["median"] < result[name]["seconds_per_frame"]["median"]
    assert result["times"]["total"] == pytest.approx(
        result["plain"]["seconds_per_frame"]["median"] / result["ours"]["seconds_per_frame"]["median"]
    )
    assert result["logits_apart"] < 1e-3
    assert "times as long" in "\n".join(against_plain.lines(result))
