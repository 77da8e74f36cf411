"""Results on disk while they arrive: one line per finished video, then one file in the submission format.

Each process appends to a part file of its own, ``<folder>/parts/rank<r>.jsonl``; every line is a whole video::

    {"video_id": 7, "predictions": [{"video_id": 7, "category_id": 3, "score": 0.9, "segmentations": [...]}, ...]}

A process that is killed leaves whole lines behind, and at most one torn line at the end, which is dropped when the file
is read. ``compose_results`` turns the parts into ``results.json`` one video at a time, so that the results of a data
set are never in memory together.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

RESULT_KEYS = ("video_id", "category_id", "score", "segmentations")
"""Keys of a prediction in the submission format."""


class ResultsWriteError(OSError):
    """Results cannot be written; the message says what is kept and where."""


def parts_folder(output_dir: str | Path) -> Path:
    """Where the part files of an evaluation in ``output_dir`` lie."""
    return Path(output_dir) / "parts"


def clear_parts(output_dir: str | Path) -> None:
    """Remove the part files of an earlier evaluation; call in one process only, before any writer opens.

    Raises:
        ResultsWriteError: the folder cannot be made or emptied.
    """
    folder = parts_folder(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in _part_files(folder):
            path.unlink()
    except OSError as error:
        raise ResultsWriteError(_explain(error, f"{folder} cannot be prepared", "Nothing was computed yet.")) from error


class PartWriter:
    """Appends finished videos to the part file of one process.

    Args:
        output_dir: folder of the evaluation; the file is ``parts/rank<rank>.jsonl`` in it.
        rank: number of this process.

    Raises:
        ResultsWriteError: the file cannot be opened or written.
    """

    def __init__(self, output_dir: str | Path, rank: int = 0) -> None:
        self.path = parts_folder(output_dir) / f"rank{rank}.jsonl"
        self.num_videos = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_part(self.path)
        except OSError as error:
            raise ResultsWriteError(
                _explain(error, f"{self.path} cannot be opened", "Nothing was computed yet.")
            ) from error
        self._end = self._file.seek(0, os.SEEK_END)

    def append(self, video_id: int, predictions: Sequence[dict[str, Any]]) -> None:
        """Write one video and hand it to the operating system, so that a killed process loses nothing.

        Raises:
            ResultsWriteError: the disk is full, say; the file then ends with the last whole line.
        """
        line = json.dumps({"video_id": video_id, "predictions": list(predictions)}, separators=(",", ":"))
        try:
            _write_all(self._file, line.encode() + b"\n")
        except OSError as error:
            self._drop_torn_line()
            kept = f"The {self.num_videos} videos finished so far are kept in {self.path}."
            raise ResultsWriteError(_explain(error, f"video {video_id} cannot be written", kept)) from error
        self._end = self._file.tell()
        self.num_videos += 1

    def _drop_torn_line(self) -> None:
        try:
            self._file.truncate(self._end)
        except OSError as error:  # reading drops a torn last line too, so nothing is lost
            logger.warning("%s: a torn last line stays (%s); it is skipped when the file is read.", self.path, error)

    def close(self) -> None:
        """Close the file; more than once is fine."""
        self._file.close()


def _open_part(path: Path) -> BinaryIO:
    """Open for appending, unbuffered: a failed write must not come back when the file is closed."""
    return open(path, "ab", buffering=0)  # type: ignore[return-value]


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = file.write(view)
        if not written:
            raise OSError(errno.EIO, "the disk took nothing")
        view = view[written:]


def iter_parts(folder: str | Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The videos in a folder of part files by ascending id, each once: ``(video id, predictions)``, read one by one.

    Args:
        folder: the folder with the part files, or the folder of the evaluation above it.

    Raises:
        FileNotFoundError: there are no part files.
        ValueError: a line other than a file's last is not what ``PartWriter`` writes.
    """
    folder = Path(folder)
    if not _part_files(folder):
        folder = parts_folder(folder)
    files = _part_files(folder)
    if not files:
        raise FileNotFoundError(
            f"{folder}: no part files (rank0.jsonl ...). An evaluation writes them to "
            "OUTPUT_DIR/inference/<dataset>/parts; give that folder, or a results.json."
        )
    places = _index(files)
    for video_id in sorted(places):
        path, offset = places[video_id]
        with open(path, "rb") as file:
            file.seek(offset)
            yield video_id, json.loads(file.readline())["predictions"]


def _part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank*.jsonl"))


def _index(files: Sequence[Path]) -> dict[int, tuple[Path, int]]:
    """Video id -> (file, offset of its line); of a video that occurs twice, as samplers that pad give it, the first."""
    places: dict[int, tuple[Path, int]] = {}
    repeated = 0
    for path in files:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    logger.warning("%s: the last line was cut off by the end of its process; it is dropped.", path)
                    break
                video_id = _video_id(line, path, number)
                repeated += video_id in places
                places.setdefault(video_id, (path, offset))
                offset += len(line)
    if repeated:
        logger.warning("%d videos occur more than once in the part files; the first result of each is kept.", repeated)
    return places


def _video_id(line: bytes, path: Path, number: int) -> int:
    try:
        entry = json.loads(line)
        video_id = entry["video_id"]
        if type(video_id) is not int or not isinstance(entry["predictions"], list):
            raise TypeError("video_id or predictions has the wrong type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: expected one finished video as json, found something else ({error}). Delete the "
            "line or the file and evaluate again."
        ) from error
    return video_id


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends without an error; until then, and after an error,
    an earlier file of that name stays as it is."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a json file atomically, making its folder.

    Raises:
        ResultsWriteError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        raise ResultsWriteError(_explain(error, f"{path} cannot be written", "An earlier file stays.")) from error


def compose_results(output_dir: str | Path) -> tuple[Path, int, int]:
    """Write ``<output_dir>/results.json`` from the part files, ordered by video, atomically.

    Only the four keys of the submission format are written (``track_id`` stays in the parts).

    Returns:
        The path, the number of videos in the parts, and the number of predictions.

    Raises:
        ResultsWriteError: the file cannot be written; the part files stay, and so does an earlier results.json.
        FileNotFoundError, ValueError: see ``iter_parts``.
    """
    path = Path(output_dir) / "results.json"
    parts = iter_parts(parts_folder(output_dir))
    videos = predictions = 0
    try:
        with atomic_file(path) as file:
            file.write(b"[")
            for _, entries in parts:
                videos += 1
                for entry in entries:
                    submitted = json.dumps({key: entry[key] for key in RESULT_KEYS})
                    file.write((b",\n" if predictions else b"\n") + submitted.encode())
                    predictions += 1
            file.write(b"\n]\n")
    except FileNotFoundError:
        raise
    except OSError as error:
        kept = (
            f"The results of all finished videos are kept in {parts_folder(output_dir)}; "
            "`python tools/evaluate.py --results` takes that folder."
        )
        raise ResultsWriteError(_explain(error, f"{path} cannot be written", kept)) from error
    return path, videos, predictions


def _explain(error: OSError, what: str, kept: str) -> str:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EACCES: "the folder is not writable; choose another OUTPUT_DIR or change its permissions",
        errno.EROFS: "the file system is read-only; choose another OUTPUT_DIR",
    }
    return f"{what}: {reasons.get(error.errno or 0, str(error))}. {kept}"
