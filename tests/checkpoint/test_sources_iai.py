"""Released IAI, CondInst and Mask R-CNN: recognised, every tensor where it belongs, other classes and ids re-made."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vis.checkpoint import SOURCES, ClassMap, convert, load_weights, read_weights
from vis.checkpoint.sources.source import Names, apply
from vis.data.registration import class_names_of
from vis.engine import load_cfg
from vis.engine.parity import formula_weight, read_manifest
from vis.modeling import build_model

State = dict[str, Tensor]
COCO, OVIS = (tuple(class_names_of([name])) for name in ("coco_2017_train_video", "ovis_train"))
STAGES = {"condinst": ("association.", "image_model.proposal_generator.fcos_head.id_"), "iai": ()}

# numbers of parameters, by the description of the release
PARTS = {"enc_proj": 524_544, "cls_proj": 3_147_264, "id_bank": 5_854_720, "layers": 1_200_322 - 512, "norms": 512}
HEAD = "image_model.proposal_generator.fcos_head."
# some of each kind, by hand
NAMES = {
    "backbone.conv1.weight": "image_model.backbone.bottom_up.stem.conv1.weight",
    "backbone.bn1.running_var": "image_model.backbone.bottom_up.stem.conv1.norm.running_var",
    "backbone.layer1.0.downsample.0.weight": "image_model.backbone.bottom_up.res2.0.shortcut.weight",
    "backbone.layer4.2.bn3.bias": "image_model.backbone.bottom_up.res5.2.conv3.norm.bias",
    "backbone.layer2.0.downsample.1.bias": "image_model.backbone.bottom_up.res3.0.shortcut.norm.bias",
    "neck.lateral_convs.0.conv.weight": "image_model.backbone.fpn_lateral3.weight",
    "neck.lateral_convs.2.conv.bias": "image_model.backbone.fpn_lateral5.bias",
    "neck.fpn_convs.2.conv.weight": "image_model.backbone.fpn_output5.weight",
    "neck.fpn_convs.3.conv.weight": "image_model.backbone.top_block.p6.weight",
    "neck.fpn_convs.4.conv.bias": "image_model.backbone.top_block.p7.bias",
    "bbox_head.cls_convs.0.conv.weight": f"{HEAD}cls_tower.0.weight",
    "bbox_head.cls_convs.3.gn.bias": f"{HEAD}cls_tower.10.bias",
    "bbox_head.reg_convs.2.conv.weight": f"{HEAD}bbox_tower.6.weight",
    "bbox_head.id_convs.0.gn.weight": f"{HEAD}id_tower.1.weight",
    "bbox_head.conv_cls.bias": f"{HEAD}cls_logits.bias",
    "bbox_head.conv_reg.weight": f"{HEAD}bbox_pred.weight",
    "bbox_head.conv_centerness.weight": f"{HEAD}ctrness.weight",
    "bbox_head.conv_id.weight": f"{HEAD}id_logits.weight",
    "bbox_head.controller.bias": f"{HEAD}controller.bias",
    "bbox_head.scales.4.scale": f"{HEAD}scales.4.scale",
    "bbox_head.mask_refine.2.1.running_mean": "image_model.mask_branch.refine.2.1.running_mean",
    "bbox_head.mask_head.3.0.weight": "image_model.mask_branch.tower.3.0.weight",
    "bbox_head.mask_head.4.bias": "image_model.mask_branch.tower.4.bias",
    "encoder_projector.weight": "association.enc_proj.weight",
    "backbone_projector.bias": "association.cls_proj.bias",
    "lstt.patch_wise_id_bank.weight": "association.id_bank.weight",
    "lstt.LSTT.layers.0.self_attn.linear_Q.weight": "association.layers.0.self_attn.linear_Q.weight",
    "lstt.LSTT.layers.0.short_term_attn.V_bias": "association.layers.0.short_term_attn.V_bias",
    "lstt.LSTT.layers.0.activation.GCT.alpha": "association.layers.0.activation.GCT.alpha",
    "lstt.LSTT.decoder_norms.0.weight": "association.norms.0.weight",
}


@pytest.fixture(scope="module")
def iai(release: Callable[[str], Any]) -> State:
    """A released file, small, with counters of batches as the release has them."""
    return release("iai_r50").state()


def ours(state: State) -> State:
    """Our names, and factors of levels as vectors, which are scalars in the release."""
    named = {SOURCES["iai"].ours(name) or name: value for name, value in state.items()}
    return {name: value.reshape(1) if ".scales." in name else value for name, value in named.items()}


def condinst_of(state: State, classes: int = 80) -> State:
    """The release's CondInst of COCO: the same without association and id head."""
    kept = {k: v for k, v in state.items() if not k.startswith(("lstt.", "encoder_", "backbone_projector"))}
    kept = {name: value for name, value in kept.items() if "id_conv" not in name and "conv_id" not in name}
    for name in ("bbox_head.conv_cls.weight", "bbox_head.conv_cls.bias"):
        kept[name] = torch.rand(classes, *kept[name].shape[1:])
    return kept


def write(state: State, path: Path) -> Path:
    """As mmcv does."""
    meta = {"epoch": 12, "iter": 8400, "mmdet_version": "2.11.0+2691be9", "config": "model = dict()", "CLASSES": ("a",)}
    meta |= {"env_info": "sys.platform: linux", "time": "Tue Nov 16 2021", "hook_msgs": {}, "seed": None}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer}, path)
    return path


@pytest.fixture
def skeleton(release: Callable[[str], Any]) -> Callable[..., nn.Module]:
    """``skeleton(state)``: a model of these names and shapes, all zeros."""

    def make(state: State, **attributes: Any) -> nn.Module:
        architecture = release("iai_r50")
        architecture.like = {name: value.to("meta") for name, value in state.items()}
        return architecture.model(**attributes)

    return make


def test_every_name_has_its_place(iai: State) -> None:
    source = SOURCES["iai"]
    assert len(iai) == 463
    assert {theirs: source.ours(theirs) for theirs in NAMES} == NAMES
    named = [source.ours(theirs) or "" for theirs in iai]
    assert len(set(named)) == 463
    assert all(name.startswith(("image_model.", "association.")) for name in named)
    detector = [name for name in named if name.startswith("image_model.")]
    assert not any(
        part in name for name in detector for part in ("layer1", ".bn", ".gn", "downsample", "convs", "_head.conv_")
    )
    assert source.to_released is not None
    assert [apply(source.to_released, name) for name in named] == list(iai)
    assert [source.ours(name) for name in named] == named, "our own files keep their names"


@pytest.mark.parametrize("spelling", [dict, ours])
def test_released(
    spelling: Callable[[State], State],
    iai: State,
    skeleton: Callable[..., Any],
    holds: Callable[..., None],
    tmp_path: Path,
) -> None:
    model = skeleton(ours(iai), WEIGHT_STAGES=STAGES)
    report = load_weights(model, write(spelling(iai), tmp_path / "w.pth"), training=False)
    holds(model, ours(iai))
    assert (report.source, report.stage) == ("IAI", "iai")
    assert len(report.matched) == 463
    assert len(report.adapted) == (5 if spelling is dict else 0)
    assert not report.missing + report.ignored + report.remade


def test_from_condinst_of_coco(
    iai: State, skeleton: Callable[..., Any], holds: Callable[..., None], tmp_path: Path
) -> None:
    coco = write(condinst_of(iai), tmp_path / "coco.pth")
    model = skeleton(ours(iai), WEIGHT_STAGES=STAGES)
    report = load_weights(model, coco)
    expected = {name: value for name, value in ours(condinst_of(iai)).items() if "cls_logits" not in name}
    holds(model, expected)
    assert report.stage == "condinst"
    assert [shape[:1] for _, *shapes in report.remade for shape in shapes] == [(80,), (40,)] * 2
    assert {name.split(".")[0] for name in report.missing} == {"association", "image_model"}
    with pytest.raises(ValueError, match="is a CondInst of images .*but Skeleton is evaluated with an IAI model"):
        load_weights(model, coco, training=False)
    report = load_weights(model, coco, class_map=ClassMap(class_names_of(["ytvis_2019_train"])))
    assert "rows of 19 classes copied by name into 2 of these" in report.summary()
    plain = skeleton({name.removeprefix("image_model."): value for name, value in ours(condinst_of(iai)).items()})
    assert not load_weights(plain, coco, training=False).missing, "a model that is a detector itself"


def test_another_number_of_ids(iai: State, skeleton: Callable[..., Any], tmp_path: Path) -> None:
    """OVIS with 25 ids and 25 classes starts from YouTube-VIS 2019 with 20 and 40."""
    path, state = write(iai, tmp_path / "w.pth"), ours(iai)
    for name, value in state.items():
        if "id_logits" in name or "cls_logits" in name:
            state[name] = torch.zeros(25, *value.shape[1:])
    bank = state["association.id_bank.weight"]
    state["association.id_bank.weight"] = torch.zeros(bank.shape[0], 26, *bank.shape[2:])
    model = skeleton(state, WEIGHT_STAGES=STAGES)
    report = load_weights(model, path)
    assert [name.rsplit(".", 2)[1] for name, *_ in report.other_ids] == ["id_logits", "id_logits", "id_bank"]
    assert "made anew, since MODEL.IAI.NUM_IDS differs" in report.summary()
    assert not model.get_parameter("association.id_bank.weight").any()
    bias = model.get_parameter("association.id_bank.bias")
    assert torch.equal(bias, iai["lstt.patch_wise_id_bank.bias"])
    with pytest.raises(ValueError, match="another set of classes"):
        load_weights(model, path, training=False)
    rows = [name for name in state if "cls_logits" in name]
    state |= {name: torch.zeros(40, *state[name].shape[1:]) for name in rows}
    with pytest.raises(ValueError, match="was trained with MODEL.IAI.NUM_IDS 20, this model has 25"):
        load_weights(skeleton(state, WEIGHT_STAGES=STAGES), path, training=False)


def test_another_number_of_ids_on_mask_rcnn(iai: State, skeleton: Callable[..., Any], tmp_path: Path) -> None:
    """A softmax over ids has one more, for background, as the bank has."""
    head = "image_model.roi_heads.id_head.predictor."
    state = {f"image_model.{name}": value for name, value in mask_rcnn(iai).items()}
    state |= {
        f"{head}weight": torch.ones(21, 3),
        f"{head}bias": torch.ones(21),
        "association.enc_proj.bias": torch.ones(4),
    }
    torch.save({"model": state}, tmp_path / "w.pth")
    other = state | {f"{head}weight": torch.zeros(26, 3), f"{head}bias": torch.zeros(26)}
    model = skeleton(other, WEIGHT_STAGES={"iai": ()})
    report = load_weights(model, tmp_path / "w.pth")
    assert (report.stage, len(report.other_ids)) == ("iai", 2)
    assert not model.get_parameter(f"{head}weight").any()
    with pytest.raises(ValueError, match="was trained with MODEL.IAI.NUM_IDS 20, this model has 25"):
        load_weights(model, tmp_path / "w.pth", training=False)


def adelaidet(state: State) -> State:
    """CondInst's COCO file: towers with biases, the controller outside, a mask head of tables."""
    named = {name.removeprefix("image_model."): value for name, value in ours(condinst_of(state)).items()}
    named = {name.replace("proposal_generator.fcos_head.controller", "controller"): v for name, v in named.items()}
    named = {name: value for name, value in named.items() if "num_batches_tracked" not in name}
    for tower in ("cls_tower", "bbox_tower"):
        named |= {f"proposal_generator.fcos_head.{tower}.{3 * i}.bias": torch.ones(8) for i in range(4)}
    return named | {"mask_head.sizes_of_interest": torch.ones(5), "mask_head._iter": torch.ones(1)}


def test_condinst_of_adelaidet(
    iai: State, skeleton: Callable[..., Any], holds: Callable[..., None], tmp_path: Path
) -> None:
    torch.save({"model": adelaidet(iai), "iteration": 89999}, tmp_path / "CondInst_MS_R_50_1x.pth")
    path = tmp_path / "CondInst_MS_R_50_1x.pth"
    model = skeleton(ours(iai), WEIGHT_STAGES=STAGES)
    report = load_weights(model, path)
    expected = ours(condinst_of(iai))
    stem = "image_model.backbone.bottom_up.stem.conv1.weight"
    expected[stem] = expected[stem].flip(1) * torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    holds(model, {k: v for k, v in expected.items() if "cls_logits" not in k and "tracked" not in k})
    assert report.stage == "condinst"
    assert len([name for name in report.ignored if name.endswith("_tower.3.bias")]) == 2
    assert "STRIDE_IN_1X1 True" in report.note
    whole = skeleton(ours(condinst_of(iai)), WEIGHT_STAGES={"condinst": ()})
    with pytest.raises(ValueError, match="8 in the file but not in the model:\n.*fcos_head.cls_tower.0.bias"):
        load_weights(whole, path, training=False)


def mask_rcnn(state: State, classes: int = 80) -> State:
    """A detector of detectron2's zoo with made-up sizes."""
    body = "image_model.backbone.bottom_up."
    found = {k.removeprefix("image_model."): v for k, v in ours(state).items() if k.startswith(body)}
    found = {name: value for name, value in found.items() if "tracked" not in name}
    shapes = {f"backbone.fpn_{part}{i}": (8, 3) for part in ("lateral", "output") for i in range(2, 6)}
    shapes |= {f"proposal_generator.rpn_head.{part}": (3, 8) for part in ("conv", "objectness_logits", "anchor_deltas")}
    shapes |= {"roi_heads.box_head.fc1": (5, 7), "roi_heads.box_head.fc2": (5, 5)}
    shapes |= {
        "roi_heads.box_predictor.cls_score": (classes + 1, 5),
        "roi_heads.box_predictor.bbox_pred": (4 * classes, 5),
    }
    shapes |= {"roi_heads.mask_head.mask_fcn1": (5, 6), "roi_heads.mask_head.predictor": (classes, 6)}
    for name, shape in shapes.items():
        found |= {f"{name}.weight": torch.rand(shape), f"{name}.bias": torch.rand(shape[0])}
    return found


def test_mask_rcnn_of_detectron2(
    iai: State, skeleton: Callable[..., Any], holds: Callable[..., None], tmp_path: Path
) -> None:
    state = mask_rcnn(iai)
    path = tmp_path / "model_final_f10217.pkl"
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    under = {f"image_model.{name}": value for name, value in mask_rcnn(iai, len(OVIS)).items()}
    extra = {
        "image_model.roi_heads.id_head.predictor.weight": torch.zeros(21, 2),
        "association.enc_proj.bias": torch.zeros(4),
    }
    stages = {"mask_rcnn": ("association.", "image_model.roi_heads.id_"), "iai": ()}
    model = skeleton(under | extra, WEIGHT_STAGES=stages)
    report = load_weights(model, path, class_map=ClassMap(OVIS))
    loaded = model.state_dict()
    assert report.stage == "mask_rcnn"
    assert sorted(report.missing) == sorted(extra)
    head = "roi_heads.box_predictor."
    # OVIS' last class, "Vehical", has the row of the car; a class of boxes has four rows; background comes last
    car = COCO.index("car")
    assert torch.equal(
        loaded[f"image_model.{head}cls_score.weight"][[24, 25]], state[f"{head}cls_score.weight"][[car, 80]]
    )
    boxes = loaded[f"image_model.{head}bbox_pred.bias"]
    assert torch.equal(boxes[96:], state[f"{head}bbox_pred.bias"][4 * car : 4 * car + 4])
    assert not boxes[44:80].any(), "poultry to turtle are new"
    masks = loaded["image_model.roi_heads.mask_head.predictor.weight"]
    assert torch.equal(masks[24], state["roi_heads.mask_head.predictor.weight"][car])
    stem = "backbone.bottom_up.stem.conv1.weight"
    assert torch.allclose(loaded[f"image_model.{stem}"][:, 0], state[stem][:, 2] * 58.395)
    assert "began as a Caffe2 ResNet" in report.note
    with pytest.raises(ValueError, match="is a Mask R-CNN of images .*starts its training from a CondInst of images"):
        load_weights(skeleton(ours(iai), WEIGHT_STAGES=STAGES), path)
    converted = convert(read_weights(path))
    assert set(converted.state) == {f"image_model.{name}" for name in state}
    torch.save(converted.state, tmp_path / "ours.pth")
    report = load_weights(skeleton(under | extra, WEIGHT_STAGES=stages), tmp_path / "ours.pth")
    assert (report.source, report.stage, report.note) == ("Mask R-CNN of ours", "mask_rcnn", "")
    rgb = convert(read_weights(path), source="detectron2_mask_rcnn_rgb")
    assert torch.equal(rgb.state[f"image_model.{stem}"], state[stem])


@pytest.mark.parametrize("kind", ["condinst", "mask_rcnn"])
def test_a_detector_gives_its_backbone(kind: str, iai: State, release: Callable[[str], Any], tmp_path: Path) -> None:
    state = condinst_of(iai) if kind == "condinst" else mask_rcnn(iai)
    torch.save(state, tmp_path / "w.pth")
    report = load_weights(release("minvis_r50").model(), tmp_path / "w.pth")
    assert (report.stage, report.backbone_only) == ("backbone", True)
    assert len(report.matched) == 265


def test_what_a_model_with_embeddings_is(iai: State) -> None:
    """A detector that learnt to track is of another stage than the detector."""
    names, stage = ours(condinst_of(iai)), SOURCES["condinst"].stage
    assert stage(Names(names)) == "condinst"
    assert stage(Names({**names, f"{HEAD}embed_pred.weight": torch.ones(1)})) == "masktrack_rcnn"


@pytest.mark.slow
@pytest.mark.parity
def test_a_released_file_of_full_size(shared_dir: Path, project_root: Path, tmp_path: Path) -> None:
    """463 tensors with values from their names, in the model of the configuration for that file."""
    manifest = read_manifest(shared_dir / "parity" / "iai_r50.manifest.json.gz")
    state = {}
    for name, entry in manifest.items():
        count = torch.zeros(entry["shape"], dtype=torch.int64)
        fill = entry["fill"]
        state[name] = count if fill is None else torch.from_numpy(formula_weight(name, entry["shape"], *fill))
    path = write(state, tmp_path / "released.pth")
    released = str(project_root / "configs" / "iai" / "ytvis19_r50_released.yaml")
    model = build_model(load_cfg(released, ["MODEL.DEVICE", "cpu"]))
    report = load_weights(model, path, training=False)
    assert not report.missing + report.remade + report.other_ids
    loaded = model.state_dict()
    assert len(loaded) == 463
    for name, value in state.items():
        ours = SOURCES["iai"].ours(name) or ""
        assert torch.equal(loaded[ours].reshape(value.shape), value), name
    numbers = {part: sum(p.numel() for p in getattr(model.association, part).parameters()) for part in PARTS}
    assert numbers == PARTS
    ovis = build_model(load_cfg(released.replace("ytvis19", "ovis"), ["MODEL.DEVICE", "cpu"]))
    report = load_weights(ovis, path)
    assert len(report.other_ids) == 3
    assert len(report.remade) == 2
