from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vis.structures import VideoPrediction
from vis.structures.rle import encode
from vis.visualization import VideoWriter, read_image, read_video, track_color

HEIGHT, WIDTH, LENGTH = 40, 64, 4
BAD_CONFIG = "MODEL:\n  WEIGHT: typo.pth\n"


@pytest.fixture(scope="module")
def demo(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("vis_tools_demo", project_root / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mask_at(frame: int, row: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[row : row + 12, 5 + 6 * frame : 25 + 6 * frame] = True
    return mask


def tracks() -> list[list[dict[str, Any] | None]]:
    first = [encode(mask_at(frame, 4)) for frame in range(LENGTH)]
    second = [encode(mask_at(frame, 22)) if frame != 2 else None for frame in range(LENGTH)]
    return [first, second]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder of frames whose names sort naturally only."""
    folder = tmp_path / "data" / "clip"
    folder.mkdir(parents=True)
    for frame in range(LENGTH):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * frame + 20, dtype=np.uint8)).save(folder / f"f{frame + 8}.png")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    entries = [
        {"video_id": 1, "category_id": 7, "score": 0.9 - 0.3 * place, "track_id": 5 + place, "segmentations": masks}
        for place, masks in enumerate(tracks())
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def gt_json(tmp_path: Path, clip: Path) -> Path:
    names = [f"clip/f{frame + 8}.png" for frame in range(LENGTH)]
    boxes = [[float(5 + 6 * frame), 4.0, 20.0, 12.0] for frame in range(LENGTH)]
    tree = {
        "videos": [
            {"id": number, "height": HEIGHT, "width": WIDTH, "length": LENGTH, "file_names": names} for number in (1, 4)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {
                "id": 1, "video_id": 1, "category_id": 7, "iscrowd": 0, "segmentations": tracks()[0], "bboxes": boxes,
                "areas": [240.0] * LENGTH, "height": HEIGHT, "width": WIDTH, "length": LENGTH,
            }
        ],
    }  # fmt: skip
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(tree))
    return path


def pictures(folder: Path) -> list[np.ndarray]:
    return [read_image(path) for path in sorted((folder / "frames").iterdir())]


def has_color(picture: np.ndarray, number: int) -> bool:
    return bool((picture == track_color(number)).all(axis=-1).any())


class FakePredictor:
    """What the tool needs of a predictor; remembers the brightness of the frames."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.seen: list[int] = []

    def open(self, height: int, width: int) -> None:
        self.size = (height, width)

    def push(self, frame: np.ndarray) -> None:
        self.seen.append(int(frame[0, 0, 0]))

    def close(self) -> VideoPrediction:
        assert self.seen == sorted(self.seen)
        count = len(self.seen)
        masks: Any = [track[:count] for track in tracks()]
        scores, labels, ids = torch.tensor([0.9, 0.6]), torch.tensor([1, 0]), torch.tensor([5, 6])
        return VideoPrediction(scores, labels, ids, masks, *self.size, length=count)


@pytest.fixture
def config(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("vis.engine.predictor.VideoPredictor", FakePredictor)
    return str(project_root / "configs" / "minvis" / "ytvis19_r50.yaml")


def test_results_end_to_end_in_a_process(project_root: Path, clip: Path, results: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", str(project_root / "tools" / "demo.py"), "--results", str(results)]
    command += ["--input", str(clip), "--output", str(output), "--classes", "cat,dog,e,f,g,h,owl"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"drawing: {LENGTH} frames in 0:0" in run.stderr
    assert [path.name for path in sorted(output.iterdir())] == ["contact_sheet.png", "frames", "overlay.mp4"]
    drawn = pictures(output)
    assert len(drawn) == len(list(read_video(output / "overlay.mp4"))) == LENGTH
    assert all(has_color(picture, 5) for picture in drawn)
    assert [has_color(picture, 6) for picture in drawn] == [True, True, False, True]


def test_model_on_frames_then_the_same_from_its_results(
    demo: ModuleType, config: str, clip: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert demo.main(["--config-file", config, "--input", str(clip), "--output", str(first)]) == 0
    entries = json.loads((first / "results.json").read_text())
    assert [(e["video_id"], e["track_id"], e["category_id"], e["category_name"]) for e in entries] == [
        (1, 5, 2, "giant_panda"),
        (1, 6, 1, "person"),
    ]
    arguments = ["--results", str(first / "results.json"), "--input", str(clip), "--output", str(second)]
    assert demo.main(arguments) == 0
    for one, other in zip(pictures(first), pictures(second), strict=True):
        assert np.array_equal(one, other)


def test_model_on_a_video_file(demo: ModuleType, config: str, clip: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    with VideoWriter(video, 6.0) as writer:
        for path in sorted(clip.iterdir(), key=lambda path: int(path.stem[1:])):
            writer.write(read_image(path))
    output = tmp_path / "out"
    assert demo.main(["--config-file", config, "--input", str(video), "--output", str(output), "--no-frames"]) == 0
    assert len(list(read_video(output / "overlay.mp4"))) == LENGTH
    assert not (output / "frames").exists()


def test_corrupt_frame_keeps_what_was_found(
    demo: ModuleType, config: str, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (clip / "f10.png").write_bytes(b"broken")
    output = tmp_path / "out"
    assert demo.main(["--config-file", config, "--input", str(clip), "--output", str(output)]) == 1
    assert "f10.png" in caplog.text
    assert "The 2 frames before it were predicted and drawn" in caplog.text
    assert len(pictures(output)) == len(json.loads((output / "results.json").read_text())[0]["segmentations"]) == 2


def test_threshold(demo: ModuleType, clip: Path, results: Path, tmp_path: Path) -> None:
    arguments = ["--results", str(results), "--input", str(clip), "--output", str(tmp_path / "out")]
    assert demo.main([*arguments, "--confidence-threshold", "0.7", "--no-video"]) == 0
    assert has_color(pictures(tmp_path / "out")[0], 5)
    assert not has_color(pictures(tmp_path / "out")[0], 6)


def test_data_set_of_files(demo: ModuleType, clip: Path, gt_json: Path, results: Path, tmp_path: Path) -> None:
    files = ["--gt-json", str(gt_json), "--image-root", str(clip.parent), "--no-video"]
    assert demo.main([*files, "--video", "1", "--output", str(tmp_path / "truth")]) == 0
    assert has_color(pictures(tmp_path / "truth" / "video_1")[0], 1)  # ground truth is numbered from 1
    arguments = [*files, "--results", str(results), "--side-by-side", "--output", str(tmp_path / "both")]
    assert demo.main(arguments) == 0
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["video_1"]
    picture = pictures(tmp_path / "both" / "video_1")[0]
    left, right = np.split(picture[:, : picture.shape[1] // 2 * 2], 2, axis=1)
    assert has_color(left, 1)
    assert not has_color(left, 5)
    assert has_color(right, 5)


def test_one_broken_video_does_not_cost_the_others(
    demo: ModuleType, clip: Path, gt_json: Path, results: Path, tmp_path: Path
) -> None:
    entries = json.loads(results.read_text())
    short = {**entries[0], "segmentations": entries[0]["segmentations"][:2]}
    results.write_text(json.dumps([short, {**entries[1], "video_id": 4}]))
    files = ["--gt-json", str(gt_json), "--image-root", str(clip.parent), "--no-video"]
    assert demo.main([*files, "--results", str(results), "--output", str(tmp_path / "out")]) == 1
    assert len(pictures(tmp_path / "out" / "video_1")) == 2  # up to the frame that has no mask
    assert len(pictures(tmp_path / "out" / "video_4")) == LENGTH


def test_unusable_inputs(
    demo: ModuleType, config: str, clip: Path, gt_json: Path, results: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Each is one clear message and exit status 1."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "bad.yaml").write_text(BAD_CONFIG)
    stranger = tmp_path / "stranger.json"
    stranger.write_text(results.read_text().replace('"video_id": 1', '"video_id": 99'))
    several = tmp_path / "several.json"
    several.write_text(json.dumps(json.loads(results.read_text()) + json.loads(stranger.read_text())))
    wide = tmp_path / "wide"
    wide.mkdir()
    Image.new("RGB", (WIDTH + 2, HEIGHT)).save(wide / "0.png")
    files = ["--gt-json", str(gt_json), "--image-root", str(clip.parent)]
    model = ["--config-file", config, "--input"]
    cases: list[tuple[list[str], str]] = [
        ([*model, str(tmp_path / "nothing")], "matches a file"),
        ([*model, str(tmp_path / "empty")], "no frames in"),
        ([*model, str(tmp_path / "empty.mp4")], "not a video that OpenCV can read"),
        (["--config-file", str(tmp_path / "no.yaml"), "--input", str(clip)], "does not exist"),
        (["--config-file", str(tmp_path / "bad.yaml"), "--input", str(clip)], "MODEL.WEIGHT"),
        (["--results", str(tmp_path / "no.json"), "--input", str(clip)], "results file"),
        (["--results", str(several), "--input", str(clip)], "results of 2 videos"),
        (["--results", str(results), "--input", str(wide)], "are these the results of this video"),
        (["--results", str(stranger), *files], "results of videos that the data set does not have: 99"),
        (["--results", str(results), *files, "--video", "8"], "no such video; it has 1, 4"),
        (["--results", str(results), *files, "--classes", "one"], "--classes has 1 names, the data set has 2"),
        (["--results", str(results), "--dataset", "ytvis_2091_train"], "unknown data set 'ytvis_2091_train'"),
        (["--gt-json", str(tmp_path / "no.json"), "--image-root", str(clip)], "no.json"),
    ]
    for arguments, message in cases:
        caplog.clear()
        assert demo.main([*arguments, "--output", str(tmp_path / "out")]) == 1, arguments
        assert message in caplog.text, arguments


def test_missing_weights(demo: ModuleType, project_root: Path, clip: Path, tmp_path: Path, caplog: Any) -> None:
    config = str(project_root / "configs" / "minvis" / "ytvis19_r50.yaml")
    arguments = ["--config-file", config, "--input", str(clip), "--output", str(tmp_path / "out")]
    assert demo.main([*arguments, "--opts", "MODEL.WEIGHTS", ""]) == 1
    assert "MODEL.WEIGHTS is empty" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x", "--config-file", "c", "--opts", "A", "1", "--output", "y"], "--output after --opts"),
        (
            ["--input", "x", "--config-file", "c", "--output", "y", "--opts", "A", "1", "--boxes"],
            "--boxes after --opts",
        ),
        (["--input", "x", "--config-file", "c", "--output", "y", "--opts", "A"], "pairs KEY VALUE"),
        (["--input", "x", "--config-file", "c"], "--output"),
        (["--output", "y"], "exactly one of"),
        (["--output", "y", "--input", "x", "--dataset", "d"], "exactly one of"),
        (["--output", "y", "--input", "x"], "needs a model"),
        (["--output", "y", "--gt-json", "x"], "go together"),
        (["--output", "y", "--input", "x", "--results", "r", "--side-by-side"], "need a data set"),
        (["--output", "y", "--dataset", "x", "--side-by-side"], "compares"),
        (["--output", "y", "--dataset", "x", "--confidence-threshold", "3"], "between 0 and 1"),
        (["--output", "y", "--dataset", "x", "--fps", "0"], "greater than 0"),
    ],
)
def test_wrong_usage(demo: ModuleType, arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_examples(demo: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out
