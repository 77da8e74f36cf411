"""Backbones give the features of the network that their weights come from."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vis.checkpoint import load_weights
from vis.config import get_cfg
from vis.modeling.backbones import D2SwinTransformer
from vis.modeling.backbones.dinov2 import DinoVisionTransformer


class Model(nn.Module):
    """Any backbone where models have theirs."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 3)


def randomised(model: nn.Module) -> nn.Module:
    """The model with every value random, normalisation and statistics too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(noise + 0.5 if value.dim() < 2 and "bias" not in name else (noise - 0.5) * 0.2)
    return model.eval()


@torch.no_grad()
def test_resnet_of_torchvision(tmp_path: Path) -> None:
    theirs = randomised(torchvision.models.resnet50(weights=None))
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    cfg = get_cfg()
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model = Model(build_resnet_backbone(cfg, ShapeSpec(channels=3))).eval()
    report = load_weights(model, tmp_path / "resnet50.pth")
    assert report.missing == ["head.weight", "head.bias"]
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    for stage, feature in enumerate(model.backbone(image).values(), start=1):
        x = getattr(theirs, f"layer{stage}")(x)
        torch.testing.assert_close(feature, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def our_swin() -> D2SwinTransformer:
    return D2SwinTransformer(
        out_features=["res2", "res3", "res4", "res5"],
        embed_dim=12,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 3, 4],
        window_size=7,
        drop_path_rate=0.0,
    )


def fresh_norms(features: list[Tensor]) -> list[Tensor]:
    """Maps (N, h, w, C) after a norm with initial values, (N, C, h, w)."""
    return [nn.functional.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2) for x in features]


@torch.no_grad()
def test_swin_of_timm(tmp_path: Path) -> None:
    """At a size of whole windows in every stage: timm pads otherwise."""
    theirs = randomised(SwinTransformer(img_size=448, embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 4)))
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    model = Model(our_swin()).eval()
    report = load_weights(model, tmp_path / "swin.pth")
    assert report.source == "a Swin Transformer of timm"
    image = torch.rand(1, 3, 448, 448, generator=torch.Generator().manual_seed(5))
    x, features = theirs.patch_embed(image), []
    for layer in theirs.layers:
        x = layer(x)
        features.append(x)
    for ours, expected in zip(model.backbone(image).values(), fresh_norms(features), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_swin_of_its_authors(tmp_path: Path) -> None:
    source = randomised(our_swin())
    for i in range(4):
        source.get_submodule(f"norm{i}").reset_parameters()
    state = {name: v for name, v in source.state_dict().items() if not name.startswith(("norm0", "norm1", "norm2"))}
    state = {name.replace("norm3.", "norm."): value for name, value in state.items()}
    state |= {"head.weight": torch.ones(10, 96), "head.bias": torch.ones(10)}
    torch.save({"model": state}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    model = Model(our_swin()).eval()
    assert load_weights(model, tmp_path / "swin_tiny_patch4_window7_224.pth").source.endswith("of its authors")
    image = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(5))
    expected = source(image)
    for name, ours in model.backbone(image).items():
        torch.testing.assert_close(ours, expected[name], rtol=0, atol=0)


class WithVit(nn.Module):
    """A backbone that has a ViT in it."""

    def __init__(self) -> None:
        super().__init__()
        self.vit_module = DinoVisionTransformer(embed_dim=24, depth=3, num_heads=2, pretrain_grid=5)


@torch.no_grad()
def test_dinov2_of_timm(tmp_path: Path) -> None:
    options = {"embed_dim": 24, "depth": 3, "num_heads": 2, "init_values": 1.0, "num_classes": 0}
    theirs = randomised(VisionTransformer(img_size=70, patch_size=14, **options))
    torch.save(theirs.state_dict(), tmp_path / "vit_small_patch14_dinov2.pth")
    model = Model(WithVit()).eval()
    report = load_weights(model, tmp_path / "vit_small_patch14_dinov2.pth")
    assert report.adapted == ["backbone.vit_module.patch_embed.proj.weight"]
    # the same ViT with patches of 16, its kernel by the formula: bilinear, corners aligned, not normalised
    state = theirs.state_dict()
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = nn.functional.interpolate(kernel, (16, 16), mode="bilinear", align_corners=True)
    at_16 = VisionTransformer(img_size=80, patch_size=16, **options).eval()
    at_16.load_state_dict(state)
    image = torch.rand(1, 3, 80, 80, generator=torch.Generator().manual_seed(5))
    vit = model.backbone.vit_module
    tokens = vit.embed(image)
    for block in vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(vit.norm(tokens), at_16.forward_features(image), rtol=1e-4, atol=1e-4)
