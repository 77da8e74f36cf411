"""Bad inputs of the evaluation: each is refused with what was found, what was expected and what to do."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vis.evaluation import GroundTruthError, PartWriter, ResultsError, evaluate_ytvis

A = (1, 1, 5, 5)
Make = Callable[..., Any]


@pytest.fixture
def gt(make_gt: Make) -> dict[str, Any]:
    return make_gt([(7, 1, [A] * 4, 0), (9, 5, [A] * 4, 0)])


@pytest.fixture
def results(make_results: Make) -> list[dict[str, Any]]:
    return make_results([(7, 1, 0.9, [A] * 4), (9, 5, 0.8, [A, None, A, None])])


def put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: {**entry, key: value}


def put_mask(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: {**entry, "segmentations": [value, *entry["segmentations"][1:]]}


BAD_ENTRIES = {
    "not an object": (lambda _: 3, "expected an object"),
    "key missing": (lambda e: {k: e[k] for k in ("video_id", "score")}, "category_id, segmentations missing"),
    "unknown video": (put("video_id", 8), r"video_id 8 is not in the ground truth \(2 videos, ids 7 to 9\)"),
    "video as text": (put("video_id", "7"), "video_id '7' is not"),
    "unknown category": (put("category_id", 0), "category_id 0 is not .* not the model's labels from 0"),
    "category as bool": (put("category_id", True), "category_id True"),
    "score nan": (put("score", float("nan")), "score nan must be a finite number"),
    "score infinite": (put("score", float("inf")), "score inf"),
    "score null": (put("score", None), "score None"),
    "too few masks": (lambda e: {**e, "segmentations": e["segmentations"][:3]}, r"\(4\), found 3 entries"),
    "masks null": (put("segmentations", None), "found null"),
    "mask of another size": (put_mask({"size": [13, 11], "counts": "o0"}), r"\[13, 11\].*\[11, 13\]"),
    "mask size null": (put_mask({"size": None, "counts": "o0"}), "size None"),
    "mask is text": (put_mask("o0"), "found a string"),
    "mask is polygons": (put_mask([[0, 0, 5, 0, 5, 5]]), "found a list"),
    "mask without counts": (put_mask({"size": [11, 13]}), "'size' and 'counts'"),
    "counts a number": (put_mask({"size": [11, 13], "counts": 5}), "must be a string"),
    "code too short": (put_mask({"size": [11, 13], "counts": "57"}), "frame 0: not a run-length code.*cover 12 pixels"),
    "code cut off": (put_mask({"size": [11, 13], "counts": "P"}), "cut off"),
    "code foreign": (put_mask({"size": [11, 13], "counts": "é~"}), "character"),
    "runs too short": (put_mask({"size": [11, 13], "counts": [3, 4]}), "frame 0.*143"),
    "runs negative": (put_mask({"size": [11, 13], "counts": [150, -7]}), "frame 0"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_prediction(gt: dict[str, Any], results: list[dict[str, Any]], name: str) -> None:
    damage, message = BAD_ENTRIES[name]
    with pytest.raises(ResultsError, match="1 of 2 predictions") as error:
        evaluate_ytvis(gt, [damage(results[0]), results[1]])
    assert error.match(f"entry 0: .*{message}")


def test_every_problem_is_told(gt: dict[str, Any], results: list[dict[str, Any]]) -> None:
    entries = [put("video_id", 100 + i)(results[0]) for i in range(30)]
    with pytest.raises(ResultsError, match="30 of 30") as error:
        evaluate_ytvis(gt, entries)
    assert error.match("(?s)entry 0:.*entry 19:.*and 10 more")


BAD_TRUTHS = {
    "a list": (lambda g: [g], "expected a YouTube-VIS json"),
    "images of COCO": (lambda g: {"images": [], "annotations": []}, "COCO image json"),
    "unknown video": (lambda g: g["annotations"][0].update(video_id=3), "belongs to video 3"),
    "unknown category": (lambda g: g["annotations"][1].update(category_id=9), "annotation 1 has category 9"),
    "no segmentations": (lambda g: g["annotations"][0].pop("segmentations"), "segmentations.*check_dataset"),
    "too many masks": (lambda g: g["annotations"][0]["segmentations"].append(None), "has 5 segmentations.* 4 frames"),
    "size": (lambda g: g["annotations"][0]["segmentations"][2].update(size=[5, 5]), r"\[5, 5\]"),
    "code": (
        lambda g: g["annotations"][0]["segmentations"][2].update(counts="57"),
        "video 7, frame 2: its runs cover 12",
    ),
}


@pytest.mark.parametrize("name", BAD_TRUTHS)
def test_bad_ground_truth(gt: dict[str, Any], results: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    damage, message = BAD_TRUTHS[name]
    changed = damage(gt)
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(changed if name in ("a list", "images of COCO") else gt))
    with pytest.raises(GroundTruthError, match=message) as error:
        evaluate_ytvis(path, results)
    assert error.match("gt.json")


@pytest.fixture
def tool(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tool", project_root / "tools" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(gt: dict[str, Any], results: list[dict[str, Any]], tmp_path: Path) -> Path:
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    (tmp_path / "no_ap.json").write_text(json.dumps({**gt, "annotations": None}))
    (tmp_path / "results.json").write_text(json.dumps(results))
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        archive.write(tmp_path / "results.json", "results.json")
    with zipfile.ZipFile(tmp_path / "folder.zip", "w") as archive:
        archive.write(tmp_path / "results.json", "output/results.json")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    (tmp_path / "cut.json").write_text(json.dumps(results)[:-9])
    (tmp_path / "object.json").write_text(json.dumps({"results": results}))
    (tmp_path / "pixels.json").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "empty").mkdir()
    writer = PartWriter(tmp_path / "run")
    for entry in results:
        writer.append(entry["video_id"], [entry])
    writer.close()
    return tmp_path


@pytest.mark.parametrize("results_file", ["results.json", "good.zip", "run", "run/parts"])
def test_tool_prints_and_writes(
    tool: ModuleType, files: Path, results_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = files / "new" / "ap.json"
    status = tool.main(["--gt", str(files / "gt.json"), "--results", str(files / results_file), "--json", str(out)])
    assert status == 0
    printed = capsys.readouterr().out
    assert "copypaste: AP,AP50,AP75" in printed
    written = json.loads(out.read_text())
    assert written["names"][:2] == ["AP", "AP50"]
    assert len(written["stats"]) == 12
    assert written["per_class"]["class1"] == pytest.approx(1)
    assert not list(out.parent.glob(".*"))


@pytest.mark.parametrize(
    ("gt_file", "results_file", "status", "message"),
    [
        ("no_ap.json", "results.json", 3, "no annotations"),
        ("absent.json", "results.json", 1, "absent.json: no such file"),
        ("gt.json", "absent.json", 1, "absent.json: no such file"),
        ("gt.json", "absent.zip", 1, "absent.zip: no such file"),
        ("gt.json", "folder.zip", 1, "root of the zip, found \\['output/results.json'\\]"),
        ("gt.json", "broken.zip", 1, "not a zip file"),
        ("gt.json", "cut.json", 1, "cut.json: not a json file"),
        ("gt.json", "pixels.json", 1, "pixels.json: not a json file"),
        ("gt.json", "object.json", 1, "expected a list of predictions.*found an object"),
        ("gt.json", "empty", 1, "no part"),
        ("results.json", "results.json", 1, "expected a YouTube-VIS json"),
    ],
)
def test_tool_refuses(
    tool: ModuleType,
    files: Path,
    gt_file: str,
    results_file: str,
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = files / "ap.json"
    args = ["--gt", str(files / gt_file), "--results", str(files / results_file), "--json", str(out)]
    assert tool.main(args) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert re.search(message, captured.err), captured.err
    assert not out.exists()


def test_tool_can_demand_every_video(tool: ModuleType, files: Path, results: list[dict[str, Any]]) -> None:
    (files / "one.json").write_text(json.dumps(results[:1]))
    args = ["--gt", str(files / "gt.json"), "--results", str(files / "one.json")]
    assert tool.main(args) == 0
    assert tool.main([*args, "--require-all-videos"]) == 1


def test_help_names_the_exit_status(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    assert "3 the ground truth has no annotations" in capsys.readouterr().out
