"""Results on disk: whole lines survive, parts merge, a full disk loses nothing that was written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from vis.evaluation import PartWriter, ResultsWriteError, compose_results, iter_parts, write_json
from vis.evaluation import results_writer as module
from vis.evaluation.results_writer import clear_parts


def prediction(video_id: int, score: float = 0.5) -> dict[str, Any]:
    masks = [None, {"size": [3, 4], "counts": "57"}]
    return {"video_id": video_id, "category_id": 2, "score": score, "segmentations": masks, "track_id": 1}


def submitted(video_id: int, score: float = 0.5) -> dict[str, Any]:
    return {key: value for key, value in prediction(video_id, score).items() if key != "track_id"}


def write_parts(folder: Path, parts: dict[int, list[int]]) -> None:
    for rank, videos in parts.items():
        writer = PartWriter(folder, rank)
        for video in videos:
            writer.append(video, [prediction(video)])
        writer.close()


def test_every_video_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, 3)
    writer.append(5, [prediction(5), prediction(5, 0.25)])
    writer.append(4, [])
    assert writer.path == tmp_path / "parts" / "rank3.jsonl"
    assert list(iter_parts(tmp_path)) == [(4, []), (5, [prediction(5), prediction(5, 0.25)])]
    writer.close()
    writer.close()


def test_parts_of_all_processes_become_one_file_in_order(tmp_path: Path) -> None:
    write_parts(tmp_path, {0: [9, 3], 1: [10, 1], 2: []})
    path, videos, predictions = compose_results(tmp_path)
    assert (path, videos, predictions) == (tmp_path / "results.json", 4, 4)
    assert json.loads(path.read_text()) == [submitted(1), submitted(3), submitted(9), submitted(10)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "results.json"]


def test_no_prediction_at_all_is_an_empty_list(tmp_path: Path) -> None:
    PartWriter(tmp_path).close()
    assert json.loads(compose_results(tmp_path)[0].read_text()) == []


def test_torn_last_line_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parts(tmp_path, {0: [3, 4], 1: [8]})
    path = tmp_path / "parts" / "rank0.jsonl"
    os.truncate(path, path.stat().st_size - 7)
    assert [video for video, _ in iter_parts(tmp_path)] == [3, 8]
    assert "cut off" in caplog.text


@pytest.mark.parametrize("line", ["{", "[]", '{"video_id": "3", "predictions": []}', '{"video_id": 3}', "\xff"])
def test_foreign_line_is_an_error(tmp_path: Path, line: str) -> None:
    write_parts(tmp_path, {0: [3]})
    with open(tmp_path / "parts" / "rank0.jsonl", "a", encoding="latin1") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"rank0.jsonl, line 2: expected one finished video"):
        compose_results(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_video_that_two_processes_did_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parts(tmp_path, {0: [1, 2], 1: [2, 3]})
    assert compose_results(tmp_path)[1:] == (3, 3)
    assert "1 videos occur more than once" in caplog.text


def test_earlier_parts_are_cleared(tmp_path: Path) -> None:
    write_parts(tmp_path, {0: [1], 5: [2]})
    (tmp_path / "parts" / "notes.txt").write_text("mine")
    clear_parts(tmp_path)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["notes.txt"]
    with pytest.raises(FileNotFoundError, match="no part files"):
        compose_results(tmp_path)


def test_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PartWriter(tmp_path)
    writer.append(1, [prediction(1)])
    whole = writer.path.read_bytes()

    def half_then_full(file: BinaryIO, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_write_all", half_then_full)
    with pytest.raises(ResultsWriteError, match="video 2 cannot be written: the disk is full.*1 videos.*rank0.jsonl"):
        writer.append(2, [prediction(2)])
    assert writer.path.read_bytes() == whole
    monkeypatch.undo()
    writer.append(2, [prediction(2)])  # space was freed
    writer.close()
    assert [video for video, _ in iter_parts(tmp_path)] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_device_without_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system's own "no space left on device", in the parts and in results.json."""
    write_parts(tmp_path, {1: [4]})
    (tmp_path / "results.json").write_text("earlier")
    os.symlink("/dev/full", tmp_path / f".results.json.{os.getpid()}.tmp")
    with pytest.raises(ResultsWriteError, match="the disk is full.*kept in .*parts.*tools/evaluate.py"):
        compose_results(tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["parts", "results.json"]
    assert (tmp_path / "results.json").read_text() == "earlier"

    os.symlink("/dev/full", tmp_path / "parts" / "rank0.jsonl")
    with pytest.raises(ResultsWriteError, match="the disk is full"):
        PartWriter(tmp_path, 0).append(1, [])
    assert "torn last line" in caplog.text


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (lambda: PartWriter(tmp_path / "file"), lambda: clear_parts(tmp_path / "file")):
        with pytest.raises(ResultsWriteError, match="Nothing was computed yet"):
            attempt()
    with pytest.raises(ResultsWriteError, match="cannot be written"):
        write_json(tmp_path / "file" / "ap.json", {})


def test_unwritable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> BinaryIO:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(module, "_open_part", refuse)  # root may write everywhere, so it is simulated
    with pytest.raises(ResultsWriteError, match="rank0.jsonl cannot be opened: the folder is not writable"):
        PartWriter(tmp_path)


def test_parts_are_read_one_video_at_a_time(tmp_path: Path) -> None:
    write_parts(tmp_path, {0: [1, 2, 3]})
    videos = iter_parts(tmp_path)
    assert next(videos)[0] == 1
    (tmp_path / "parts" / "rank0.jsonl").write_text("")  # so the second cannot have been read yet
    with pytest.raises(ValueError, match="Expecting value"):
        next(videos)


WRITE_FOREVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("results_writer", sys.argv[1])  # alone: without torch it starts at once
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
writer = module.PartWriter(sys.argv[2])
for video in range(10**9):
    writer.append(video, [{"video_id": video, "segmentations": ["x" * 50_000]}])
"""


def test_killed_process_leaves_whole_videos(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(module.__file__), str(tmp_path)])
    path = tmp_path / "parts" / "rank0.jsonl"
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    videos = list(iter_parts(tmp_path))
    assert len(videos) >= 3
    assert [video for video, _ in videos] == list(range(len(videos)))
    assert all(len(entries[0]["segmentations"][0]) == 50_000 for _, entries in videos)
