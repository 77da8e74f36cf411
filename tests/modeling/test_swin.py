from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.swin import SwinTransformerBlock

from vis.modeling import build_model
from vis.modeling.backbones.swin import D2SwinTransformer, RecomputedBlock

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


def gradients(tiny_cfg: Any, again: bool, frozen_patches: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and how many numbers were kept for them.

    Of two pictures of different sizes in one step: the first is recomputed after the second was seen.
    """
    torch.manual_seed(0)
    values = {**TINY, "MODEL.SWIN.DROP_PATH_RATE": 0.0, "MODEL.SWIN.USE_CHECKPOINT": again}
    swin = D2SwinTransformer(tiny_cfg(values), ShapeSpec(channels=3)).train()
    swin.patch_embed.requires_grad_(not frozen_patches)
    blocks = [module for module in swin.modules() if isinstance(module, SwinTransformerBlock)]
    assert [type(block) is RecomputedBlock for block in blocks] == [again] * 5
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        features = [swin(torch.randn(1, 3, *size)) for size in ((64, 96), (96, 32))]
    torch.stack([x.square()[..., ::2].sum() for stages in features for x in stages.values()]).sum().backward()
    return {name: x.grad for name, x in swin.named_parameters() if x.grad is not None}, sum(kept)


@pytest.mark.parametrize("frozen_patches", [False, True])
def test_recomputation_changes_no_gradient_but_keeps_less(tiny_cfg: Any, frozen_patches: bool) -> None:
    (plain, kept_plain), (again, kept_again) = (gradients(tiny_cfg, x, frozen_patches) for x in (False, True))
    assert list(plain) == list(again)
    assert any("blocks.0.attn.qkv" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    assert kept_again < 0.3 * kept_plain


def test_fused_attention_is_that_of_detectron2(tiny_cfg: Any) -> None:
    """Without gradients the fused kernel, with them the plain formula: several pictures, shifted and plain windows."""
    torch.manual_seed(0)
    swin = D2SwinTransformer(tiny_cfg({**TINY, "MODEL.SWIN.DEPTHS": [2, 2, 2, 2]}), ShapeSpec(channels=3)).eval()
    with torch.no_grad():
        for parameter in swin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    images = torch.randn(3, 3, 96, 160)
    plain = swin(images)
    with torch.no_grad():
        fused = swin(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = swin(images)
    for name, x in plain.items():
        torch.testing.assert_close(fused[name], x, rtol=1e-4, atol=1e-5, msg=name)
        assert (rough[name].float() - x).abs().max() < 0.1 * x.abs().max(), name
