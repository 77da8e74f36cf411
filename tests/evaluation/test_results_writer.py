"""Results on disk: whole videos survive, parts merge, a full disk loses nothing that was written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vis.evaluation import PartWriter, ResultsWriteError, compose_results, iter_parts, write_json
from vis.evaluation import results_writer as module
from vis.evaluation.results_writer import DamagedPart, part_header, run_key
from vis.evaluation.submission import write_submission


def prediction(video_id: int, score: float = 0.5) -> dict[str, Any]:
    masks = [None, {"size": [3, 4], "counts": "57"}]
    return {"video_id": video_id, "category_id": 2, "score": score, "segmentations": masks, "track_id": 1}


def submitted(video_id: int, score: float = 0.5) -> dict[str, Any]:
    return {key: value for key, value in prediction(video_id, score).items() if key != "track_id"}


def write_parts(folder: Path, videos: Sequence[int], run: str = "") -> PartWriter:
    writer = PartWriter(folder, run)
    for video in videos:
        writer.append(video, [prediction(video)])
    return writer


def part(folder: Path, video_id: int) -> Path:
    return folder / "parts" / f"video_{video_id}.jsonl"


def test_every_video_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path)
    writer.append(5, [prediction(5), prediction(5, 0.25)])
    writer.append(4, iter([]))
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["video_4.jsonl", "video_5.jsonl"]
    assert list(iter_parts(tmp_path)) == [(4, []), (5, [prediction(5), prediction(5, 0.25)])]
    assert list(iter_parts(tmp_path / "parts")) == list(iter_parts(tmp_path))
    assert writer.num_videos == 2


def test_parts_of_all_processes_become_one_file_in_order(tmp_path: Path) -> None:
    for videos in ([9, 3], [10, 1], []):
        write_parts(tmp_path, videos)
    path, videos, predictions = compose_results(tmp_path)
    assert (path, videos, predictions) == (tmp_path / "results.json", 4, 4)
    assert json.loads(path.read_text()) == [submitted(1), submitted(3), submitted(9), submitted(10)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "results.json"]


def test_no_prediction_at_all_is_an_empty_list(tmp_path: Path) -> None:
    PartWriter(tmp_path).append(6, [])
    assert json.loads(compose_results(tmp_path)[0].read_text()) == []


def damage(kind: str, path: Path) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(
        {
            "cut off": whole[:-7],
            "no end": b"".join(lines[:-1]),
            "empty": b"",
            "garbage": b"\xff\x00garbage\n" * 3,
            "one bit": whole.replace(b"57", b"56"),
            "a line less": b"".join([lines[0], lines[-1]]),
            "a list": b"[]\n",
            "only the end": lines[-1],
            "of another video": part(path.parents[1], 4).read_bytes(),
        }[kind]
    )


DAMAGE = ["cut off", "no end", "empty", "garbage", "one bit", "a line less", "a list", "only the end"]


@pytest.mark.parametrize("kind", [*DAMAGE, "of another video"])
def test_damaged_part_is_recognised(tmp_path: Path, kind: str) -> None:
    write_parts(tmp_path, [3, 4])
    damage(kind, part(tmp_path, 3))
    assert part_header(part(tmp_path, 4)) == {"video_id": 4, "run": ""}
    with pytest.raises(DamagedPart, match=r"video_3.jsonl is damaged"):
        part_header(part(tmp_path, 3))
    if kind in DAMAGE:
        with pytest.raises(ValueError, match=r"video_3.jsonl is damaged.*[Ee]valuate again"):
            compose_results(tmp_path)
        assert not (tmp_path / "results.json").exists()


def test_video_that_two_processes_did_is_there_once(tmp_path: Path) -> None:
    write_parts(tmp_path, [1, 2])
    write_parts(tmp_path, [2, 3])
    assert compose_results(tmp_path)[1:] == (3, 3)


def test_parts_of_another_evaluation_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parts(tmp_path, [1, 2], run="new")
    write_parts(tmp_path, [3], run="old")
    write_json(tmp_path / "parts" / "run.json", {"key": "new"})
    assert [video for video, _ in iter_parts(tmp_path)] == [1, 2]
    assert compose_results(tmp_path)[1:] == (2, 2)
    assert "1 parts of another evaluation are passed over" in caplog.text
    assert run_key(tmp_path / "parts") == "new"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}'])
def test_damaged_run_file(tmp_path: Path, content: str) -> None:
    write_parts(tmp_path, [1])
    (tmp_path / "parts" / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json .*Evaluate again"):
        compose_results(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no parts"):
        compose_results(tmp_path)
    write_json(tmp_path / "parts" / "run.json", {"key": "new"})  # begun, but no video is finished
    assert compose_results(tmp_path)[1:] == (0, 0)
    assert list(iter_parts(tmp_path / "parts")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
def test_file_that_may_not_grow_further(tmp_path: Path) -> None:
    """The system's own limit stops the write in its middle; then there is space again."""
    import resource

    writer = write_parts(tmp_path, [1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            ResultsWriteError, match=r"video 2 cannot be written: files may not become that large.*kept"
        ):
            writer.append(2, [prediction(2)] * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["video_1.jsonl"]
    writer.append(2, [prediction(2)] * 50)
    assert [(video, len(entries)) for video, entries in iter_parts(tmp_path)] == [(1, 1), (2, 50)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_device_without_space(tmp_path: Path) -> None:
    """The system's own "no space left on device", in the parts, in results.json and in the zip."""
    writer = write_parts(tmp_path, [4])
    results = tmp_path / "results.json"
    results.write_text("earlier")

    def fill(path: Path) -> None:
        os.symlink("/dev/full", path.with_name(f".{path.name}.{os.getpid()}.tmp"))

    fill(part(tmp_path, 1))
    with pytest.raises(ResultsWriteError, match="video 1 cannot be written: the disk is full.*kept in .*parts"):
        writer.append(1, [])
    fill(results)
    with pytest.raises(ResultsWriteError, match="the disk is full.*kept in .*parts"):
        compose_results(tmp_path)
    fill(tmp_path / "submission.zip")
    with pytest.raises(ResultsWriteError, match="zip cannot be written: the disk is full.*results.json is complete"):
        write_submission(results)
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["parts", "video_4.jsonl", "results.json"]
    assert results.read_text() == "earlier"
    writer.append(1, [])
    assert [video for video, _ in iter_parts(tmp_path)] == [1, 4]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsWriteError, match="video 1 cannot be written"):
        PartWriter(tmp_path / "file").append(1, [])
    with pytest.raises(ResultsWriteError, match="cannot be written"):
        write_json(tmp_path / "file" / "ap.json", {})


def test_unwritable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(module, "atomic_file", refuse)  # root may write everywhere, so it is simulated
    with pytest.raises(ResultsWriteError, match="video 8 cannot be written: the folder is not writable"):
        PartWriter(tmp_path).append(8, [])


def test_parts_are_read_one_video_at_a_time(tmp_path: Path) -> None:
    write_parts(tmp_path, [1, 2, 3])
    videos = iter_parts(tmp_path)
    assert next(videos)[0] == 1
    part(tmp_path, 2).write_text("")  # so it cannot have been read yet
    with pytest.raises(DamagedPart, match="video_2"):
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
    deadline = time.monotonic() + 30
    while not part(tmp_path, 7).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    videos = list(iter_parts(tmp_path))
    assert len(videos) >= 8
    assert [video for video, _ in videos] == list(range(len(videos)))
    assert all(len(entries[0]["segmentations"][0]) == 50_000 for _, entries in videos)
