"""A user's own data sets from yaml alone."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from vis.config import CfgNode, get_cfg
from vis.data.custom import class_names_of, num_classes_of, register_custom
from vis.data.problems import DatasetError


@pytest.fixture
def name() -> str:
    """A name of its own: the catalogs live as long as the process."""
    return f"mine_{uuid.uuid4().hex[:8]}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data sets with one of two classes, one frame."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.jpg").touch()
    write(tmp_path / "my.json", {"cat": 8, "ant": 31})
    return tmp_path


def write(path: Path, categories: dict[str, int], **more: Any) -> None:
    tree = {
        "videos": [{"id": 1, "height": 6, "width": 8, "length": 1, "file_names": ["0.jpg"]}],
        "categories": [{"id": number, "name": each} for each, number in categories.items()],
        "annotations": [{"id": 1, "video_id": 1, "category_id": 31, "segmentations": [[[1, 1, 5, 1, 5, 4]]]}],
    }
    path.write_text(json.dumps({**tree, **more}))


def cfg_of(*entries: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.DATASETS.CUSTOM = list(entries)
    return cfg


def test_from_a_yaml_file(name: str, root: Path) -> None:
    yaml = root / "my.yaml"
    yaml.write_text(f"DATASETS:\n  CUSTOM:\n    - {{NAME: {name}, JSON: my.json, ROOT: frames, SPLIT: train}}\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(yaml))
    assert register_custom(cfg) == [name]
    assert register_custom(cfg) == [name], "again with the same values"
    (record,) = DatasetCatalog.get(name)
    assert record["file_names"] == [str(root / "frames" / "0.jpg")]
    assert record["annotations"][0]["category_id"] == 1
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "ant"]
    assert metadata.thing_dataset_id_to_contiguous_id == {8: 0, 31: 1}
    assert (metadata.json_file, metadata.evaluator_type) == (str(root / "my.json"), "ytvis")
    assert num_classes_of(name) == 2


def test_classes_follow_a_json_that_changes(name: str, root: Path) -> None:
    register_custom(cfg_of({"NAME": name, "JSON": "my.json", "ROOT": "frames"}))
    assert num_classes_of(name) == 2
    write(root / "my.json", {"cat": 8, "ant": 31, "bee": 32})
    assert num_classes_of(name) == 3


@pytest.mark.parametrize("form", ["absolute", "variable", "home"])
def test_forms_of_paths(form: str, name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("MY_DATA", str(root))
    start = {"absolute": str(root), "variable": "${MY_DATA}", "home": "~"}[form]
    register_custom(cfg_of({"NAME": name, "JSON": f"{start}/my.json", "ROOT": f"{start}/frames"}))
    assert len(DatasetCatalog.get(name)) == 1


def test_unset_variable(name: str, root: Path) -> None:
    register_custom(cfg_of({"NAME": name, "JSON": "$NOT_SET_ANYWHERE/my.json", "ROOT": "frames"}))
    with pytest.raises(ValueError, match="uses the environment variable NOT_SET_ANYWHERE, which is not set"):
        num_classes_of(name)


def test_missing_file_names_the_place(name: str, root: Path) -> None:
    register_custom(cfg_of({"NAME": name, "JSON": "other.json", "ROOT": "frames"}))
    with pytest.raises(FileNotFoundError, match=str(root / "other.json")):
        num_classes_of(name)


def test_split_train_needs_annotations(name: str, root: Path) -> None:
    write(root / "hidden.json", {"cat": 8}, annotations=None)
    register_custom(cfg_of({"NAME": name, "JSON": "hidden.json", "ROOT": "frames", "SPLIT": "train"}))
    with pytest.raises(DatasetError, match="this is a training set"):
        DatasetCatalog.get(name)
    register_custom(cfg_of({"NAME": f"{name}_test", "JSON": "hidden.json", "ROOT": "frames", "SPLIT": "test"}))
    assert "annotations" not in DatasetCatalog.get(f"{name}_test")[0]


def test_broken_categories_are_reported(name: str, root: Path) -> None:
    (root / "my.json").write_text(json.dumps({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}))
    register_custom(cfg_of({"NAME": name, "JSON": "my.json", "ROOT": "frames"}))
    with pytest.raises(DatasetError, match="id 1 is used twice"):
        num_classes_of(name)


def test_same_name_with_other_values_is_refused(name: str, root: Path) -> None:
    entry = {"NAME": name, "JSON": "my.json", "ROOT": "frames"}
    register_custom(cfg_of(entry))
    with pytest.raises(ValueError, match=f"{name}' is already registered with other values .*my2.json"):
        register_custom(cfg_of({**entry, "JSON": "my2.json"}))
    with pytest.raises(ValueError, match="of an entry before it"):
        register_custom(cfg_of(entry, entry))


def test_one_json_divided_by_video(name: str, root: Path) -> None:
    video = {"height": 6, "width": 8, "length": 1, "file_names": ["0.jpg"]}
    write(root / "my.json", {"ant": 31}, videos=[{"id": number, **video} for number in (1, 4, 6)])
    entry = {"JSON": "my.json", "ROOT": "frames"}
    register_custom(cfg_of({"NAME": name, **entry, "VIDEOS": [6, 1]}, {"NAME": f"{name}_v", **entry, "VIDEOS": [4, 5]}))
    assert [record["video_id"] for record in DatasetCatalog.get(name)] == [1, 6]
    assert MetadataCatalog.get(name).video_ids == (1, 6)
    with pytest.raises(ValueError, match="video 5 is not in .*my.json; it has 1, 4, 6"):
        DatasetCatalog.get(f"{name}_v")


def test_sets_used_together_must_agree(name: str, root: Path) -> None:
    write(root / "my2.json", {"cat": 8, "bee": 31})
    register_custom(
        cfg_of(
            {"NAME": name, "JSON": "my.json", "ROOT": "frames"},
            {"NAME": f"{name}_2", "JSON": "my2.json", "ROOT": "frames"},
        )
    )
    with pytest.raises(ValueError, match=r"must have the same classes: .* has 2 \(cat, ant\), .* has 2 \(cat, bee\)"):
        class_names_of([name, f"{name}_2"])
    assert class_names_of([name]) == ["cat", "ant"]


def test_real_images_and_clips(name: str, shared_dir: Path) -> None:
    data = shared_dir / "data"
    images = {"JSON": f"{data}/coco128/instances.json", "ROOT": f"{data}/coco128/images", "FORMAT": "coco"}
    clips = {"JSON": f"{data}/davis2017/instances.json", "ROOT": f"{data}/davis2017/JPEGImages", "SPLIT": "train"}
    register_custom(cfg_of({"NAME": name, **images}, {"NAME": f"{name}_clips", **clips}))
    assert (num_classes_of(name), num_classes_of(f"{name}_clips")) == (80, 5)
    assert (len(DatasetCatalog.get(name)), len(DatasetCatalog.get(f"{name}_clips"))) == (128, 5)


GOOD = {"NAME": "mine_bad", "JSON": "my.json", "ROOT": "frames"}


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("my.json", r"CUSTOM\[0\] must be \{NAME: ..., JSON: ..., ROOT: ...\}, found 'my.json'"),
        ({"NAME": "mine_bad", "ROOT": "frames"}, "lacks the key JSON; it needs NAME, JSON, ROOT"),
        ({**GOOD, "SPILT": "train"}, "unknown key 'SPILT'. Did you mean 'SPLIT'?"),
        ({**GOOD, "SPLIT": "training"}, "SPLIT 'training' is not one of train, val, test. Did you mean 'train'?"),
        ({**GOOD, "FORMAT": "lvis"}, "FORMAT 'lvis' is not one of ytvis, coco"),
        ({**GOOD, "VIDEOS": []}, r"VIDEOS must be a list of different video ids, found \[\]"),
        ({**GOOD, "VIDEOS": ["1"]}, "VIDEOS must be a list of different video ids"),
        ({**GOOD, "VIDEOS": [1, 1]}, "VIDEOS must be a list of different video ids"),
        ({**GOOD, "NAME": ""}, "NAME must be a text that is not empty, found ''"),
        ({**GOOD, "ROOT": None}, "ROOT must be a text that is not empty, found None"),
        ({**GOOD, "SPLIT": 3}, "SPLIT must be a text that is not empty, found 3"),
        ({**GOOD, "NAME": "ovis_train"}, "the name 'ovis_train' belongs to a known data set"),
        ({**GOOD, "NAME": "coco_2017_train"}, "'coco_2017_train' is already registered by other code"),
    ],
)
def test_bad_entries(entry: Any, part: str, root: Path) -> None:
    with pytest.raises(ValueError, match=part):
        register_custom(cfg_of(entry))
    assert "mine_bad" not in DatasetCatalog
