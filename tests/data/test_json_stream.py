"""A json read item by item is the json, in little memory; the COCO subsets that are made with it."""

from __future__ import annotations

import importlib.util
import json
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vis.data import json_stream
from vis.data.categories import COCO_TO_OVIS, COCO_TO_YTVIS_2019, COCO_TO_YTVIS_2021
from vis.data.json_stream import stream_json

TREE = {
    "info": {"year": 2017, "nested": [1, [2, 3], {"a": None}]},
    "empty": [],
    "images": [{"id": 12345678901, "file_name": 'ä " \\ ]}.jpg'}, {"id": -2.5e-3}, 17, "text", None, [1, 2]],
    "number": 123456,
    "last": [True, False],
}


def collected(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, kind, value in stream_json(path):
        if kind == "item":
            tree[key].append(value)
        else:
            tree[key] = [] if kind == "list" else value
    return tree


@pytest.mark.parametrize("chunk", [1, 2, 7, 2**20])
@pytest.mark.parametrize("indent", [None, 3])
def test_it_is_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TREE, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert collected(path) == TREE
    assert list(collected(path)) == list(TREE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected an object at its top"),
        ("[1]", "expected an object at its top"),
        ('{"a": [1, 2', "expected ',', found 'the end', character 11"),
        ('{"a": [1 2]}', "expected ',', found '2'"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": nul}', "character 6"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": 1} x', "something follows the end"),
    ],
)
def test_what_is_no_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        collected(path)


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ValueError, match="is not text"):
        collected(path)


# datasets/prepare_coco2ytvis.py

ANNOTATIONS = 2000


@pytest.fixture(scope="module")
def prepare(project_root: Path) -> ModuleType:
    path = project_root / "datasets" / "prepare_coco2ytvis.py"
    spec = importlib.util.spec_from_file_location("prepare_coco2ytvis_streamed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A COCO json of some megabytes, of every category in turn."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir(parents=True)
    polygon = [[round(0.37 * k, 2) for k in range(60)]]
    tree = {
        "info": {"year": 2017},
        "images": [{"id": 1, "height": 4, "width": 6, "file_name": "1.jpg"}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": k % 90 + 1, "iscrowd": 0, "segmentation": polygon, "area": 1.5}
            for k in range(ANNOTATIONS)
        ],
        "categories": [{"id": k, "name": f"name {k}"} for k in range(1, 91)],
    }
    (folder / "instances_train2017.json").write_text(json.dumps(tree))
    return folder


def test_every_subset_by_its_classes_in_little_memory(
    source: Path, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 2**14)
    size = (source / "instances_train2017.json").stat().st_size
    tracemalloc.start()
    prepare.prepare("train", list(prepare.MAPS))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 3, f"{peak} bytes for a file of {size}"
    whole = json.loads((source / "instances_train2017.json").read_text())
    maps = {"coco2ytvis2019": COCO_TO_YTVIS_2019, "coco2ytvis2021": COCO_TO_YTVIS_2021, "coco2ovis": COCO_TO_OVIS}
    maps["coco2ytvis2022"] = maps["coco2ytvis2021"]
    assert maps.keys() == prepare.MAPS.keys()
    for name, classes in maps.items():
        kept = [each for each in whole["annotations"] if each["category_id"] in classes]
        assert 0 < len(kept) < ANNOTATIONS
        assert json.loads((source / f"{name}_train.json").read_text()) == {**whole, "annotations": kept}


@pytest.mark.parametrize("annotations", [None, {"a": 1}, [1, 2], "absent"])
def test_annotations_that_are_none(
    source: Path, prepare: ModuleType, annotations: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"images": [], "annotations": annotations} if annotations != "absent" else {"images": []}
    (source / "instances_train2017.json").write_text(json.dumps(tree))
    assert prepare.main(["coco2ovis", "--splits", "train"]) == 1
    assert "annotations: must be a list of objects" in capsys.readouterr().err
    assert [path.name for path in source.iterdir()] == ["instances_train2017.json"]
