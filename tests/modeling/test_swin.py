from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec

from vis.modeling import build_model
from vis.modeling.backbones.swin import D2SwinTransformer

TINY = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [1, 1, 2, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 4],
    "MODEL.SWIN.WINDOW_SIZE": 4,
}


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 160)])
def test_outputs(tiny_cfg: Any, height: int, width: int) -> None:
    swin = D2SwinTransformer(tiny_cfg(TINY), ShapeSpec(channels=3)).eval()
    found = swin(torch.randn(2, 3, height, width))
    assert list(found) == ["res2", "res3", "res4", "res5"]
    for i, (name, feature) in enumerate(found.items()):
        stride = 4 * 2**i
        assert feature.shape == (2, 8 * 2**i, height // stride, width // stride)
        assert swin.output_shape()[name] == ShapeSpec(channels=8 * 2**i, stride=stride)
    assert swin.size_divisibility == 32


def test_fewer_outputs(tiny_cfg: Any) -> None:
    swin = D2SwinTransformer(tiny_cfg({**TINY, "MODEL.SWIN.OUT_FEATURES": ["res5", "res3"]}), ShapeSpec(channels=3))
    found = swin.eval()(torch.randn(1, 3, 64, 96))
    assert {name: x.shape[1:] for name, x in found.items()} == {"res3": (16, 8, 12), "res5": (64, 2, 3)}
    assert list(swin.output_shape()) == ["res3", "res5"]
    assert [name for name in swin.state_dict() if name.startswith("norm")] == [
        f"norm{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")
    ]
    with pytest.raises(ValueError, match=r"OUT_FEATURES names \['res6'\]; there are res2, res3, res4, res5"):
        D2SwinTransformer(tiny_cfg({**TINY, "MODEL.SWIN.OUT_FEATURES": ["res6"]}), ShapeSpec(channels=3))


def test_shifted_windows_join_what_plain_ones_divide(tiny_cfg: Any) -> None:
    """The third stage's second block shifts its windows: a pixel then reaches cells outside of its own window."""
    reached = []
    for depth in (1, 2):
        values = {**TINY, "MODEL.SWIN.DEPTHS": [1, 1, depth, 1], "MODEL.SWIN.OUT_FEATURES": ["res4"]}
        torch.manual_seed(0)
        swin = D2SwinTransformer(tiny_cfg(values), ShapeSpec(channels=3)).eval()
        image = torch.randn(1, 3, 128, 128, requires_grad=True)  # third stage: 8 x 8 cells, 4 windows
        # Squared, and only half of it: the sum of all channels, and of their squares, is constant after a layer norm.
        swin(image)["res4"][0, ::2, 2, 2].square().sum().backward()
        assert image.grad is not None
        reached.append(bool(image.grad[..., 64:, 64:].abs().sum() > 0))
    assert reached == [False, True]


def test_minvis_with_swin(tiny_cfg: Any) -> None:
    model: Any = build_model(tiny_cfg(TINY)).eval()
    frames = [torch.randint(0, 255, (3, 40, 72), dtype=torch.uint8) for _ in range(2)]
    (found,) = model([{"image": frames, "height": 57, "width": 101}])
    assert len(found) == 10
    assert found.length == 2
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("backbone")} == {
        *("patch_embed", "layers"),
        *(f"norm{i}" for i in range(4)),
    }
