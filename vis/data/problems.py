"""What is wrong with a data set: collected, not raised one at a time, so that a user mends everything in one go."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, and what was found, was expected, and is to be done."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class ProblemLog:
    """Collects errors (the data set is refused) and warnings (it is used, the named part is left out or unusual).

    Args:
        limit: how many of each are kept as text; the rest is only counted. None keeps all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.errors: list[Problem] = []
        self.warnings: list[Problem] = []
        self.error_count = 0
        self.warning_count = 0
        self._limit = limit

    def error(self, place: str, message: str) -> None:
        """Notes something the data set cannot be used with."""
        self.error_count += 1
        if self._limit is None or len(self.errors) < self._limit:
            self.errors.append(Problem(place, message))

    def warn(self, place: str, message: str) -> None:
        """Notes something that is tolerated."""
        self.warning_count += 1
        if self._limit is None or len(self.warnings) < self._limit:
            self.warnings.append(Problem(place, message))


def video_place(record: Mapping[str, Any]) -> str:
    """How messages name a video."""
    names = record["file_names"]
    folder = os.path.dirname(names[0]) or names[0] if names else ""
    return f"video {record['video_id']}" + (f" ({folder})" if folder else "")


class DatasetError(ValueError):
    """A data set that cannot be used.

    Attributes:
        json_file: the file.
        problems: the first problems.
        count: number of all problems.
    """

    def __init__(self, json_file: str, problems: Sequence[Problem], count: int, hint: str = "") -> None:
        self.json_file = json_file
        self.problems = list(problems)
        self.count = count
        lines = [f"{json_file}: {count} problem{'s' if count != 1 else ''} in this data set"]
        lines += [f"  - {problem}" for problem in self.problems[:SHOWN]]
        if count > len(lines) - 1:
            lines.append(f"  ... and {count - len(lines) + 1} more")
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))
