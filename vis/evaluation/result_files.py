"""Reads results in the submission format wherever they are: a json, a zip, part files. One prediction at a time.

A ``results.json`` of a large data set is a list of gigabytes, so it is never in memory whole.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from vis.evaluation.results_writer import iter_parts

SHOWN = 20  # problems printed in full; the rest is counted

_CHUNK = 1 << 22  # characters read at a time
_SPACE = " \t\n\r"
_ENDS = (*_SPACE, ",", "]")  # what can stand behind a value


class ResultsError(ValueError):
    """The results are not in the submission format or do not belong to this ground truth; ``kind``: what in a word."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Skipped:
    """Predictions that were left out because they cannot be evaluated.

    Attributes:
        kinds: what was wrong -> how many predictions.
        first: the first of them, each with its place in the list and what is wrong with it.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All of them."""
        return self.kinds.total()

    def add(self, place: str, error: ResultsError) -> None:
        """One more."""
        self.kinds[error.kind] += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{place}: {error}")

    def as_dict(self) -> dict[str, Any]:
        """For a json file."""
        return {"total": self.total, "kinds": dict(self.kinds), "first": self.first}

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        more = [f"  ... and {self.total - len(self.first)} more"] * (self.total > len(self.first))
        return "\n".join([f"{self.total} ({kinds}):", *(f"  {line}" for line in self.first), *more])


def load_results(results: str | Path | Sequence[Any]) -> list[Any]:
    """The list of predictions from a ``results.json``, a zip that holds one, a folder of part files, or as it is.

    Raises:
        FileNotFoundError: no such file.
        ResultsError: the file cannot be read or does not hold a list.
    """
    return list(iter_results(results))


def iter_results(results: str | Path | Sequence[Any], skipped: Skipped | None = None) -> Iterator[Any]:
    """The same, one after another; a file is read while they are used.

    Args:
        results: as for :func:`load_results`.
        skipped: takes a json that ends too early: what stands before its end is given. None: it is an error.

    Raises:
        FileNotFoundError: no such file.
        ResultsError: the file cannot be read or does not hold a list; also after some predictions were given.
    """
    if not isinstance(results, (str, Path)):
        if not isinstance(results, list):
            raise _not_a_list("the results", results)
        yield from results
        return
    path = Path(results)
    if path.is_dir():
        for _, entries in iter_parts(path):
            yield from entries
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    elif path.suffix == ".zip":
        yield from _iter_zip(path, skipped)
    else:
        with open(path, encoding="utf-8-sig") as file:
            yield from _iter_json(file, str(path), skipped)


def _iter_zip(path: Path, skipped: Skipped | None) -> Iterator[Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if "results.json" not in archive.namelist():
                raise ResultsError(
                    f"{path}: expected results.json at the root of the zip, found {archive.namelist()[:5]}. "
                    "The servers accept no sub-folder either."
                )
            with archive.open("results.json") as data:
                yield from _iter_json(io.TextIOWrapper(data, "utf-8-sig"), f"{path}/results.json", skipped)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ResultsError(f"{path}: not a zip file, or a damaged one ({error}).") from error


def _iter_json(file: TextIO, where: str, skipped: Skipped | None) -> Iterator[Any]:
    """The elements of a list in a file."""
    text = _Text(file)
    count = 0
    try:
        if text.peek() != "[":
            raise _not_a_list(where, text.rest())
        text.at += 1
        closed = text.peek() == "]"
        while not closed:
            yield text.value()
            count += 1
            closed = text.separator() == "]"
        text.at += 1
        if text.peek():
            raise _Broken(f"something follows the list: {text.peek()!r}")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, _Broken) as error:
        cut = ResultsError(
            f"{where}: not a json file ({error}; after {count} whole predictions). Was it cut off while it was "
            "written?",
            "behind the end of a json that was cut off",
        )
        if skipped is None or not count:
            raise cut from error
        skipped.add(f"entry {count}", cut)


class _Broken(ValueError):
    """Not json."""


class _Text:
    """What is left of a file, read as far as the next value needs it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._buffer = ""
        self._decoder = json.JSONDecoder()
        self.at = 0

    def _more(self) -> bool:
        """Read on; each time as much again as is there, so that a long value is not parsed often."""
        added = self._file.read(max(_CHUNK, len(self._buffer) - self.at))
        self._buffer = self._buffer[self.at :] + added
        self.at = 0
        return bool(added)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self.at < len(self._buffer):
                if self._buffer[self.at] not in _SPACE:
                    return self._buffer[self.at]
                self.at += 1
            if not self._more():
                return ""

    def separator(self) -> str:
        """What follows a value: a comma, which is passed, or the list's end."""
        found = self.peek()
        if found not in (",", "]") or not found:
            raise _Broken(f"a comma or the end of the list is expected, found {found!r}")
        self.at += found == ","
        return found

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            open_ended = self._buffer[self.at] not in '{["' and self._buffer[end : end + 1] not in _ENDS
            if open_ended and self._more():
                continue  # a number goes on in what is not read yet
            self.at = end
            return value

    def rest(self) -> Any:
        """All that is left, as one value."""
        return json.loads(self._buffer[self.at :] + self._file.read())


def _not_a_list(where: str, content: Any) -> ResultsError:
    return ResultsError(
        f"{where}: expected a list of predictions [{{video_id, category_id, score, segmentations}}, ...], found "
        f"{kind_of(content)}. Give the results.json that an evaluation writes."
    )


def kind_of(value: Any) -> str:
    """A value of a json in words."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")
