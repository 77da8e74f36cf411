"""The commands that fuse result files, and one model at several sizes."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.engine.multi_scale import at_size, multi_scale_test
from vis.evaluation.resume import _leaves


@pytest.fixture
def tool(project_root: Path) -> Iterator[Callable[[str], ModuleType]]:
    handlers = logging.root.handlers[:]

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, project_root / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    logging.root.handlers[:] = handlers


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], str]:
    mask = {"size": [5, 7], "counts": "632000>"}
    entry = {"video_id": 1, "category_id": 3, "segmentations": [mask, None]}
    contents = {
        "gt": {
            "videos": [{"id": 1, "height": 5, "width": 7, "length": 2}],
            "categories": [{"id": 3, "name": "cat"}],
            "annotations": [{**entry, "id": 1, "iscrowd": 0}],
        },
        "a": [{**entry, "score": 0.8}],
        "b": [{**entry, "score": 0.4}],
        "other": [{**entry, "category_id": 4, "score": 0.4}],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return lambda name: str(tmp_path / f"{name}.json")


def test_fuses(
    tool: Callable[[str], ModuleType], files: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "fused.json"
    command = [files("a"), files("b"), "--gt-or-json", files("gt"), "--output", str(output)]
    assert tool("ensemble").main([*command, "--evaluate", "--zip"]) == 0
    out = capsys.readouterr().out
    assert "1 videos, 1 tracks (1 in 2 of them), 0 dropped" in out
    assert out.count("AP 100.00") == 3
    assert (tmp_path / "out" / "submission.zip").is_file()
    assert json.loads(output.read_text())[0]["score"] == pytest.approx(0.6)


def test_exit_status(
    tool: Callable[[str], ModuleType], files: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    main, rest = tool("ensemble").main, ["--gt-or-json", files("gt"), "--output"]
    assert main([files("a"), files("b"), *rest, files("a")]) == 1
    assert main([files("a"), files("other"), *rest, files("out")]) == 1
    assert main([files("a"), files("none"), *rest, files("out")]) == 1
    assert capsys.readouterr().err.count("error: ") == 3
    assert not Path(files("out")).exists()
    with pytest.raises(SystemExit):
        main([files("a"), *rest[:2]])
    with pytest.raises(SystemExit):
        tool("multi_scale_test").main(["--resume", "--sizes", "1", "2", "--config-file", "x.yaml"])


def test_largest_size_grows_with_the_size(project_root: Path) -> None:
    cfg = load_cfg(str(project_root / "configs/minvis/ovis_swinl_all.yaml"), ["OUTPUT_DIR", "out"])
    large = at_size(cfg, 1080)
    assert (large.INPUT.MIN_SIZE_TEST, large.INPUT.MAX_SIZE_TEST, large.OUTPUT_DIR) == (1080, 2000, "out/size_1080")
    assert at_size(cfg, 720).INPUT == cfg.INPUT
    for sizes in ([720, 720], [0, 720], [], None):
        with pytest.raises(ValueError, match="expected different positive numbers"):
            multi_scale_test(cfg, sizes)
    with pytest.raises(ValueError, match="two or more"):
        multi_scale_test(cfg, [720])


def test_sizes_and_weights_by_key(project_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The ablation's file names its sizes, options come first, and neither makes other results of one size."""
    (tmp_path / "ovis").mkdir()
    (tmp_path / "ovis" / "annotations_valid.json").write_text("{}")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    file = str(project_root / "configs/idol/ablations/ovis_multi_scale.yaml")
    keys = ["TEST.MULTI_SCALE.WEIGHTS", [2.0, 1.0], "TEST.MULTI_SCALE.MAX_NUM", 30, "TEST.MULTI_SCALE.IOU", 0.6]
    cfg = load_cfg(file, [*keys, "OUTPUT_DIR", str(tmp_path)])
    sizes, options = [], []
    monkeypatch.setattr("vis.engine.multi_scale.evaluate_only", lambda each: sizes.append(each.INPUT.MIN_SIZE_TEST))
    monkeypatch.setattr("vis.engine.multi_scale.load_videos", lambda path: None)
    monkeypatch.setattr("vis.engine.multi_scale.fuse_files", lambda *files, **given: options.append(given))
    monkeypatch.setattr("vis.engine.multi_scale.write_submission", lambda path: path)
    monkeypatch.setattr("vis.engine.multi_scale._ap", lambda *files: None)
    multi_scale_test(cfg)
    multi_scale_test(cfg, [360, 480, 720], weights=[1, 1, 3], iou_threshold=0.7, max_num=9)
    assert sizes == [720, 1080, 360, 480, 720]
    assert options == [
        {"weights": [2.0, 1.0], "iou_threshold": 0.6, "max_num": 30},
        {"weights": [1, 1, 3], "iou_threshold": 0.7, "max_num": 9},
    ]
    plain = load_cfg(file)
    assert plain.TEST.MULTI_SCALE.WEIGHTS == []
    assert list(_leaves({"TEST": plain.TEST})) == list(_leaves({"TEST": cfg.TEST}))


@pytest.mark.slow
def test_two_sizes_of_the_demo(
    tool: Callable[[str], ModuleType], project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the demo on some videos: fused results are not below those of the worse size."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate("synthetic_ytvis", tmp_path, splits=("val",), num_videos={"val": 6})
    config, weights = "configs/demo/minvis_synthetic.yaml", project_root / "configs/demo/minvis_synthetic.pth"
    opts = ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.WEIGHTS", str(weights), "MODEL.DEVICE", "cpu"]
    cfg = load_cfg(str(project_root / config), opts)
    result = multi_scale_test(cfg, [72, 96])["synthetic_ytvis_val"]
    assert result is not None
    from vis.evaluation import evaluate_ytvis

    gt = str(tmp_path / "synthetic_ytvis" / "val.json")
    single = [evaluate_ytvis(gt, str(tmp_path / f"out/size_{size}/inference/results.json")) for size in (72, 96)]
    assert min(each.stats[0] for each in single) > 0.3
    assert result.stats[0] >= min(each.stats[0] for each in single)
    fused = tmp_path / "out/fused/synthetic_ytvis_val/results.json"
    before = fused.read_bytes()
    # by the command, which finds both sizes finished
    again = ["--sizes", "72", "96", "--config-file", str(project_root / config), *opts]
    assert tool("multi_scale_test").main(again) == 0
    assert fused.read_bytes() == before
