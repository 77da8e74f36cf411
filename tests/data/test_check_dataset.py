"""Every bad input of a data set, through the reader and through tools/check_dataset.py; the same list for both."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vis.data.problems import DatasetError
from vis.data.ytvis_check import check_ytvis_json
from vis.data.ytvis_format import load_ytvis_json
from vis.structures.rle import encode

Tree = dict[str, Any]


def block(height: int, width: int) -> dict[str, Any]:
    mask = np.zeros((height, width), dtype=bool)
    mask[2:5, 1:7] = True
    return encode(mask)


def good() -> Tree:
    """Two videos of different size and length, three classes with gaps in their ids, every kind of segmentation."""
    return {
        "videos": [
            {"id": 7, "height": 11, "width": 13, "length": 3, "file_names": [f"a/{i}.png" for i in range(3)]},
            {"id": 3, "height": 9, "width": 17, "length": 2, "file_names": [f"b/{i}.png" for i in range(2)]},
        ],
        "categories": [{"id": 9, "name": "owl"}, {"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {
                "id": 40,
                "video_id": 7,
                "category_id": 9,
                "iscrowd": 0,
                "segmentations": [block(11, 13), None, [[1, 1, 6, 1, 6, 5]]],
                "bboxes": [[1, 2, 6, 3], None, [1, 1, 5, 4]],
                "occlusion": ["no_occlusion", None, "severe_occlusion"],
            },
            {
                "id": 41,
                "video_id": 3,
                "category_id": 2,
                "iscrowd": 1,
                "segmentations": [{"size": [9, 17], "counts": [9, 18, 126]}, None],
                "bboxes": [[1, 0, 2, 9], None],
            },
        ],
    }


def write(folder: Path, tree: Tree | str | bytes) -> tuple[Path, Path]:
    """The json and its pictures; returns their paths."""
    path, root = folder / "my.json", folder / "frames"
    for video in good()["videos"]:
        for name in video["file_names"]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((video["height"], video["width"], 3), 80, np.uint8)).save(root / name)
    if isinstance(tree, bytes):
        path.write_bytes(tree)
    else:
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path, root


@pytest.fixture(scope="module")
def command(project_root: Path) -> ModuleType:
    """tools/check_dataset.py as a module."""
    spec = importlib.util.spec_from_file_location("check_dataset_tool", project_root / "tools" / "check_dataset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(value: Any, *path: Any) -> Callable[[Tree], None]:
    """A change: the entry at ``path`` becomes ``value``."""

    def change(tree: Tree) -> None:
        for step in path[:-1]:
            tree = tree[step]
        tree[path[-1]] = value  # type: ignore[index]

    return change


def drop(*path: Any) -> Callable[[Tree], None]:
    """A change: the entry at ``path`` goes."""

    def change(tree: Tree) -> None:
        for step in path[:-1]:
            tree = tree[step]
        del tree[path[-1]]

    return change


TRACK = ("annotations", 0)
MASK = (*TRACK, "segmentations", 0)
BAD: dict[str, tuple[Callable[[Tree], None], tuple[str, ...]]] = {
    "no videos": (drop("videos"), ("has no 'videos'",)),
    "coco file": (lambda t: t.update(images=t.pop("videos")), ("has no 'videos'", "'coco'")),
    "videos not a list": (put({}, "videos"), ("videos: must be a list",)),
    "no video": (put([], "videos"), ("videos: must be a list of videos that is not empty",)),
    "video not an object": (put("a", "videos", 0), ("videos[0]: expected {id", "'a'")),
    "video without id": (drop("videos", 0, "id"), ("videos[0]: expected {id",)),
    "video id is text": (put("7", "videos", 0, "id"), ("videos[0]: expected {id",)),
    "video id twice": (put(3, "videos", 0, "id"), ("videos[1]: id 3 is used twice",)),
    "video without height": (drop("videos", 0, "height"), ("video 7 (a): height must be a whole number", "None")),
    "video of width 0": (put(0, "videos", 0, "width"), ("video 7 (a): width must be",)),
    "gigantic video": (put(10**7, "videos", 0, "width"), ("video 7 (a): width must be", "10000000")),
    "length": (put(4, "videos", 0, "length"), ("video 7 (a): length is 4, but file_names lists 3 frames",)),
    "no frames": (put([], "videos", 0, "file_names"), ("video 7: file_names must be a list",)),
    "frames not texts": (put([1, 2, 3], "videos", 0, "file_names"), ("video 7: file_names must be a list",)),
    "missing frame": (put("a/9.png", "videos", 0, "file_names", 1), ("1 of 3 frames are missing", "a/9.png")),
    "missing folder": (put(["c/0.png", "c/1.png"], "videos", 1, "file_names"), ("video 3 (c): 2 of 2 frames are",)),
    "absolute name": (put("/etc/passwd", "videos", 0, "file_names", 0), ("'/etc/passwd' is absolute",)),
    "name leaves root": (put("a/../../x.png", "videos", 0, "file_names", 0), ("video 7", "holds '..'")),
    "backslash leaves root": (put("..\\x.png", "videos", 0, "file_names", 0), ("video 7", "holds '..'")),
    "zero byte in name": (put("a\0.png", "videos", 0, "file_names", 0), ("video 7", "zero byte")),
    "no categories": (drop("categories"), ("categories: must be a list",)),
    "empty categories": (put([], "categories"), ("categories: must be a list",)),
    "category without name": (drop("categories", 1, "name"), ("categories[1]: expected {id",)),
    "category id is real": (put(2.5, "categories", 1, "id"), ("categories[1]: expected {id", "2.5")),
    "category id twice": (put(9, "categories", 1, "id"), ("categories[1]: id 9 is used twice",)),
    "category name twice": (put("owl", "categories", 1, "name"), ("name 'owl' is used twice (ids 9 and 2)",)),
    "annotations an object": (put({}, "annotations"), ("annotations: must be a list or null, found dict",)),
    "annotation not an object": (put(5, *TRACK), ("annotations[0]: expected an object",)),
    "annotation id twice": (put(41, *TRACK, "id"), ("annotation 41: this id is used twice",)),
    "unknown video": (put(8, *TRACK, "video_id"), ("annotation 40: belongs to video 8",)),
    "video id a list": (put([7], *TRACK, "video_id"), ("annotation 40: belongs to video [7]",)),
    "unknown category": (put(3, *TRACK, "category_id"), ("video 7 (a), annotation 40: is of category 3",)),
    "crowd 2": (put(2, *TRACK, "iscrowd"), ("annotation 40: iscrowd must be 0 or 1, found 2",)),
    "no segmentations": (drop(*TRACK, "segmentations"), ("annotation 40: segmentations must be a list",)),
    "short segmentations": (drop(*TRACK, "segmentations", 1), ("segmentations has 2 entries, the video has 3",)),
    "short boxes": (drop(*TRACK, "bboxes", 1), ("annotation 40: bboxes has 2 entries, the video has 3 frames",)),
    "length of a track": (put(2, *TRACK, "length"), ("annotation 40: length is 2, the video has 3 frames",)),
    "size of RLE": (put([13, 11], *MASK, "size"), ("annotation 40: frame 0: the RLE is of size [13, 11]",)),
    "RLE without size": (drop(*MASK, "size"), ("annotation 40: frame 0: the RLE is of size None",)),
    "RLE without counts": (drop(*MASK, "counts"), ("annotation 40: frame 0: the counts of an RLE",)),
    "run lengths too short": (put([5, 6], *MASK, "counts"), ("run lengths add up to 11", "143 pixels")),
    "negative run length": (put([-1, 144], *MASK, "counts"), ("annotation 40: frame 0", "negative run length")),
    "run length not whole": (put([142.5, 0.5], *MASK, "counts"), ("frame 0", "must be whole numbers")),
    "segmentation a text": (put("abc", *MASK), ("annotation 40: frame 0: a segmentation is an RLE",)),
    "odd polygon": (put([[1, 1, 6, 1, 6, 5, 7]], *MASK), ("frame 0: a polygon needs an even number", "has 7")),
    "short polygon": (put([[1, 1, 6, 1]], *MASK), ("frame 0: a polygon needs", "at least 6; this one has 4")),
    "polygon of texts": (put([["1"] * 6], *MASK), ("frame 0: a polygon holds something that is not a number",)),
    "polygon not nested": (put([1, 1, 6, 1, 6, 5], *MASK), ("frame 0: a polygon is a list of numbers", "int")),
    "polygon far away": (put([[1, 1, 1e12, 1, 6, 5]], *MASK), ("frame 0: a polygon reaches", "far outside")),
    "box of three": (put([1, 2, 3], *TRACK, "bboxes", 0), ("frame 0: a box is [x, y, width, height]",)),
    "box of texts": (put(["1", "2", "3", "4"], *TRACK, "bboxes", 0), ("frame 0: a box is [x, y, width",)),
    "negative box": (put([5, 5, -2, 3], *TRACK, "bboxes", 0), ("frame 0: a box is", "[5, 5, -2, 3]")),
}
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", "line 1: is not valid json"),
    "cut off": (json.dumps(good())[:-30], "cut off?"),
    "picture": (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not text"),
    "a list": ("[]", "holds a list at its top"),
    "a number": ("3", "holds a int at its top"),
    "not a number": ('{"videos": NaN}', "holds NaN"),
    "deep": ("[" * 200_000, "nested too deeply"),
}
# Found only where masks and pictures are read.
DEEP: dict[str, tuple[Callable[[Tree], None], tuple[str, ...]]] = {
    "damaged counts": (put("~~~~", *MASK, "counts"), ("annotation 40: frame 0: the counts of the RLE are damaged",)),
    "counts of another mask": (put("0", *MASK, "counts"), ("annotation 40: frame 0: the run lengths add up to",)),
    "size of the picture": (drop("annotations", 1), ("video 3 (b): picture", "b/0.png is 17x9, the json says 16x9")),
}


def run(command: ModuleType, path: Path, root: Path, *more: str) -> int:
    return command.main(["--json", str(path), "--root", str(root), *more])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_reader_and_command(
    case: str, tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    change, parts = BAD[case]
    tree = good()
    change(tree)
    path, root = write(tmp_path, tree)
    with pytest.raises(DatasetError) as caught:
        load_ytvis_json(path, root)
    assert run(command, path, root) == 1
    for text in (str(caught.value), capsys.readouterr().out):
        assert str(path) in text
        for part in parts:
            assert part in text


@pytest.mark.parametrize("case", TEXTS)
def test_file_that_is_no_data_set(
    case: str, tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    text, part = TEXTS[case]
    path, root = write(tmp_path, text)
    with pytest.raises(DatasetError, match=str(path)) as caught:
        load_ytvis_json(path, root)
    assert part in str(caught.value)
    assert run(command, path, root) == 1
    assert part in capsys.readouterr().out


@pytest.mark.parametrize("case", DEEP)
def test_what_only_the_checker_reads(
    case: str, tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    change, parts = DEEP[case]
    tree = good()
    change(tree)
    if case == "size of the picture":
        tree["videos"][1]["width"] = 16
    path, root = write(tmp_path, tree)
    assert run(command, path, root) == 1
    text = capsys.readouterr().out
    for part in parts:
        assert part in text


def test_good_data_set_passes_with_a_summary(
    tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = write(tmp_path, good())
    assert run(command, path, root, "--decode") == 0
    text = capsys.readouterr().out
    for part in (
        "videos     2",
        "frames     5; per video: min 2, median 2.5, max 3",
        "17x9 (1), 13x11 (1)",
        "instances  1 with 3 masks, 1 crowds",
        "no_occlusion: 1, severe_occlusion: 1",
        "classes    3, 2 without an instance",
        "0 errors, 0 warnings",
    ):
        assert part in text
    report = check_ytvis_json(path, root)
    assert report.instances == {"cat": 0, "dog": 0, "owl": 1}


@pytest.mark.parametrize("null", [True, False])
def test_without_annotations(
    null: bool, tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = good()
    (put(None, "annotations") if null else drop("annotations"))(tree)
    path, root = write(tmp_path, tree)
    assert run(command, path, root) == 0
    assert "annotations: none (no AP can be computed)" in capsys.readouterr().out


def test_warnings_do_not_refuse(tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tree = good()
    put(None, *TRACK, "bboxes", 0)(tree)
    put([2, 2, 13, 11], *TRACK, "bboxes", 2)(tree)
    put(["heavy"], *TRACK, "occlusion")(tree)
    put([None, None], "annotations", 1, "segmentations")(tree)
    path, root = write(tmp_path, tree)
    assert run(command, path, root) == 0
    text = capsys.readouterr().out
    for part in (
        "annotation 40: frame 0: has a mask but no box; it counts as absent in this frame",
        "annotation 40: frame 2: the box [2, 2, 13, 11] leaves the picture",
        "annotation 40: occlusion must have one level per frame (3)",
        "annotation 41: frame 0: has a box but no mask",
        "annotation 41: is in no frame",
    ):
        assert part in text


def test_links_must_not_leave_the_root(tmp_path: Path) -> None:
    path, root = write(tmp_path, good())
    outside = tmp_path / "elsewhere"
    (root / "a").rename(outside)
    (root / "a").symlink_to(outside)
    with pytest.raises(DatasetError, match=r"video 7 \(a\): 'a/0.png' is a link out of the image root"):
        load_ytvis_json(path, root)
    (root / "a").unlink()
    outside.rename(root / "a")
    (root / "b" / "1.png").unlink()
    (root / "b" / "1.png").symlink_to(path)
    with pytest.raises(DatasetError, match=r"video 3 \(b\): 'b/1.png' is a link out of the image root"):
        load_ytvis_json(path, root)
    (root / "b" / "1.png").unlink()
    (root / "b" / "1.png").symlink_to(root / "b" / "0.png")
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert len(load_ytvis_json(path, linked)) == 2, "links inside the root and the root itself as a link are fine"


def test_all_problems_at_once_the_rest_counted(
    tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = good()
    tree["annotations"] += [{"id": 100 + i, "video_id": 99} for i in range(30)]
    path, root = write(tmp_path, tree)
    with pytest.raises(DatasetError, match="30 problems") as caught:
        load_ytvis_json(path, root)
    assert "... and 10 more" in str(caught.value)
    assert "tools/check_dataset.py --json" in str(caught.value)
    assert run(command, path, root) == 1
    assert capsys.readouterr().out.count("  error: ") == 30
    assert run(command, path, root, "--max-problems", "4") == 1
    text = capsys.readouterr().out
    assert text.count("  error: ") == 4
    assert "... and 26 more errors" in text


@pytest.mark.parametrize("missing", ["json", "root"])
def test_missing_files(missing: str, tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    path, root = write(tmp_path, good())
    if missing == "json":
        path = tmp_path / "other.json"
    else:
        root = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="other.json|nowhere"):
        load_ytvis_json(path, root)
    assert run(command, path, root) == 1
    assert "does not exist" in capsys.readouterr().out


def test_corrupt_picture_is_named(tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    path, root = write(tmp_path, good())
    frame = root / "a" / "2.png"
    frame.write_bytes(frame.read_bytes()[:50])
    assert run(command, path, root) == 0
    assert run(command, path, root, "--decode") == 1
    text = capsys.readouterr().out
    assert f"video 7 (a): picture {frame} cannot be decoded" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "give either a name or --json"),
        (["ovis_val", "--json", "x"], "give either a name or --json"),
        (["--json", "x"], "--json and --root go together"),
    ],
)
def test_wrong_command(
    arguments: list[str], part: str, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_name_without_files(
    tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert command.main(["ovis_train"]) == 1
    text = capsys.readouterr().err
    assert f"{tmp_path}/ovis/annotations/annotations_train.json" in text
    assert "datasets/README.md" in text
    assert command.main(["ovis_trian"]) == 1
    assert "Did you mean 'ovis_train'?" in capsys.readouterr().err


def test_real_command_and_custom_name(tmp_path: Path, project_root: Path) -> None:
    """As a user runs it: a process of its own, a data set that only a yaml knows, a problem, the exit status."""
    tree = good()
    put(3, *TRACK, "category_id")(tree)
    write(tmp_path, tree)
    config = tmp_path / "my.yaml"
    config.write_text("DATASETS:\n  CUSTOM:\n    - {NAME: mine, JSON: my.json, ROOT: frames}\n  TRAIN: [mine]\n")
    done = subprocess.run(
        [sys.executable, "tools/check_dataset.py", "mine", "--config-file", str(config)],
        cwd=project_root,
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "video 7 (a), annotation 40: is of category 3, which is not in 'categories'" in done.stdout


@pytest.mark.parametrize("name", ["davis2017", "ytvos_penguins", "coco128"])
def test_real_data(name: str, shared_dir: Path) -> None:
    folder = shared_dir / "data" / name
    coco = name == "coco128"
    root = folder / ("images" if coco else "JPEGImages")
    report = check_ytvis_json(folder / "instances.json", root, file_format="coco" if coco else "ytvis")
    assert report.ok
    assert not report.warnings
    expected = {"davis2017": (5, 10, 589, 0), "ytvos_penguins": (1, 5, 75, 0), "coco128": (128, 887, 900, 13)}
    found = (len(report.lengths), sum(report.instances.values()), report.masks, report.crowds)
    assert found == expected[name]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of a tree."""
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return (
        [path, *(found for key, value in steps for found in places(value, (*path, key)))]
        if path
        else [found for key, value in steps for found in places(value, (key,))]
    )


@pytest.mark.parametrize("junk", [None, True, -1, 0, 1.5, 10**30, "", "x", [], [None], {}, {"size": 3}], ids=repr)
def test_junk_anywhere_never_crashes(junk: Any, tmp_path: Path, command: ModuleType) -> None:
    """Every entry of a good json replaced by junk, one at a time: it is read, or refused with a message."""
    path, root = write(tmp_path, good())
    for place in places(good()):
        tree = good()
        put(junk, *place)(tree)
        path.write_text(json.dumps(tree))
        report = check_ytvis_json(path, root)
        assert report.summary()
        with contextlib.suppress(DatasetError):
            load_ytvis_json(path, root)
            deep = [
                problem for problem in report.errors if "the run lengths" in str(problem) or "counts" in str(problem)
            ]
            assert len(deep) == len(report.errors), f"read, but refused by the checker: {place}"
