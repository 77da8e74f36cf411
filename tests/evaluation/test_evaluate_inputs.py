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

from vis.evaluation import GroundTruthError, PartWriter, ResultsError, evaluate_ytvis, result_files

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
    "score of any size": (put("score", 10**400), "score 1000000"),
    "score null": (put("score", None), "score None"),
    "too few masks": (lambda e: {**e, "segmentations": e["segmentations"][:3]}, r"\(4\), found 3 entries"),
    "masks null": (put("segmentations", None), "found null"),
    "mask of another size": (put_mask({"size": [13, 11], "counts": "o0"}), r"\[13, 11\].*\[11, 13\]"),
    "mask size null": (put_mask({"size": None, "counts": "o0"}), "size None"),
    "mask is text": (put_mask("o0"), "found a string"),
    "mask is polygons": (put_mask([[0, 0, 5, 0, 5, 5]]), "found a list"),
    "mask without counts": (put_mask({"size": [11, 13]}), "'size' and 'counts'"),
    "counts a number": (put_mask({"size": [11, 13], "counts": 5}), "must be a string"),
    "counts empty": (put_mask({"size": [11, 13], "counts": ""}), "frame 0: 'counts' of a mask are empty"),
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


def test_results_of_another_data_set(gt: dict[str, Any], results: list[dict[str, Any]]) -> None:
    with pytest.raises(ResultsError, match="Not one belongs to a video of the ground truth"):
        evaluate_ytvis(gt, [put("video_id", 100)(entry) for entry in results])


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_predictions_can_be_skipped(gt: dict[str, Any], results: list[dict[str, Any]], name: str) -> None:
    damage, message = BAD_ENTRIES[name]
    found = evaluate_ytvis(gt, [results[0], damage(results[0]), results[1]], skip_invalid=True)
    good = evaluate_ytvis(gt, results, skip_invalid=True)
    assert found.stats == good.stats
    assert found.num_results == 2
    assert found.skipped is not None
    assert found.skipped["total"] == sum(found.skipped["kinds"].values()) == 1
    assert re.search(f"entry 1: .*{message}", found.skipped["first"][0])
    assert good.skipped == {"total": 0, "kinds": {}, "first": []}
    assert evaluate_ytvis(gt, results).skipped is None


def test_what_was_skipped_is_counted_by_kind(
    gt: dict[str, Any], results: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    bad = [put("video_id", 100 + i)(results[0]) for i in range(22)] + [put("score", float("nan"))(results[1])] * 2
    found = evaluate_ytvis(gt, [*bad, *results], skip_invalid=True)
    assert found.skipped is not None
    assert found.skipped["kinds"] == {"of an unknown video": 22, "without a finite score": 2}
    assert len(found.skipped["first"]) == 20
    assert "24 (22 of an unknown video, 2 without a finite score)" in caplog.text
    assert "and 4 more" in caplog.text


def test_nothing_is_left(gt: dict[str, Any], results: list[dict[str, Any]]) -> None:
    with pytest.raises(ResultsError, match=r"2 of 2 predictions.*Not one belongs"):
        evaluate_ytvis(gt, [put("video_id", 100)(entry) for entry in results], skip_invalid=True)


@pytest.mark.parametrize("chunk", [1, 7, 300, 1 << 22])
def test_files_are_read_piece_by_piece(
    results: list[dict[str, Any]], tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_files, "_CHUNK", chunk)
    path = tmp_path / "results.json"
    contents: list[Any] = [[], results, [*results, 12, 3.25, None, "ä\\]", [[]], -1e-7]]
    for content in contents:
        for text in (json.dumps(content, ensure_ascii=False), json.dumps(content, indent=3), f"\ufeff{content}"):
            if text[0] == "\ufeff":
                text = "\ufeff \n" + json.dumps(content) + " \n"
            path.write_text(text, encoding="utf-8")
            assert list(result_files.iter_results(path)) == content
    for text in ("", " ", "[", "[1", "[1,", "[1 2]", "[1,]", "[,1]", "[1]]", "[1] x", "{", "[tru]", "[" * 100_000):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ResultsError, match="not a json file"):
            result_files.load_results(path)
    for text, found in (("3", "int 3"), ('{"a": []}', "an object"), ("null", "null"), ('"[]"', "a string")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ResultsError, match=f"expected a list of predictions.*found {found}"):
            result_files.load_results(path)


def test_a_file_that_was_cut_off(gt: dict[str, Any], results: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([*results, *results])[:-30], encoding="utf-8")
    with pytest.raises(ResultsError, match="after 3 whole predictions.*cut off"):
        evaluate_ytvis(gt, path)
    found = evaluate_ytvis(gt, path, skip_invalid=True)
    assert found.stats == evaluate_ytvis(gt, [*results, results[0]]).stats
    assert found.skipped is not None
    assert found.skipped["kinds"] == {"behind the end of a json that was cut off": 1}
    path.write_text(json.dumps(results)[:20], encoding="utf-8")
    with pytest.raises(ResultsError, match="after 0 whole predictions"):
        evaluate_ytvis(gt, path, skip_invalid=True)


BAD_TRUTHS = {
    "a list": (lambda g: [g], "expected a YouTube-VIS json"),
    "images of COCO": (lambda g: {"images": [], "annotations": []}, "COCO image json"),
    "unknown video": (lambda g: g["annotations"][0].update(video_id=3), "belongs to video 3"),
    "unknown category": (lambda g: g["annotations"][1].update(category_id=9), "annotation 1 has category 9"),
    "no segmentations": (lambda g: g["annotations"][0].pop("segmentations"), "segmentations.*check_dataset"),
    "video twice": (lambda g: g["videos"].append(g["videos"][0]), "an id occurs twice among its videos"),
    "category twice": (
        lambda g: g["categories"].append({"id": 2, "name": "b"}),
        "an id occurs twice among its categor",
    ),
    "height null": (lambda g: g["videos"][0].update(height=None), r"video 7 has .* = \(None, 13, 4\)"),
    "height as text": (lambda g: g["videos"][0].update(height="11"), r"\('11', 13, 4\); expected positive numbers"),
    "areas": (lambda g: g["annotations"][0].update(areas=[4, -9]), r"annotation 0 has areas .*\[4, -9\]"),
    "areas as text": (lambda g: g["annotations"][0].update(areas=["4"]), "wrong type"),
    "video a list": (lambda g: g["annotations"][0].update(video_id=[7]), "wrong type"),
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


def run_tool(tool: ModuleType, files: Path, *options: str, results: str = "results.json") -> tuple[int, dict[str, Any]]:
    out = files / "out.json"
    status = tool.main(
        ["--gt", str(files / "gt.json"), "--results", str(files / results), "--json", str(out), *options]
    )
    return status, json.loads(out.read_text()) if status == 0 else {}


def test_tool_explains(tool: ModuleType, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "long.txt").write_text("9\n\n")
    (files / "long.json").write_text('["9"]')
    options = ["--per-class", "--track-metrics", "--errors", "--workers", "2", "--long-videos"]
    status, written = run_tool(tool, files, *options, str(files / "long.txt"))
    printed = capsys.readouterr().out
    assert status == 0
    assert written["breakdown"]["ytvis2022"]["short"]["AP"] == pytest.approx(1)
    assert written["class_stats"]["class1"]["AR100"] == pytest.approx(1)
    assert set(written["track_metrics"]) >= {"class_averaged", "per_class"}
    assert written["errors"]
    assert "ytvis2022: mean" in printed
    assert "HOTA" in printed
    assert "copypaste: AP,AP50,AP75" in printed
    assert "nan" not in printed
    assert run_tool(tool, files, "--long-videos", str(files / "long.json"))[1]["breakdown"] == written["breakdown"]
    assert run_tool(tool, files, "--long-from", "4")[0] == 1
    assert "2 of 2 videos are that long" in capsys.readouterr().err


def test_tool_takes_short_and_long_ground_truths(
    tool: ModuleType, files: Path, gt: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, index in (("gt", 0), ("gt_long", 1)):
        part = {key: [gt[key][index]] for key in ("videos", "annotations")}
        (files / f"{name}.json").write_text(json.dumps({**gt, **part}))
    status, written = run_tool(tool, files, "--gt-long", str(files / "gt_long.json"))
    assert status == 0
    table = written["breakdown"]["ytvis2022"]
    assert table["mean"]["AP"] == pytest.approx((table["short"]["AP"] + table["long"]["AP"]) / 2)
    assert run_tool(tool, files)[0] == 1
    assert "video_id 9 is not in the ground truth" in capsys.readouterr().err


def test_tool_skips_on_demand(
    tool: ModuleType, files: Path, results: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "mixed.json").write_text(json.dumps([put("score", float("nan"))(results[0]), *results]))
    assert run_tool(tool, files, results="mixed.json")[0] == 1
    assert "entry 0: video 7, category 1: score nan" in capsys.readouterr().err
    status, written = run_tool(tool, files, "--skip-invalid", results="mixed.json")
    assert status == 0
    assert written["skipped"]["kinds"] == {"without a finite score": 1}
    assert "1 predictions were left out: 1 without a finite score" in capsys.readouterr().out


def test_help_names_the_exit_status(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    assert "3 the ground truth has no annotations" in capsys.readouterr().out
