"""Loading weights: what fits, what may differ, what is refused and how it is said."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vis.checkpoint import load_weights, read_checkpoint


class Criterion(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("empty_weight", torch.ones(classes + 1))


class Predictor(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.query_feat = nn.Embedding(4, 6)
        self.class_embed = nn.Linear(6, classes + 1)
        self.mask_embed = nn.Linear(6, 5)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 7, 2, bias=False)
        self.norm = nn.BatchNorm2d(7)


class Model(nn.Module):
    """The names of a small MinVIS."""

    def __init__(self, classes: int = 3, tracker: bool = False) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": Backbone()})
        self.sem_seg_head = nn.ModuleDict({"predictor": Predictor(classes)})
        self.criterion = Criterion(classes)
        if tracker:
            self.tracker = nn.Linear(2, 3)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """A state dict with values unlike the initial ones."""
    return {key: torch.full_like(value, 2) for key, value in Model().state_dict().items()}


def assert_loaded(model: nn.Module, skip: tuple[str, ...] = ()) -> None:
    for name, value in model.state_dict().items():
        if not name.startswith(skip or ("~",)):
            assert torch.equal(value, torch.full_like(value, 2)), name


@pytest.mark.parametrize(
    "container", ["plain", "model", "state_dict", "training", "legacy", "safetensors", "pkl", "module"]
)
def test_containers(weights: dict[str, torch.Tensor], container: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{'safetensors' if container == 'safetensors' else 'pth'}"
    if container == "safetensors":
        save_file(weights, path)
    elif container == "pkl":
        path.write_bytes(pickle.dumps({"model": {key: value.numpy() for key, value in weights.items()}}))
    else:
        content: Any = {
            "plain": weights,
            "model": {"model": OrderedDict(weights)},
            "state_dict": {"state_dict": weights},
            "training": {
                "model": weights,
                "optimizer": {"state": {0: torch.ones(2)}},
                "iteration": 7,
                "scheduler": None,
            },
            "legacy": weights,
            "module": {f"module.{key}": value for key, value in weights.items()},
        }[container]
        torch.save(content, path, _use_new_zipfile_serialization=container != "legacy")
    model = Model()
    report = load_weights(model, path)
    assert_loaded(model)
    assert sorted(report.matched) == sorted(weights)
    assert not report.missing
    assert not report.remade
    assert f"{len(weights)} tensors loaded" in report.summary()


def test_half_precision_is_cast(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in weights.items()},
        tmp_path / "w.pth",
    )
    model = Model()
    load_weights(model, tmp_path / "w.pth")
    assert model.sem_seg_head["predictor"].class_embed.weight.dtype == torch.float32
    assert_loaded(model)


def test_class_heads_are_made_anew(
    weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(weights, tmp_path / "w.pth")
    model = Model(classes=8)
    before = model.sem_seg_head["predictor"].class_embed.weight.clone()
    with caplog.at_level("INFO"):
        report = load_weights(model, tmp_path / "w.pth")
    assert {name for name, _, _ in report.remade} == {
        "sem_seg_head.predictor.class_embed.weight",
        "sem_seg_head.predictor.class_embed.bias",
        "criterion.empty_weight",
    }
    assert torch.equal(model.sem_seg_head["predictor"].class_embed.weight, before)
    assert model.criterion.empty_weight.shape == (9,)
    assert_loaded(model, skip=("sem_seg_head.predictor.class_embed", "criterion"))
    assert "class_embed.weight [4, 6] -> [9, 6]" in caplog.text


def test_other_shapes_are_an_error(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights["sem_seg_head.predictor.query_feat.weight"] = torch.ones(9, 6)
    weights["sem_seg_head.predictor.class_embed.weight"] = torch.ones(4, 13)
    torch.save(weights, tmp_path / "w.pth")
    model = Model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"query_feat.weight: \[9, 6\] in the file, \[4, 6\] in the model") as caught:
        load_weights(model, tmp_path / "w.pth")
    assert "class_embed.weight: [4, 13]" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing was loaded"


def test_missing_and_unexpected_are_errors_that_list_them(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    del weights["sem_seg_head.predictor.mask_embed.bias"]
    weights["vita_module.fc.weight"] = torch.ones(2)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        load_weights(Model(), tmp_path / "w.pth")
    assert "1 missing in the file:\n    sem_seg_head.predictor.mask_embed.bias" in str(caught.value)
    assert "1 in the file but not in the model:\n    vita_module.fc.weight" in str(caught.value)


def test_a_new_stage_may_miss_its_own_part(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "w.pth")
    model = Model(tracker=True)
    with pytest.raises(ValueError, match="tracker.weight"):
        load_weights(model, tmp_path / "w.pth")
    report = load_weights(model, tmp_path / "w.pth", allow_missing=("tracker.",))
    assert report.missing == ["tracker.weight", "tracker.bias"]
    assert "2 others start from initial values" in report.summary()
    assert_loaded(model, skip=("tracker.",))


def test_old_names(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights["sem_seg_head.predictor.static_query.weight"] = weights.pop("sem_seg_head.predictor.query_feat.weight")
    weights["pixel_mean"] = torch.zeros(3, 1, 1)
    del weights["backbone.stem.norm.num_batches_tracked"]
    torch.save(weights, tmp_path / "w.pth")
    model = Model()
    model.backbone["stem"].norm.num_batches_tracked.fill_(2)
    assert load_weights(model, tmp_path / "w.pth").ignored == ["pixel_mean"]
    assert_loaded(model)


def backbone_arrays() -> dict[str, np.ndarray]:
    state = Model().backbone.state_dict()
    arrays = {key: np.full(value.shape, 2, np.float32) for key, value in state.items() if "num_batches" not in key}
    arrays["stem.fc.weight"] = np.ones((10, 7), np.float32)
    return arrays


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_backbone_pickle_of_detectron2(protocol: int, tmp_path: Path) -> None:
    content = {"model": backbone_arrays(), "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    model = Model()
    report = load_weights(model, tmp_path / "R-50.pkl")
    assert_loaded(model, skip=("sem_seg_head", "criterion", "backbone.stem.norm.num"))
    assert report.backbone_only
    assert len(report.matched) == 5
    assert "holds a backbone alone" in report.summary()
    assert report.ignored == ["stem.fc.weight"]


def test_backbone_of_another_architecture_is_refused(tmp_path: Path) -> None:
    arrays = {f"layers.{i}.attn.weight": np.ones(3, np.float32) for i in range(6)}
    content = {"model": {**arrays, "stem.norm.weight": np.ones(7, np.float32)}, "matching_heuristics": True}
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="a backbone that the model does not have"):
        load_weights(Model(), tmp_path / "swin.pkl")


class Evil:
    """Runs when it is unpickled by an ordinary unpickler."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["pkl", "pth"])
def test_code_in_a_file_is_not_run(kind: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"weights.{kind}"
    content = {"model": {"a": np.ones(2)}, "extra": Evil(mark)}
    if kind == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="holds Python objects"):
        load_weights(Model(), path)
    assert not mark.exists()


def _zip(**files: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


def _truncated(cut: float) -> bytes:
    data = io.BytesIO()
    torch.save({"a": torch.zeros(999)}, data)
    return data.getvalue()[: int(len(data.getvalue()) * cut)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><head>", "is a web page"),
        (b"\n<html lang=en>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (_zip(**{"a.jpg": "x", "b.jpg": "y"}), "zip archive of other things"),
        (_truncated(0.5), "cut off or damaged"),
        (_truncated(0.99), "cut off or damaged"),
        (pickle.dumps({"a": np.ones(99)})[:-30], "cut off or damaged"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"iteration": 3}), "has no weights in it: found iteration"),
        (pickle.dumps({"a": np.array([{}, 1], dtype=object)}), "holds Python objects"),
        ((60).to_bytes(8, "little") + b'{"a":' + b" " * 20, "cut off or damaged"),
        (b"just some text, nothing else", "is not a file of weights"),
        (b"\xff\xd8\xff\xe0 a jpeg", "is not a file of weights"),
    ],
)
def test_wrong_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(Model(), path)
    assert str(path) in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model_final.pth")
    with pytest.raises(FileNotFoundError, match="does not exist .that folder holds model_final.pth"):
        load_weights(Model(), tmp_path / "model_fianl.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_weights(Model(), tmp_path)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        load_weights(Model(), "http://127.0.0.1:9/weights.pth")


def test_a_checkpoint_must_be_of_torch(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(ValueError, match="is a pickle"):
        read_checkpoint(tmp_path / "model.pth")
