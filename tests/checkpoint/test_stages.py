"""Files of the wrong stage: said what they are, what is needed, and how to come by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vis.checkpoint import STAGES, load_weights
from vis.engine import load_cfg
from vis.modeling import build_model

DVIS_ONLINE = {"segmenter": ("tracker.",), "ctvis": ("tracker.",), "dvis_online": ()}
DVIS_OFFLINE = {"dvis_online": ("refiner.",), "dvis_offline": ()}
MINVIS = {"backbone": (), "image": (), "segmenter": ()}
VITA = {"image": ("vita_module.", "vita_criterion."), "vita": ()}

# stage of a file -> the architecture that is one, without some parts, with other class heads
FILES = {
    "image": ("minvis_r50", (), 81),
    "segmenter": ("minvis_r50", (), 26),
    "ctvis": ("dvisplus_online_r50", ("tracker.",), 26),
    "dvis_online": ("dvis_online_r50", (), 26),
    "dvis_offline": ("dvis_offline_r50", (), 26),
    "dvisplus_online": ("dvisplus_online_r50", (), 26),
    "dvisplus_offline": ("dvisplus_offline_r50", (), 26),
    "vita": ("vita_r50", (), 26),
    "idol": ("idol_r50", (), 25),
}


@pytest.fixture(scope="module")
def files(release: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One small file of every stage."""
    folder = tmp_path_factory.mktemp("stages")
    for stage, (name, without, rows) in FILES.items():
        torch.save({"model": release(name).without(*without).state(rows)}, folder / f"{stage}.pth")
    body = {k[9:]: v for k, v in release("minvis_r50").state().items() if k.startswith("backbone.")}
    torch.save({"model": body, "matching_heuristics": True}, folder / "backbone.pth")
    return {stage: folder / f"{stage}.pth" for stage in (*FILES, "backbone")}


@pytest.mark.parametrize(
    ("name", "stages", "stage", "missing"),
    [
        ("dvis_online_r50", DVIS_ONLINE, "segmenter", "tracker."),
        ("dvis_online_r50", DVIS_ONLINE, "dvis_online", "~"),
        ("dvis_offline_r50", DVIS_OFFLINE, "dvis_online", "refiner."),
        ("dvis_offline_r50", DVIS_OFFLINE, "dvis_offline", "~"),
        ("dvisplus_online_r50", DVIS_ONLINE, "ctvis", "tracker."),
        ("vita_r50", VITA, "image", "vita_"),
        ("minvis_r50", MINVIS, "image", "~"),
        ("minvis_r50", MINVIS, "backbone", ("sem_seg_head.", "criterion.")),
    ],
)
def test_a_training_starts_from_the_stage_before(
    name: str,
    stages: Any,
    stage: str,
    missing: str | tuple[str, ...],
    files: Mapping[str, Path],
    release: Callable[..., Any],
    holds: Callable[..., None],
) -> None:
    model = release(name).model(26, WEIGHT_STAGES=stages)
    report = load_weights(model, files[stage])
    assert report.stage == stage
    assert [key for key in model.state_dict() if key.startswith(missing)] == report.missing
    expected = torch.load(files[stage], weights_only=True)["model"]
    if stage == "backbone":
        expected = {f"backbone.{key}": value for key, value in expected.items()}
    heads = ("criterion", "sem_seg_head.predictor.class_embed") if stage == "image" else ()
    holds(model, {k: v for k, v in expected.items() if not k.startswith(heads or ("~",))}, skip=heads)
    assert bool(report.remade) == (stage == "image")


@pytest.mark.parametrize(
    ("name", "stages", "stage", "message"),
    [
        ("dvis_online_r50", DVIS_ONLINE, "image", "is a Mask2Former model of COCO images .*starts its training from a"),
        ("dvis_online_r50", DVIS_ONLINE, "image", "train one on the target data set with configs/minvis/"),
        ("dvis_online_r50", DVIS_ONLINE, "dvis_offline", "is a DVIS offline model"),
        (
            "dvis_offline_r50",
            DVIS_OFFLINE,
            "segmenter",
            "is a MinVIS segmenter .*training from a DVIS online",
        ),
        ("dvis_online_r50", DVIS_ONLINE, "backbone", "is an ImageNet backbone alone .*Skeleton starts its training"),
        ("minvis_r50", MINVIS, "vita", "is a VITA model .*source: VITA"),
        ("vita_r50", VITA, "idol", "is an IDOL model"),
        ("minvis_r50", MINVIS, "ctvis", "is a CTVIS segmenter"),
    ],
)
def test_a_training_from_another_stage_is_refused(
    name: str, stages: Any, stage: str, message: str, files: Mapping[str, Path], release: Callable[..., Any]
) -> None:
    model = release(name).model(26, WEIGHT_STAGES=stages)
    with pytest.raises(ValueError, match=message):
        load_weights(model, files[stage])
    assert not any(value.any() for key, value in model.state_dict().items()), "nothing was loaded"


@pytest.mark.parametrize(
    ("name", "stages", "complete"),
    [
        ("dvis_online_r50", DVIS_ONLINE, "dvis_online"),
        ("dvis_offline_r50", DVIS_OFFLINE, "dvis_offline"),
        ("minvis_r50", MINVIS, "segmenter"),
        ("minvis_r50", None, "segmenter"),
        ("vita_r50", VITA, "vita"),
    ],
)
def test_an_evaluation_needs_the_whole_model(
    name: str, stages: Any, complete: str, files: Mapping[str, Path], release: Callable[..., Any]
) -> None:
    model = release(name).model(26, **({"WEIGHT_STAGES": stages} if stages else {}))
    for stage in sorted(set(files) - {complete}):
        with pytest.raises(ValueError, match=r"is evaluated with|a backbone alone|does not fit|another set of classes"):
            load_weights(model, files[stage], training=False, allow_missing=("tracker.", "refiner."))
    assert not any(value.any() for value in model.state_dict().values()), "nothing was loaded"
    assert load_weights(model, files[complete], training=False).matched


def test_an_evaluation_with_other_classes(files: Mapping[str, Path], release: Callable[..., Any]) -> None:
    model = release("minvis_r50").model(41)
    with pytest.raises(ValueError, match="it has 25 classes, this model 40.: its class layers would be random here"):
        load_weights(model, files["segmenter"], training=False)
    assert load_weights(model, files["segmenter"]).remade
    model = release("idol_r50").model(40)
    with pytest.raises(ValueError, match="it has 25 classes, this model 40"):
        load_weights(model, files["idol"], training=False)


def test_a_frozen_class_head_cannot_be_made_anew(files: Mapping[str, Path], release: Callable[..., Any]) -> None:
    model = release("dvis_online_r50").model(41, WEIGHT_STAGES=DVIS_ONLINE)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith("tracker."))
    with pytest.raises(ValueError, match="a MinVIS segmenter of another set of classes .it has 25.*leaves sem"):
        load_weights(model, files["segmenter"])
    with pytest.raises(ValueError, match="is a Mask2Former model of COCO images"):
        load_weights(model, files["image"])


def test_the_user_may_insist(
    files: Mapping[str, Path], release: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = release("dvis_offline_r50").model(26, WEIGHT_STAGES=DVIS_OFFLINE)
    report = load_weights(model, files["segmenter"], allow_missing=("tracker.", "refiner."))
    assert {name.split(".")[0] for name in report.missing} == {"tracker", "refiner"}
    assert "It is used because MODEL.WEIGHTS_ALLOW_MISSING is set" in caplog.text
    with pytest.raises(ValueError, match=r"\d+ missing in the file:\n    refiner"):
        load_weights(model, files["segmenter"], allow_missing=("tracker.",))


def test_the_methods_declare_known_stages() -> None:
    from vis.modeling import meta_arch

    classes = [item for item in vars(meta_arch).values() if hasattr(item, "WEIGHT_STAGES")]
    for item in classes:
        assert set(item.WEIGHT_STAGES) <= set(STAGES), item
        assert () in item.WEIGHT_STAGES.values(), f"{item} cannot be evaluated"


def test_the_demo_of_dvis(project_root: Path) -> None:
    """A real model: its tracker is trained on the demo's segmenter, of which nothing may be made anew."""
    folder = project_root / "configs" / "demo"
    options = ["MODEL.DEVICE", "cpu"]
    model = build_model(load_cfg(str(folder / "dvis_online_synthetic.yaml"), options))
    report = load_weights(model, folder / "minvis_synthetic.pth")
    assert report.stage == "segmenter"
    assert {name.split(".")[0] for name in report.missing} == {"tracker"}
    with pytest.raises(ValueError, match="a MinVIS segmenter .*but DVISOnline is evaluated with a DVIS online"):
        load_weights(model, folder / "minvis_synthetic.pth", training=False)
    options += ["DATASETS.TRAIN", "('ovis_train',)"]
    model = build_model(load_cfg(str(folder / "dvis_online_synthetic.yaml"), options))
    with pytest.raises(ValueError, match="of another set of classes .*this model 25.*leaves sem_seg_head"):
        load_weights(model, folder / "minvis_synthetic.pth")


def test_an_unknown_stage_is_a_mistake_of_the_method(files: Mapping[str, Path], release: Callable[..., Any]) -> None:
    model = release("minvis_r50").model(26, WEIGHT_STAGES={"segmentor": ()})
    with pytest.raises(ValueError, match="WEIGHT_STAGES names .'segmentor'"):
        load_weights(model, files["segmenter"])
