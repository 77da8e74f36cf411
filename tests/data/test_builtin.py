"""Known data sets: names, aliases, layouts of the archives, categories without files, and COCO with other classes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from vis.data import ALIASES, builtin_datasets, datasets_root, get_dataset, num_classes_of, register_builtin
from vis.data.categories import COCO, COCO_TO_OVIS, OVIS, YTVIS_2019, YTVIS_2021, Category, class_colors
from vis.data.problems import DatasetError
from vis.data.registration import VideoDataset, class_names_of, register, registered


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of data sets."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def place(root: Path, json_file: str, images: str, categories: Sequence[Category]) -> None:
    """A data set of one video with two frames."""
    tree = {
        "videos": [{"id": 4, "height": 6, "width": 8, "length": 2, "file_names": ["v/0.jpg", "v/1.jpg"]}],
        "categories": [category._asdict() for category in categories],
        "annotations": [
            {"id": 1, "video_id": 4, "category_id": 3, "iscrowd": 0, "segmentations": [[[1, 1, 5, 1, 5, 4]], None]}
        ],
    }
    (root / images / "v").mkdir(parents=True)
    for name in ("0.jpg", "1.jpg"):
        (root / images / "v" / name).touch()
    (root / json_file).parent.mkdir(parents=True, exist_ok=True)
    (root / json_file).write_text(json.dumps(tree))


LAYOUTS = [
    ("ytvis_2019_train", "ytvis_2019/train.json", "ytvis_2019/train/JPEGImages", YTVIS_2019),
    ("ytvis_2019_val", "ytvis_2019/annotations/instances_val_sub.json", "ytvis_2019/val/JPEGImages", YTVIS_2019),
    (
        "ytvis_2019_val_all_frames",
        "ytvis_2019/valid_all_frames.json",
        "ytvis_2019/valid_all_frames/JPEGImages",
        YTVIS_2019,
    ),
    ("ytvis_2021_train", "ytvis_2021/train/instances.json", "ytvis_2021/train/JPEGImages", YTVIS_2021),
    ("ytvis_2021_val", "ytvis_2021/valid.json", "ytvis_2021/valid/JPEGImages", YTVIS_2021),
    ("ytvis_2021_test", "ytvis_2021/test/instances.json", "ytvis_2021/test/JPEGImages", YTVIS_2021),
    ("ytvis_2022_val", "ytvis_2022/valid/instances.json", "ytvis_2022/valid/JPEGImages", YTVIS_2021),
    ("ytvis_2022_val_full", "ytvis_2022/instances.json", "ytvis_2022/val/JPEGImages", YTVIS_2021),
    ("ytvis_2022_test", "ytvis_2022/test.json", "ytvis_2022/test/JPEGImages", YTVIS_2021),
    ("ovis_train", "ovis/annotations/annotations_train.json", "ovis/train", OVIS),
    ("ovis_train", "ovis/annotations/train.json", "ovis/train/JPEGImages", OVIS),
    ("ytvis_ovis_train", "ovis/annotations_train.json", "ovis/train", OVIS),
    ("ytvis_ovis_val", "ovis/annotations_valid.json", "ovis/valid_img", OVIS),
    ("ytvis_ovis_val_sub", "ovis/ovis_sub_val.json", "ovis/train", OVIS),
    ("ovis_test", "ovis/test.json", "ovis/test", OVIS),
]


@pytest.mark.parametrize(("name", "json_file", "images", "categories"), LAYOUTS)
def test_layouts(name: str, json_file: str, images: str, categories: Sequence[Category], root: Path) -> None:
    place(root, json_file, images, categories)
    (record,) = DatasetCatalog.get(name)
    assert record["file_names"] == [str(root / images / "v" / "0.jpg"), str(root / images / "v" / "1.jpg")]
    assert record["dataset_name"] == name
    assert record["annotations"][0]["category_id"] == 2
    metadata = MetadataCatalog.get(name)
    assert metadata.json_file == str(root / json_file)
    assert metadata.image_root == str(root / images)


@pytest.mark.parametrize("name", sorted({**builtin_datasets(), **ALIASES}))
def test_classes_are_known_without_any_file(name: str, root: Path) -> None:
    metadata = MetadataCatalog.get(name)
    assert name in DatasetCatalog
    assert metadata.evaluator_type == "ytvis"
    count = num_classes_of(name)
    assert len(metadata.thing_classes) == len(metadata.thing_colors) == count
    assert sorted(metadata.thing_dataset_id_to_contiguous_id.values()) == list(range(count))
    with pytest.raises(FileNotFoundError) as caught:
        DatasetCatalog.get(name)
    for part in (str(root), "datasets/README.md", "DETECTRON2_DATASETS", repr(name)):
        assert part in str(caught.value)
    for candidate in get_dataset(name).json_files:
        assert str(root / candidate) in str(caught.value)


def test_counts_and_order_of_classes() -> None:
    assert [len(each) for each in (YTVIS_2019, YTVIS_2021, OVIS, COCO)] == [40, 40, 25, 80]
    assert MetadataCatalog.get("ytvis_2019_val").thing_classes[:2] == ["person", "giant_panda"]
    assert MetadataCatalog.get("ytvis_2022_val").thing_classes[-2:] == ["whale", "zebra"]
    assert MetadataCatalog.get("ovis_val").thing_dataset_id_to_contiguous_id[25] == 24
    assert COCO[-1] == (90, "toothbrush")
    assert class_colors(5) == class_colors(9)[:5]
    assert len(set(class_colors(40))) == 40


def test_json_of_another_version_is_refused(root: Path) -> None:
    place(root, "ytvis_2021/train.json", "ytvis_2021/train/JPEGImages", YTVIS_2019)
    with pytest.raises(DatasetError, match=r"differ from those of this data set \(airplane, .* 1 'person' instead of"):
        DatasetCatalog.get("ytvis_2021_train")


def test_training_set_without_annotations_is_refused(root: Path) -> None:
    place(root, "ovis/annotations/train.json", "ovis/train", OVIS)
    path = root / "ovis/annotations/train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": None}))
    with pytest.raises(DatasetError, match="this is a training set"):
        DatasetCatalog.get("ovis_train")
    shutil.move(path, root / "ovis/annotations/valid.json")
    shutil.move(root / "ovis/train", root / "ovis/valid")
    assert "annotations" not in DatasetCatalog.get("ovis_val")[0]


def test_missing_frames_folder_lists_the_places(root: Path) -> None:
    place(root, "ovis/annotations/train.json", "elsewhere", OVIS)
    with pytest.raises(FileNotFoundError, match="found no image folder") as caught:
        DatasetCatalog.get("ovis_train")
    assert str(root / "ovis/train") in str(caught.value)


def test_root_is_read_when_used(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("one", "two"):
        place(tmp_path / number, "ovis/annotations/train.json", "ovis/train", OVIS)
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / number))
        assert DatasetCatalog.get("ovis_train")[0]["file_names"][0].startswith(str(tmp_path / number))
        assert MetadataCatalog.get("ovis_train").json_file.startswith(str(tmp_path / number))
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    assert datasets_root() == str(tmp_path / "datasets")


# Image data


def coco_tree() -> dict[str, Any]:
    def box(number: int, category: int, crowd: int = 0) -> dict[str, Any]:
        polygon = [[1.5, 1, 5, 1, 5, 4.5]] if not crowd else {"size": [6, 8], "counts": [10, 20, 18]}
        return {
            "id": number, "image_id": 12, "category_id": category, "iscrowd": crowd,
            "segmentation": polygon, "bbox": [1, 1, 4, 4],
        }  # fmt: skip

    return {
        "images": [{"id": number, "height": 6, "width": 8, "file_name": f"{number:012d}.jpg"} for number in (55, 12)],
        "categories": [category._asdict() for category in COCO],
        # car, dining table, bus, car as a crowd
        "annotations": [box(1, 3), box(2, 67), box(3, 6), box(4, 3, crowd=1)],
    }


@pytest.fixture
def coco(root: Path) -> Path:
    (root / "coco/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"coco/{split}2017").mkdir()
        for number in (12, 55):
            (root / f"coco/{split}2017/{number:012d}.jpg").touch()
        (root / f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(coco_tree()))
    return root


@pytest.fixture(scope="module")
def prepare(project_root: Path) -> ModuleType:
    """datasets/prepare_coco2ytvis.py as a module."""
    path = project_root / "datasets" / "prepare_coco2ytvis.py"
    spec = importlib.util.spec_from_file_location("prepare_coco2ytvis_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_coco_images(coco: Path) -> None:
    for name in ("coco_2017_train_video", "coco_2017_train"):
        records = get_dataset(name)()
        assert [record["video_id"] for record in records] == [12, 55]
        classes = [track["category_id"] for track in records[0]["annotations"]]
        assert [MetadataCatalog.get("coco_2017_train_video").thing_classes[label] for label in classes] == [
            "car", "dining table", "bus", "car",
        ]  # fmt: skip


def test_coco_with_classes_of_video_from_either_file(coco: Path, prepare: ModuleType) -> None:
    before = {name: DatasetCatalog.get(name) for name in ("coco2ovis_train", "coco2ytvis2022_val")}
    assert prepare.main([]) == 0
    written = json.loads((coco / "coco/annotations/coco2ovis_train.json").read_text())
    assert [annotation["id"] for annotation in written["annotations"]] == [1, 3, 4]
    assert len(written["images"]) == 2
    for name, records in before.items():
        after = DatasetCatalog.get(name)
        assert after[0]["json_file"].endswith(f"{name}.json")
        assert records[0]["json_file"].endswith("2017.json")
        assert [record["annotations"] for record in after] == [record["annotations"] for record in records]
    vehicles = before["coco2ovis_train"][0]["annotations"]
    assert [(track["id"], track["category_id"] + 1, track["iscrowd"]) for track in vehicles] == [
        (1, COCO_TO_OVIS[3], 0), (3, COCO_TO_OVIS[6], 0), (4, COCO_TO_OVIS[3], 1),
    ]  # fmt: skip
    assert isinstance(vehicles[2]["segmentations"][0]["counts"], str), "a crowd's RLE is kept"
    assert [track["id"] for track in before["coco2ytvis2022_val"][0]["annotations"]] == [1, 4]
    assert class_names_of(["coco2ovis_train", "ovis_train"]) == class_names_of(["ovis_val"])


def test_coco_file_that_has_the_video_classes_already(coco: Path) -> None:
    """Some projects write the target's categories and ids into coco2ytvis*.json."""
    tree = coco_tree()
    tree["categories"] = [category._asdict() for category in OVIS]
    tree["annotations"] = [{**tree["annotations"][0], "category_id": 25}]
    (coco / "coco/annotations/coco2ovis_val.json").write_text(json.dumps(tree))
    assert DatasetCatalog.get("coco2ovis_val")[0]["annotations"][0]["category_id"] == 24


def test_prepare_errors(coco: Path, prepare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    source = coco / "coco/annotations/instances_val2017.json"
    source.write_text("[")
    assert prepare.main(["coco2ovis", "--splits", "val"]) == 1
    assert "is not valid json" in capsys.readouterr().err
    source.unlink()
    assert prepare.main(["coco2ovis", "--splits", "val"]) == 1
    assert "instances_val2017.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["coco2lvis"])
    assert sorted(path.name for path in source.parent.iterdir()) == ["instances_train2017.json"]


# Registration


def test_registering_again_is_fine() -> None:
    register_builtin()
    dataset = registered("ovis_train")
    assert dataset is not None
    register(dataset)
    with pytest.raises(ValueError, match=r"'ovis_train' is already registered with other values \(split: 'train'"):
        register(VideoDataset(**{**vars(dataset), "split": "val"}))


def test_names_of_other_code_are_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def other() -> list[dict[str, Any]]:
        return []

    monkeypatch.setitem(DatasetCatalog.data, "ovis_val", other)
    register_builtin()
    assert "'ovis_val' was registered by other code" in caplog.text
    assert DatasetCatalog["ovis_val"] is other
    with pytest.raises(ValueError, match="registered by other code"):
        get_dataset("ovis_val")
    with pytest.raises(ValueError, match="registered by other code"):
        register(VideoDataset("ovis_val", ("a.json",), ("a",)))


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ValueError, match="unknown data set 'ytvis_2021_vall'. Did you mean 'ytvis_2021_val'?"):
        num_classes_of("ytvis_2021_vall")


def test_sets_of_different_classes_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="'ytvis_2019_train' has 40 .*, 'ovis_train' has 25"):
        class_names_of(["ytvis_2019_train", "ovis_train"])
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        class_names_of([])
