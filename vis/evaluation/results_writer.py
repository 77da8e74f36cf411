"""Results on disk while they arrive: one part per finished video, then one file in the submission format.

A part, ``<folder>/parts/video_7.jsonl``, is written when its video is done and has its name only once it is whole::

    {"video_id": 7, "run": "5f0c..."}
    {"video_id": 7, "category_id": 3, "score": 0.9, "track_id": 12, "segmentations": [...]}     one line per prediction
    {"predictions": 1, "sha256": "..."}                                                         of all that is above

So a process that is killed leaves whole videos behind, a damaged part is recognised, and a part of an evaluation with
other weights (``run`` is the key of ``parts/run.json``) is never mixed in. ``compose_results`` turns the parts into
``results.json`` one prediction at a time: the results of a data set are never in memory together.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

RESULT_KEYS = ("video_id", "category_id", "score", "segmentations")
"""Keys of a prediction in the submission format."""

RUN_FILE = "run.json"
"""Beside the parts: of which evaluation they are."""

_PART = re.compile(r"^video_(-?\d+)\.jsonl$")


class ResultsWriteError(OSError):
    """Results cannot be written; the message says what is kept and where."""


class DamagedPart(ValueError):
    """A part is not what ``PartWriter`` writes."""


def parts_folder(output_dir: str | Path) -> Path:
    """Where the parts of an evaluation in ``output_dir`` lie."""
    return Path(output_dir) / "parts"


def part_files(folder: str | Path) -> dict[int, Path]:
    """Video id -> part, by ascending id, for the parts in a folder."""
    found = ((_PART.match(path.name), path) for path in Path(folder).glob("video_*.jsonl"))
    return dict(sorted((int(match.group(1)), path) for match, path in found if match))


def run_key(folder: str | Path) -> str:
    """The key of the evaluation that the parts in a folder are of; "" where nothing says so.

    Raises:
        ValueError: ``run.json`` is damaged.
    """
    path = Path(folder) / RUN_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return ""
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Evaluate again: the evaluation then starts anew.") from error
    key = content.get("key") if isinstance(content, dict) else None
    if not isinstance(key, str):
        raise ValueError(f"{path} has no key of its evaluation. Evaluate again: the evaluation then starts anew.")
    return key


class PartWriter:
    """Writes finished videos to ``<output_dir>/parts``, each to a part of its own.

    Args:
        output_dir: folder of the evaluation.
        run: key of the evaluation, as in its ``run.json``.
    """

    def __init__(self, output_dir: str | Path, run: str = "") -> None:
        self.folder = parts_folder(output_dir)
        self.run = run
        self.num_videos = 0

    def append(self, video_id: int, predictions: Iterable[dict[str, Any]]) -> None:
        """Write one video; it replaces an earlier part of the same video.

        Raises:
            ResultsWriteError: the disk is full, say; the parts before are untouched and nothing half-written stays.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.folder / f"video_{video_id}.jsonl") as file:
                _write_part(file, {"video_id": video_id, "run": self.run}, predictions)
        except OSError as error:
            kept = f"All videos finished so far are kept in {self.folder}; evaluating again continues after them."
            raise ResultsWriteError(explain(error, f"video {video_id} cannot be written", kept)) from error
        self.num_videos += 1

    def close(self) -> None:
        """Nothing is open between two videos."""


def _write_part(file: BinaryIO, header: dict[str, Any], predictions: Iterable[dict[str, Any]]) -> None:
    digest = hashlib.sha256()
    count = -1
    for count, entry in enumerate(_chain(header, predictions)):  # noqa: B007  (the number of predictions, at the end)
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        digest.update(line)
        file.write(line)
    file.write(json.dumps({"predictions": count, "sha256": digest.hexdigest()}).encode() + b"\n")


def _chain(header: dict[str, Any], predictions: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield header
    yield from predictions


def read_part(path: Path) -> Iterator[bytes]:
    """The lines of a part: its header, then each prediction. The sum is checked after the last one.

    Raises:
        DamagedPart: it is not whole, or not what was written.
    """
    digest = hashlib.sha256()
    count = -1
    with open(path, "rb") as file:
        line = file.readline()
        while following := file.readline():
            digest.update(line)
            count += 1
            yield line
            line = following
    try:
        trailer = json.loads(line)
        whole = (trailer["predictions"], trailer["sha256"]) == (count, digest.hexdigest())
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedPart(
            f"{path} is damaged: it is not what was written there. Evaluate again: all other videos are kept, this one "
            "is computed anew."
        )


def part_header(path: Path) -> dict[str, Any]:
    """The ``video_id`` and ``run`` of a part, all of whose bytes were checked.

    Raises:
        DamagedPart: see ``read_part``, or it is the part of another video.
    """
    lines = read_part(path)
    header = _json(next(lines, b""), path)
    for _ in lines:
        pass
    match = _PART.match(path.name)
    if match is None or header.get("video_id") != int(match.group(1)):
        raise DamagedPart(f"{path} is damaged: it holds video {header.get('video_id')}.")
    return header


def _json(line: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DamagedPart(f"{path} is damaged: {error}. Delete it and evaluate again.") from error
    if not isinstance(content, dict):
        raise DamagedPart(f"{path} is damaged: a line is {type(content).__name__}. Delete it and evaluate again.")
    return content


def iter_parts(folder: str | Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The videos of an evaluation by ascending id: ``(video id, predictions)``, read one by one.

    Args:
        folder: the folder with the parts, or the folder of the evaluation above it.

    Raises:
        FileNotFoundError: there are no parts.
        ValueError: a part or ``run.json`` is damaged.
    """
    folder = Path(folder)
    if not part_files(folder) and not (folder / RUN_FILE).is_file():
        folder = parts_folder(folder)
    for video_id, path in _parts_of_run(folder).items():
        yield video_id, list(_predictions(path))


def _predictions(path: Path) -> Iterator[dict[str, Any]]:
    lines = read_part(path)
    next(lines, None)  # the header
    for line in lines:
        yield _json(line, path)


def _parts_of_run(folder: Path) -> dict[int, Path]:
    """The parts of the evaluation that ``run.json`` names; others, left by a killed process, are passed over."""
    files = part_files(folder)
    if not files and not (folder / RUN_FILE).is_file():
        raise FileNotFoundError(
            f"{folder}: no parts (video_7.jsonl ...). An evaluation writes them to OUTPUT_DIR/inference/parts, one per "
            "finished video; give that folder, or a results.json."
        )
    run = run_key(folder)
    chosen = {video_id: path for video_id, path in files.items() if _run_of(path) == run}
    if len(chosen) < len(files):
        logger.warning("%s: %d parts of another evaluation are passed over", folder, len(files) - len(chosen))
    return chosen


def _run_of(path: Path) -> Any:
    with open(path, "rb") as file:
        return _json(file.readline(), path).get("run", "")


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


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; call it while nobody writes there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


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
        raise ResultsWriteError(explain(error, f"{path} cannot be written", "An earlier file stays.")) from error


def compose_results(output_dir: str | Path) -> tuple[Path, int, int]:
    """Write ``<output_dir>/results.json`` from the parts, ordered by video, atomically.

    Only the four keys of the submission format are written (``track_id`` stays in the parts).

    Returns:
        The path, the number of videos in the parts, and the number of predictions.

    Raises:
        ResultsWriteError: the file cannot be written; the parts stay, and so does an earlier results.json.
        FileNotFoundError, ValueError: see ``iter_parts``.
    """
    path = Path(output_dir) / "results.json"
    folder = parts_folder(output_dir)
    parts = _parts_of_run(folder)
    predictions = 0
    try:
        with atomic_file(path) as file:
            file.write(b"[")
            for part in parts.values():
                for entry in _predictions(part):
                    submitted = json.dumps({key: entry[key] for key in RESULT_KEYS})
                    file.write((b",\n" if predictions else b"\n") + submitted.encode())
                    predictions += 1
            file.write(b"\n]\n")
    except FileNotFoundError:
        raise
    except OSError as error:
        kept = f"The results of all finished videos are kept in {folder}; evaluating again only composes them."
        raise ResultsWriteError(explain(error, f"{path} cannot be written", kept)) from error
    return path, len(parts), predictions


def explain(error: OSError, what: str, kept: str) -> str:
    """What could not be done, why in the user's words, and what is kept."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EFBIG: "files may not become that large here (ulimit -f)",
        errno.EACCES: "the folder is not writable; choose another OUTPUT_DIR or change its permissions",
        errno.EROFS: "the file system is read-only; choose another OUTPUT_DIR",
    }
    return f"{what}: {reasons.get(error.errno or 0, str(error))}. {kept}"
