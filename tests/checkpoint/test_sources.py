"""Files of every release: recognised, and every tensor where it belongs."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from vis.checkpoint import SOURCES, load_weights
from vis.checkpoint.sources.source import apply

State = dict[str, Tensor]


def old_queries(state: State) -> State:
    """Mask2Former before the rename of its queries."""
    return {name.replace("query_feat", "static_query"): value for name, value in state.items()}


def oldest(state: State) -> State:
    """As the predecessor of Mask2Former named the parts of its pixel decoder."""
    return {name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): v for name, v in old_queries(state).items()}


def early_offline(state: State) -> State:
    return {re.sub(r"^refiner\.", "offline_tracker.", name): value for name, value in state.items()}


def wrapped(state: State) -> State:
    return {f"module.{name}": value for name, value in state.items()}


def without_alias(state: State) -> State:
    return {name: value for name, value in state.items() if "decoder.bbox_embed" not in name}


def same(state: State) -> State:
    return state


MODELS = [
    ("minvis_r50", (), 81, old_queries, "mask2former", "image"),
    ("minvis_r50", (), 81, oldest, "mask2former", "image"),
    ("minvis_swinl", (), 81, same, "mask2former", "image"),
    ("minvis_r50", (), None, same, "minvis", "segmenter"),
    ("minvis_swinl", (), None, wrapped, "minvis", "segmenter"),
    ("dvis_online_r50", (), None, same, "dvis", "dvis_online"),
    ("dvis_offline_r50", (), None, early_offline, "dvis", "dvis_offline"),
    ("dvis_offline_swinl", (), None, same, "dvis", "dvis_offline"),
    ("dvisplus_online_r50", ("tracker.",), None, same, "ctvis", "ctvis"),
    ("dvisplus_online_vitl", ("tracker.",), 81, same, "ctvis", "ctvis"),
    ("dvisplus_online_r50", (), None, same, "dvisplus", "dvisplus_online"),
    ("dvisplus_online_vitl", (), None, same, "dvisplus", "dvisplus_online"),
    ("dvisplus_offline_r50", (), None, same, "dvisplus", "dvisplus_offline"),
    ("dvisplus_offline_vitl", (), None, same, "dvisplus", "dvisplus_offline"),
    ("vita_r50", (), None, same, "vita", "vita"),
    ("vita_swinl", (), None, old_queries, "vita", "vita"),
    ("vita_r50", (), 81, same, "vita", "vita"),
    ("idol_r50", (), None, same, "idol", "idol"),
    ("idol_r50", (), None, without_alias, "idol", "idol"),
    ("idol_swinl", (), None, same, "idol", "idol"),
]


def write(state: Mapping[str, Tensor], path: Path) -> Path:
    """As the releases do: trainings with what else they saved, zoo files as pickles of arrays."""
    if path.suffix == ".pkl":
        arrays = {name: value.numpy() for name, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party", "iteration": 1}))
    else:
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        others = {"optimizer": optimizer, "scheduler": {"last_epoch": 5}, "trainer": None, "iteration": 5999}
        torch.save({"model": OrderedDict(state), **others}, path)
    return path


@pytest.mark.parametrize(("name", "without", "rows", "spelling", "source", "stage"), MODELS)
def test_models(
    name: str,
    without: tuple[str, ...],
    rows: int | None,
    spelling: Callable[[State], State],
    source: str,
    stage: str,
    release: Callable[..., Any],
    holds: Callable[..., None],
    tmp_path: Path,
) -> None:
    architecture = release(name).without(*without)
    model, state = architecture.model(rows), architecture.state(rows)
    # Mask2Former's zoo has pickles of arrays
    path = write(spelling(state), tmp_path / ("w.pkl" if source == "mask2former" else "w.pth"))
    report = load_weights(model, path, training=False)
    holds(model, state)
    assert (report.source, report.stage) == (SOURCES[source].title, stage)
    assert len(report.matched) >= len(without_alias(state))
    assert not report.remade
    assert not report.missing
    assert not report.ignored


def test_an_alias_that_the_model_has_not(release: Callable[..., Any], tmp_path: Path) -> None:
    """IDOL's file repeats the box layers under the decoder; a model may have them once."""
    architecture = release("idol_r50")
    model = architecture.without("detr.detr.transformer.decoder.bbox_embed.")
    model.shared = {}
    skeleton = model.model()
    report = load_weights(skeleton, write(architecture.state(), tmp_path / "w.pth"), training=False)
    assert len(report.ignored) == 36
    assert len(report.matched) == 619 - 36


# ---------------------------------------------------------------------------------------------------- backbones


def resnet_pairs(depth: int) -> dict[str, str]:
    """torchvision's name -> detectron2's, layer by layer."""
    pairs = {"conv1.weight": "stem.conv1.weight"}
    norms = {"bn1": "stem.conv1.norm"}
    for stage, blocks in enumerate({50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth], start=1):
        for block in range(blocks):
            theirs, ours = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
            for i in (1, 2, 3):
                pairs[f"{theirs}.conv{i}.weight"] = f"{ours}.conv{i}.weight"
                norms[f"{theirs}.bn{i}"] = f"{ours}.conv{i}.norm"
            if block == 0:
                pairs[f"{theirs}.downsample.0.weight"] = f"{ours}.shortcut.weight"
                norms[f"{theirs}.downsample.1"] = f"{ours}.shortcut.norm"
    for theirs, ours in norms.items():
        pairs |= {f"{theirs}.{x}": f"{ours}.{x}" for x in ("weight", "bias", "running_mean", "running_var")}
    return pairs


def real_names(build: Callable[..., nn.Module], **options: Any) -> State:
    """Names and shapes of a real model, without its memory."""
    with torch.device("meta"):
        return build(**options).state_dict()


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnet(
    library: str, release: Callable[..., Any], small: Callable[..., State], holds: Callable[..., None], tmp_path: Path
) -> None:
    if library == "timm":
        state = small(real_names(timm.create_model, model_name="resnet50", pretrained=False))
    else:
        state = small(real_names(torchvision.models.resnet50, weights=None))
    torch.save(state, tmp_path / "resnet50.pth")
    pairs = resnet_pairs(50)
    for name, prefix in (("minvis_r50", "backbone."), ("idol_r50", "detr.detr.backbone.0.backbone.")):
        model = release(name).model()
        report = load_weights(model, tmp_path / "resnet50.pth")
        holds(model, {prefix + ours: state[theirs] for theirs, ours in pairs.items()})
        assert (report.stage, report.backbone_only) == ("backbone", True)
        assert sorted(report.ignored)[-2:] == ["fc.bias", "fc.weight"]
        assert len(report.matched) == 265
        with pytest.raises(ValueError, match="a backbone alone, from which a training can start"):
            load_weights(model, tmp_path / "resnet50.pth", training=False)


def test_resnet_of_another_depth(release: Callable[..., Any], small: Callable[..., State], tmp_path: Path) -> None:
    torch.save(small(real_names(torchvision.models.resnet101, weights=None)), tmp_path / "r101.pth")
    model = release("minvis_r50").model()
    with pytest.raises(ValueError, match=r"255 of a backbone that the model does not have:\n    backbone.res4.6"):
        load_weights(model, tmp_path / "r101.pth")
    state = {name: v for name, v in torch.load(tmp_path / "r101.pth").items() if not name.startswith("layer3.2.")}
    torch.save(state, tmp_path / "hole.pth")
    with pytest.raises(ValueError, match="15 missing in the file:\n    backbone.res4.2"):
        load_weights(model, tmp_path / "hole.pth")


def swin_state(small: Callable[..., State], kind: str) -> State:
    """A Swin-L at 384: timm's names, or its authors', with the buffers that they save."""
    state = small(real_names(timm.create_model, model_name="swin_large_patch4_window12_384", pretrained=False))
    if kind == "timm":
        return state
    for i in (1, 2, 3):
        for name in [name for name in state if name.startswith(f"layers.{i}.downsample.")]:
            state[f"layers.{i - 1}.downsample.{name.split('.', 3)[3]}"] = state.pop(name)
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        state[name.replace("bias_table", "index")] = torch.arange(16).reshape(4, 4)
        if ".blocks.1." in name:
            state[name.replace("attn.relative_position_bias_table", "attn_mask")] = torch.ones(4, 3, 3)
    return {name.replace("head.fc.", "head."): value for name, value in state.items()}


@pytest.mark.parametrize("kind", ["timm", "release", "pkl"])
def test_swin(
    kind: str, release: Callable[..., Any], small: Callable[..., State], holds: Callable[..., None], tmp_path: Path
) -> None:
    state = swin_state(small, kind)
    architecture = release("minvis_swinl")
    # real tables are 144 x 144: 4 x 4 here
    index = [name for name in architecture.like if name.endswith("relative_position_index")]
    architecture.like |= {name: torch.empty(4, 4, dtype=torch.int64, device="meta") for name in index}
    model = architecture.model()
    if kind == "pkl":
        content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "x", "matching_heuristics": True}
        (tmp_path / "swin.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save({"model": state} if kind == "release" else state, tmp_path / "swin.pth")
    report = load_weights(model, tmp_path / "swin.pth")
    expected = {}
    for name, value in state.items():
        if kind == "timm" and (match := re.match(r"layers\.(\d)\.downsample\.(.*)", name)):
            name = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        if not name.startswith(("norm.", "head.")) and not name.endswith("attn_mask"):
            expected[f"backbone.{name}"] = value
    holds(model, expected)
    assert report.source == SOURCES["timm_swin" if kind == "timm" else "swin"].title
    # the norms of the four feature maps are the only part of the backbone that such files do not have
    missing = [name for name in report.missing if name.startswith("backbone.")]
    assert missing == [f"backbone.norm{i}.{x}" for i in range(4) for x in ("weight", "bias")]
    assert {"norm.weight", "norm.bias"} < set(report.ignored)


def test_swin_with_another_window(release: Callable[..., Any], small: Callable[..., State], tmp_path: Path) -> None:
    state = {**swin_state(small, "release"), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(12, 12)}
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match="with other constant values: another variant of this backbone"):
        load_weights(release("minvis_swinl").model(), tmp_path / "swin.pth")


@pytest.mark.parametrize("kind", ["timm", "release", "chunks"])
def test_dinov2(
    kind: str, release: Callable[..., Any], small: Callable[..., State], holds: Callable[..., None], tmp_path: Path
) -> None:
    state = small(real_names(timm.create_model, model_name="vit_large_patch14_dinov2", pretrained=False))
    if kind != "timm":
        state["mask_token"] = torch.full((1, 15), 3.0)
    written = {
        name: f"blocks.{int(name.split('.')[1]) // 6}.{name[7:]}" for name in state if name.startswith("blocks.")
    }
    saved = {written.get(name, name) if kind == "chunks" else name: value for name, value in state.items()}
    torch.save(saved, tmp_path / "dinov2.pth")
    model = release("dvisplus_online_vitl").model()
    report = load_weights(model, tmp_path / "dinov2.pth")
    expected = {f"backbone.vit_module.{name}": value for name, value in state.items()}
    kernel = "backbone.vit_module.patch_embed.proj.weight"
    assert expected[kernel].shape[-1] == 14
    resized = nn.functional.interpolate(expected.pop(kernel), size=(16, 16), mode="bilinear", align_corners=True)
    holds(model, expected, skip=(kernel,))
    torch.testing.assert_close(model.state_dict()[kernel], resized)
    assert report.adapted == [kernel]
    assert "resized to the model" in report.summary()
    assert ("backbone.vit_module.mask_token" in report.missing) == (kind == "timm")
    assert not any(name.startswith("backbone.vit_module.") and "mask_token" not in name for name in report.missing)


@pytest.mark.parametrize("token", ["reg_token", "register_tokens"])
def test_dinov2_with_registers(
    token: str, release: Callable[..., Any], small: Callable[..., State], tmp_path: Path
) -> None:
    state = small(real_names(timm.create_model, model_name="vit_large_patch14_reg4_dinov2", pretrained=False))
    state[token] = state.pop("reg_token")
    torch.save(state, tmp_path / "dinov2.pth")
    with pytest.raises(ValueError, match="DINOv2 with registers; the backbone here is the one without"):
        load_weights(release("dvisplus_online_vitl").model(), tmp_path / "dinov2.pth")


def zoo_resnet(release: Callable[..., Any]) -> State:
    """An R-50 in detectron2's names."""
    state = release("minvis_r50").state()
    return {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}


def test_zoo_resnet_of_torchvision(release: Callable[..., Any], holds: Callable[..., None], tmp_path: Path) -> None:
    state = zoo_resnet(release)
    arrays = {k: v.numpy() for k, v in {**state, "stem.fc.weight": torch.ones(10, 3)}.items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))
    model = release("minvis_r50").model()
    report = load_weights(model, tmp_path / "R-50.pkl")
    holds(model, {f"backbone.{name}": value for name, value in state.items()})
    assert report.ignored == ["stem.fc.weight"]


def caffe2_name(name: str) -> str:
    """A name of detectron2's ResNet in Caffe2's spelling."""
    *path, kind = name.split(".")
    norm = path[-1] == "norm"
    path = path[:-1] if norm else path
    if path[0] == "stem":
        base = "res_conv1" if norm else "conv1"
    else:
        part = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}[path[2]]
        base = f"{path[0]}_{path[1]}_{part}"
    return base + {(True, "weight"): "_bn_s", (True, "bias"): "_bn_b", (False, "weight"): "_w"}[norm, kind]


def test_zoo_resnet_of_caffe2(
    release: Callable[..., Any], holds: Callable[..., None], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    state = {name: value for name, value in zoo_resnet(release).items() if "running" not in name}
    blobs = {caffe2_name(name): value.numpy() for name, value in state.items()}
    blobs |= {f"{name}_momentum": value for name, value in blobs.items()}
    blobs |= {name: torch.ones(4).numpy() for name in ("fc1000_w", "fc1000_b", "pred_w", "conv1_b", "lr")}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, protocol=2))
    model = release("minvis_r50").model()
    report = load_weights(model, tmp_path / "R-50.pkl")
    deviations = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    state["stem.conv1.weight"] = state["stem.conv1.weight"][:, [2, 1, 0]] * deviations
    holds(model, {f"backbone.{name}": value for name, value in state.items()})
    assert len(report.ignored) == len(state) + 5
    assert "MODEL.RESNETS.STRIDE_IN_1X1 True" in caplog.text


def test_zoo_detector(release: Callable[..., Any], holds: Callable[..., None], tmp_path: Path) -> None:
    """A Mask R-CNN with FPN gives its ResNet to a model that has nothing else of it, or all of it to its like."""
    body = {f"backbone.bottom_up.{name}": value for name, value in zoo_resnet(release).items()}
    heads = ("backbone.fpn_lateral2.weight", "proposal_generator.rpn_head.conv.weight", "roi_heads.box_head.fc1.weight")
    state = {**body, **{name: torch.full((4, 3), 2.0) for name in heads}}
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    write(state, tmp_path / "model_final_f10217.pkl")
    model = release("minvis_r50").model()
    report = load_weights(model, tmp_path / "model_final_f10217.pkl")
    holds(model, {name.replace("bottom_up.", ""): value for name, value in body.items()})
    assert (report.stage, report.backbone_only) == ("backbone", True)
    assert sorted(report.ignored) == sorted([*heads, "proposal_generator.anchor_generator.cell_anchors.0"])
    detector = release("minvis_r50")
    detector.like = {name: state[name].to("meta") for name in (*body, *heads)}
    whole = detector.model()
    report = load_weights(whole, tmp_path / "model_final_f10217.pkl", training=False)
    holds(whole, {name: state[name] for name in (*body, *heads)})
    assert report.stage == "detector"


def test_genvis_is_no_vita(release: Callable[..., Any], tmp_path: Path) -> None:
    state = {**release("vita_r50").state(), "genvis_criterion.empty_weight": torch.ones(41)}
    with pytest.raises(ValueError, match="w.pth: this file cannot be used: it is a GenVIS model"):
        load_weights(release("vita_r50").model(), write(state, tmp_path / "w.pth"))


def test_a_named_source_is_taken(release: Callable[..., Any], tmp_path: Path) -> None:
    path = write(release("minvis_r50").state(), tmp_path / "w.pth")
    model = release("minvis_r50").model()
    assert load_weights(model, path, source="mask2former").stage == "image"
    with pytest.raises(ValueError, match=r"no source is named 'mask2formr'.*Did you mean 'mask2former'"):
        load_weights(model, path, source="mask2formr")


@pytest.mark.parametrize("name", ["torchvision", "timm_swin", "swin", "dinov2"])
def test_names_return(name: str, small: Callable[..., State]) -> None:
    """To ours and back gives the release's names."""
    states = {
        "torchvision": lambda: real_names(torchvision.models.resnet50, weights=None),
        "timm_swin": lambda: swin_state(small, "timm"),
        "swin": lambda: swin_state(small, "release"),
        "dinov2": lambda: real_names(timm.create_model, model_name="vit_large_patch14_dinov2", pretrained=False),
    }
    source = SOURCES[name]
    kept = [theirs for theirs in states[name]() if source.ours(theirs) is not None]
    assert source.to_released is not None
    assert [apply(source.to_released, source.ours(theirs) or "") for theirs in kept] == kept
    assert len({source.ours(theirs) for theirs in kept}) == len(kept) > 100
