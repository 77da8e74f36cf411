"""What a good json gives: records of video and of image data, whatever form the masks have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vis.data.categories import Category
from vis.data.problems import DatasetError
from vis.data.ytvis_format import Expected, load_ytvis_json
from vis.structures import rle
from vis.structures.polygons import segmentation_to_mask

HEIGHT, WIDTH = 11, 13


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[2:6, 3:10] = True
    mask[4, 4] = False
    return mask


def video(number: int, length: int) -> dict[str, Any]:
    names = [f"v{number}/{frame}.jpg" for frame in range(length)]
    return {"id": number, "height": HEIGHT, "width": WIDTH, "length": length, "file_names": names}


def load(folder: Path, tree: dict[str, Any], **arguments: Any) -> list[dict[str, Any]]:
    path = folder / "set.json"
    path.write_text(json.dumps(tree))
    return load_ytvis_json(path, folder / "frames", check_images=False, **arguments)


def test_records(tmp_path: Path, mask: np.ndarray) -> None:
    code = rle.encode(mask)
    tree = {
        "videos": [video(7, 3), video(2, 2)],
        "categories": [{"id": 90, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {
                "id": 5,
                "video_id": 7,
                "category_id": 90,
                "segmentations": [None, code, None],
                "bboxes": [None, [3, 2, 7, 4], []],
            },
            {
                "id": 1,
                "video_id": 7,
                "category_id": 4,
                "iscrowd": 1,
                "segmentations": [code] * 3,
                "bboxes": [[0, 0, 1, 1]] * 3,
            },
        ],
    }
    records = load(tmp_path, tree, dataset_name="mine")
    assert [record["video_id"] for record in records] == [2, 7]
    assert records[0]["annotations"] == []
    record = records[1]
    assert (record["height"], record["width"], record["length"]) == (HEIGHT, WIDTH, 3)
    assert record["dataset_name"] == "mine"
    assert record["json_file"] == str(tmp_path / "set.json")
    assert record["file_names"] == [str(tmp_path / "frames" / "v7" / f"{frame}.jpg") for frame in range(3)]
    dog, cat = record["annotations"]
    assert (dog["id"], dog["category_id"], dog["iscrowd"], dog["occlusion"]) == (5, 1, 0, None)
    assert dog["segmentations"] == [None, code, None]
    assert dog["bboxes"] == [None, [3, 2, 7, 4], None]
    assert (cat["category_id"], cat["iscrowd"]) == (0, 1)


@pytest.mark.parametrize("annotations", [{}, {"annotations": None}])
def test_no_annotations_means_no_key(annotations: dict[str, Any], tmp_path: Path) -> None:
    tree = {"videos": [video(1, 2)], "categories": [{"id": 1, "name": "cat"}], **annotations}
    assert "annotations" not in load(tmp_path, tree)[0]
    with pytest.raises(DatasetError, match="annotations: is null or absent, but this is a training set"):
        load(tmp_path, tree, expected=Expected(annotated=True))


def test_every_form_of_mask_is_the_same_mask(tmp_path: Path, mask: np.ndarray) -> None:
    code = rle.encode(mask)
    plain = {"size": [HEIGHT, WIDTH], "counts": rle.run_lengths(code).tolist()}
    polygon = [[3, 2, 10, 2, 10, 6, 3, 6]]
    tree = {
        "videos": [video(1, 3)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "video_id": 1, "category_id": 1, "segmentations": [code, plain, polygon]}],
    }
    track = load(tmp_path, tree)[0]["annotations"][0]
    assert track["segmentations"] == [code, code, polygon]
    assert track["bboxes"] == [[3, 2, 7, 4]] * 3, "made of the masks where the json has none"
    masks = [segmentation_to_mask(each, HEIGHT, WIDTH) for each in track["segmentations"]]
    np.testing.assert_array_equal(masks[0], mask)
    np.testing.assert_array_equal(masks[1], mask)
    mask[4, 4] = True
    np.testing.assert_array_equal(masks[2], mask)


def test_images_are_videos_of_one_frame(tmp_path: Path, mask: np.ndarray) -> None:
    crowd = {"size": [HEIGHT, WIDTH], "counts": rle.run_lengths(rle.encode(mask)).tolist()}
    box = [3, 2, 7, 4]
    polygons = [[3, 2, 10, 2, 10, 6, 3, 6], [1, 1, 2, 2]]
    tree = {
        "images": [{"id": 30, "height": HEIGHT, "width": WIDTH, "file_name": "z.jpg"}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [
            {"id": 9, "image_id": 30, "category_id": 3, "iscrowd": 1, "segmentation": crowd, "bbox": box},
            {"id": 8, "image_id": 30, "category_id": 3, "iscrowd": 0, "segmentation": polygons, "bbox": box},
        ],
    }
    (record,) = load(tmp_path, tree, file_format="coco")
    assert (record["video_id"], record["length"]) == (30, 1)
    assert record["file_names"] == [str(tmp_path / "frames" / "z.jpg")]
    region, car = record["annotations"]
    assert region["iscrowd"] == 1
    assert region["segmentations"] == [rle.encode(mask)]
    assert car["segmentations"] == [polygons[:1]], "a polygon of two points is left out, as image training always did"
    assert car["bboxes"] == [box]


def test_categories_that_differ_are_refused(tmp_path: Path) -> None:
    tree = {"videos": [video(1, 2)], "categories": [{"id": 1, "name": "Giant_Panda"}, {"id": 2, "name": "owl"}]}
    known = (Category(1, "giant panda"), Category(2, "owl"))
    assert load(tmp_path, tree, expected=Expected(categories=known))
    for other, part in (
        ((*known, Category(3, "cat")), "lacks 3 'cat'"),
        (known[:1], "has besides 2 'owl'"),
        ((known[0], Category(2, "cat")), "names 2 'owl' instead of 'cat'"),
    ):
        with pytest.raises(DatasetError, match=part):
            load(tmp_path, tree, expected=Expected(categories=other))


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set format 'yolo'; known are ytvis, coco"):
        load(tmp_path, {}, file_format="yolo")
