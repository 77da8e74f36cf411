from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vis.structures import VideoPrediction
from vis.visualization import (
    FrameError,
    Progress,
    VideoTrack,
    contact_sheet,
    read_image,
    read_results,
    read_video,
    render_video,
    side_by_side,
    track_color,
    write_results,
)
from vis.visualization.sheet import spread

SQUARE = [[4.0, 6.0, 24.0, 6.0, 24.0, 22.0, 4.0, 22.0]]


def frames_of(count: int, broken_at: int | None = None) -> Iterator[np.ndarray]:
    for index in range(count):
        if index == broken_at:
            raise FrameError("frame is broken")
        yield np.full((36, 64, 3), 10 * index, dtype=np.uint8)


def test_contact_sheet_shows_all_frames_in_order() -> None:
    frames = [np.full((30, 50, 3), value, dtype=np.uint8) for value in (50, 100, 150, 200, 250)]
    sheet = contact_sheet(frames, 3, gap=2)
    assert sheet.shape == (2 * 32 + 2, 3 * 52 + 2, 3)
    centres = [(17 + 32 * (i // 3), 27 + 52 * (i % 3)) for i in range(5)]
    assert [int(sheet[y, x, 0]) for y, x in centres] == [50, 100, 150, 200, 250]
    assert contact_sheet(frames[:1], 4, captions=["one"]).shape[1] == 58
    assert contact_sheet(frames[:1], 4, captions=["one"]).shape[0] > 30 + 8
    for arguments in ({"frames": [], "columns": 3}, {"frames": frames, "columns": 0}):
        with pytest.raises(ValueError, match="needs pictures and columns"):
            contact_sheet(**arguments)
    with pytest.raises(ValueError, match="1 captions for 5"):
        contact_sheet(frames, 2, captions=["x"])


def test_side_by_side() -> None:
    left, right = np.full((20, 90, 3), 80, np.uint8), np.full((20, 90, 3), 160, np.uint8)
    joined = side_by_side(left, right)
    assert joined[-10, 40, 0] == 80
    assert joined[-10, 140, 0] == 160


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [(10, 4, [0, 3, 6, 9]), (3, 12, [0, 1, 2]), (5, 1, [0]), (5, 0, []), (1, 3, [0])],
)
def test_spread(length: int, count: int, expected: list[int]) -> None:
    assert spread(length, count) == expected


def test_render_writes_everything(tmp_path: Path) -> None:
    track = VideoTrack(6, "cat", 0.9, [SQUARE] * 5)
    written = render_video(frames_of(5), [track], tmp_path, length=5, fps=4.0, sheet_frames=3, columns=3)
    assert [path.name for path in written] == ["frames", "overlay.mp4", "contact_sheet.png"]
    pictures = sorted((tmp_path / "frames").iterdir())
    assert [path.name for path in pictures] == [f"0000{index}.png" for index in range(5)]
    assert read_image(pictures[0]).shape == (180, 320, 3)  # enlarged five times
    # The contour of the square, at five times the size.
    assert all((read_image(picture)[96, 20] == track_color(6)).all() for picture in pictures)
    assert len(list(read_video(tmp_path / "overlay.mp4"))) == 5
    assert read_image(tmp_path / "contact_sheet.png").shape[1] == 3 * 324 + 4


def test_render_with_ground_truth_beside(tmp_path: Path) -> None:
    track = VideoTrack(6, "cat", None, [SQUARE] * 2)
    render_video(frames_of(2), [], tmp_path, ground_truth=[track], scale=1, write_video=False)
    picture = read_image(tmp_path / "frames" / "00000.png")
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    assert (left == track_color(6)).all(axis=-1).any()
    assert not (right == track_color(6)).all(axis=-1).any()
    assert not (tmp_path / "overlay.mp4").exists()


def test_what_was_drawn_before_an_error_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="broken"):
        render_video(frames_of(5, broken_at=3), [], tmp_path)
    assert len(list((tmp_path / "frames").iterdir())) == 3
    assert len(list(read_video(tmp_path / "overlay.mp4"))) == 3
    assert (tmp_path / "contact_sheet.png").exists()
    with pytest.raises(ValueError, match="no frame"):
        render_video(iter([]), [], tmp_path / "empty")


def test_progress_names_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="vis"):
        progress = Progress("drawing", 2, period=0.0)
        for _ in range(3):  # one more than a video file claimed
            progress.step()
        progress.finish()
        Progress("reading", None, period=0.0).step()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("drawing 1/2 frames, eta 0:00:0")
    assert lines[2].startswith("drawing 3 frames, ")
    assert lines[3].startswith("drawing: 3 frames in 0:00:0")
    assert lines[4].startswith("reading 1 frames, ")


def test_results_survive_the_disk(tmp_path: Path) -> None:
    rle = {"size": [36, 64], "counts": "0P2"}
    prediction = VideoPrediction(
        torch.tensor([0.75, 0.5]), torch.tensor([1, 0]), torch.tensor([8, 3]), [[rle, None], [None, rle]], 36, 64, 2
    )
    path = tmp_path / "new" / "results.json"
    write_results(path, prediction, [10, 20], ["cat", "dog"])
    videos = read_results(path)
    assert list(videos) == [1]
    first, second = videos[1]
    assert first == {
        "video_id": 1, "category_id": 20, "category_name": "dog", "track_id": 8, "score": 0.75,
        "segmentations": [rle, None],
    }  # fmt: skip
    assert (second["category_id"], second["track_id"]) == (10, 3)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not json"),
        ("{}", "holds a dict"),
        ("[3]", "entry 0 lacks video_id"),
        ('[{"video_id": 1, "score": 0.5, "segmentations": []}]', "entry 0 lacks category_id"),
        ('[{"video_id": 1, "category_id": 2, "score": 0.5, "segmentations": 4}]', "must be a list"),
    ],
)
def test_broken_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_missing_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="results file"):
        read_results(tmp_path / "results.json")


def test_pictures_need_no_opencv(tmp_path: Path) -> None:
    # None in sys.modules makes an import fail, as if it were not installed.
    code = """
import sys; sys.modules["cv2"] = None
import numpy as np
from vis.visualization import FrameStream, FrameTrack, contact_sheet, draw_frame, read_video, render_video
frame, mask = np.zeros((36, 64, 3), np.uint8), np.ones((36, 64), bool)
contact_sheet([draw_frame(frame, [FrameTrack(1, mask, "cat", 0.5)])], 1)
render_video([frame], [], sys.argv[1], write_video=False)
try:
    render_video([frame], [], sys.argv[1])
except ImportError as error:
    sys.exit(0 if "pip install opencv-python-headless" in str(error) else str(error))
sys.exit("no error")
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
