from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vis.visualization import FrameError, FrameStream, VideoWriter, natural_key, probe_video, read_image, read_video

COLORS = [(200, 40, 30), (30, 180, 60), (40, 60, 210), (220, 210, 40), (120, 120, 120)]


def write_pictures(folder: Path, names: list[str], size: tuple[int, int] = (12, 17)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(np.full((*size, 3), COLORS[index % 5], dtype=np.uint8)).save(folder / name)


def write_video(path: Path, size: tuple[int, int], count: int = 5) -> None:
    with VideoWriter(path, 7.0) as writer:
        for index in range(count):
            writer.write(np.full((*size, 3), COLORS[index % 5], dtype=np.uint8))


def test_natural_order() -> None:
    names = ["f10.png", "f2.png", "F1.png", "f02b.png", "a.png", "3.png"]
    assert sorted(names, key=natural_key) == ["3.png", "a.png", "F1.png", "f2.png", "f02b.png", "f10.png"]


def test_folder_pattern_and_list(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["f10.png", "f2.png", "f1.png"])
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_bytes(b"")
    stream = FrameStream.of([str(tmp_path)], fps=5.0)
    assert [file.name for file in stream.files] == ["f1.png", "f2.png", "f10.png"]
    assert (stream.length, stream.height, stream.width, stream.fps) == (3, 12, 17, 5.0)
    assert [tuple(frame[0, 0]) for frame in stream] == [COLORS[2], COLORS[1], COLORS[0]]
    assert len(list(stream)) == 3  # it can be read again
    assert [file.name for file in FrameStream.of([str(tmp_path / "f*0.png")]).files] == ["f10.png"]
    order = [str(tmp_path / name) for name in ("f10.png", "f1.png")]
    assert [str(file) for file in FrameStream.of(order).files] == order


def test_inputs_without_frames(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "notes.txt").write_text("no frame")
    with pytest.raises(FileNotFoundError, match="no frames in .*has the folders clip"):
        FrameStream.of([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="matches a file"):
        FrameStream.of([str(tmp_path / "*.png")])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FrameStream.of([str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    with pytest.raises(ValueError, match="must be picture files"):
        FrameStream.of([str(tmp_path / "notes.txt"), str(tmp_path / "notes.txt")])


def test_corrupt_frame_comes_after_the_good_ones(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["0.png", "1.png", "2.png"])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    seen = []
    with pytest.raises(FrameError, match=r"1\.png"):
        seen.extend(FrameStream.of([str(tmp_path)]))
    frames = FrameStream.of([str(tmp_path)])
    iterator = iter(frames)
    assert tuple(next(iterator)[0, 0]) == COLORS[0]
    with pytest.raises(FrameError, match=r"1\.png"):
        next(iterator)


def test_frame_of_another_size(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["0.png"])
    write_pictures(tmp_path, ["1.png"], size=(17, 12))
    with pytest.raises(FrameError, match="17x12, the first one is 12x17"):
        list(FrameStream.of([str(tmp_path)]))


def test_pictures_of_other_kinds(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 4), (1, 2, 3, 128)).save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "grey.png").shape == (4, 5, 3)
    assert tuple(read_image(tmp_path / "alpha.png")[0, 0]) == (1, 2, 3)


@pytest.mark.parametrize("size", [(48, 64), (45, 63)])
def test_mp4_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "new folder" / "clip.mp4"
    write_video(path, size)
    info = probe_video(path)
    assert (info.height, info.width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)  # odd sides are made even
    assert info.fps == pytest.approx(7.0)
    frames = list(read_video(path))
    assert len(frames) == 5
    for frame, color in zip(frames, COLORS, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(color)).max() < 16
    stream = FrameStream.of([str(path)])
    assert stream.fps == pytest.approx(7.0)
    assert len(list(stream)) == len(list(stream)) == 5


@pytest.mark.parametrize("content", [b"", b"this is no video at all" * 50])
def test_broken_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(FrameError, match="not a video that OpenCV can read"):
        probe_video(path)
    with pytest.raises(FrameError, match="clip.mp4"):
        list(read_video(path))
    with pytest.raises(FrameError, match="clip.mp4"):
        FrameStream.of([str(path)])


def test_video_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, (48, 64))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(FrameError, match="clip.mp4"):
        FrameStream.of([str(path)])


def test_missing_video(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        probe_video(tmp_path / "clip.mp4")


def test_video_writer_refuses(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OSError, match="OpenCV cannot write"):
        write_video(tmp_path / "folder.mp4", (48, 64))
    with VideoWriter(tmp_path / "clip.mp4", 5.0) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        with pytest.raises(ValueError, match="48x66 in a video of 48x64"):
            writer.write(np.zeros((48, 66, 3), np.uint8))
        with pytest.raises(ValueError, match="uint8"):
            writer.write(np.zeros((48, 64, 3), np.float32))
    assert len(list(read_video(tmp_path / "clip.mp4"))) == 1  # what was written stays
