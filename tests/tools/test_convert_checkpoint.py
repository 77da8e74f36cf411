"""The command that converts weights."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from vis.checkpoint import read_weights, save_weights


@pytest.fixture(scope="module")
def tool(project_root: Path) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(
        "convert_checkpoint", project_root / "tools" / "convert_checkpoint.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_resnet() -> dict[str, Tensor]:
    """torchvision's names with random values."""
    network = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=4)
    return {name: torch.rand(value.shape).to(value.dtype) for name, value in network.state_dict().items()}


def small_swin() -> dict[str, Tensor]:
    from timm.models.swin_transformer import SwinTransformer

    state = SwinTransformer(img_size=56, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).state_dict()
    return dict(state)


def small_vit() -> dict[str, Tensor]:
    network = timm.models.vision_transformer.VisionTransformer(
        img_size=28, patch_size=14, embed_dim=8, depth=2, num_heads=2, init_values=1.0, num_classes=0
    )
    return {**network.state_dict(), "mask_token": torch.rand(1, 8)}


def segmenter() -> dict[str, Tensor]:
    names = ["backbone.stem.conv1.weight", "sem_seg_head.pixel_decoder.mask_features.weight"]
    names += [f"sem_seg_head.predictor.{name}.weight" for name in ("query_feat", "class_embed", "decoder_norm")]
    return {name: torch.rand(81 if "class" in name else 3, 5) for name in names}


def small_iai() -> dict[str, Tensor]:
    """Some names of MMDetection's of each kind."""
    names = [f"backbone.{name}" for name in small_resnet() if not name.startswith("fc.")]
    names += ["neck.lateral_convs.2.conv.bias", "neck.fpn_convs.4.conv.weight", "bbox_head.scales.3.scale"]
    names += ["bbox_head.id_convs.0.gn.weight", "bbox_head.mask_head.4.bias", "encoder_projector.bias"]
    names += ["lstt.LSTT.layers.0.activation.gn.weight", "lstt.patch_wise_id_bank.weight"]
    return {name: torch.rand(() if "scales" in name else (2, 3)) for name in names}


@pytest.mark.parametrize(
    ("make", "source", "dropped"),
    [
        (small_resnet, "torchvision", ("fc.",)),
        (small_swin, "timm_swin", ("head.", "norm.")),
        (small_vit, "dinov2", ()),
        (segmenter, "mask2former", ()),
        (small_iai, "iai", ()),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back(
    make: Callable[[], dict[str, Tensor]],
    source: str,
    dropped: tuple[str, ...],
    suffix: str,
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = make()
    release, ours, back, again = (tmp_path / f"{name}{suffix}" for name in ("release", "ours", "back", "again"))
    save_weights(state, release)
    assert tool.main([str(release), str(ours)]) == 0
    assert tool.main([str(ours), str(back), "--to", "released", "--source", source]) == 0
    assert tool.main([str(back), str(again)]) == 0
    found = read_weights(back).state
    kept = {name: value for name, value in state.items() if not name.startswith(dropped or ("~",))}
    assert set(found) == set(kept)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in kept.items())
    first, second = read_weights(ours).state, read_weights(again).state
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    text = capsys.readouterr().out
    assert f"({source}); stage: " in text
    assert f"{len(kept)} tensors" in text


def test_options(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: value.numpy() for name, value in segmenter().items()}
    state["sem_seg_head.predictor.static_query.weight"] = state.pop("sem_seg_head.predictor.query_feat.weight")
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "x", "iteration": 7}))
    assert tool.main([str(tmp_path / "in.pkl"), str(tmp_path / "out.pth"), "--half"]) == 0
    found = read_weights(tmp_path / "out.pth")
    assert {value.dtype for value in found.state.values()} == {torch.float16}
    assert "sem_seg_head.predictor.query_feat.weight" in found.state
    assert found.content == {}
    assert "stage: image" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "in.pkl"), str(tmp_path / "all.pth"), "--no-strip-optimizer"]) == 0
    assert read_weights(tmp_path / "all.pth").content == {"__author__": "x", "iteration": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "out.pth"], "none.pth does not exist"),
        (["in.pth", "out.pkl"], "weights are written as .pth"),
        (["in.pth", "in.pth"], "is the input itself"),
        (["in.pth", "out.pth", "--source", "torchvison"], "Did you mean 'torchvision'"),
        (["in.pth", "out.pth", "--to", "released", "--source", "swin"], "does not fit: that is of a backbone alone"),
        (["in.pth", "out.pth", "--to", "released", "--source", "detectron2_msra"], "is read here, and not written"),
    ],
)
def test_what_cannot_be_converted(
    arguments: list[str], message: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(segmenter(), tmp_path / "in.pth")
    command = [str(tmp_path / item) if index < 2 else item for index, item in enumerate(arguments)]
    with pytest.raises(SystemExit) as caught:
        tool.main(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_checked_against_a_model(
    tool: ModuleType, project_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's weights fit the demo's model and no other; what does not fit is not written."""
    demo, out = str(project_root / "configs/demo/minvis_synthetic.pth"), tmp_path / "out.safetensors"
    config = str(project_root / "configs/demo/minvis_synthetic.yaml")
    assert tool.main([demo, str(out), "--config-file", config, "--opts", "MODEL.DEVICE", "cpu"]) == 0
    assert "tensors loaded" in capsys.readouterr().out
    assert out.exists()
    out.unlink()
    other = ["MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.DEC_LAYERS", "3"]
    with pytest.raises(SystemExit):
        tool.main([demo, str(out), "--config-file", config, "--opts", *other])
    assert "does not fit this model" in capsys.readouterr().err
    assert not out.exists()
