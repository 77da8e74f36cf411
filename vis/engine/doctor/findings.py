"""What a check came to, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GOOD, NOTE, BAD = "ok", "note", "ERROR"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``GOOD``, ``NOTE`` (works, but a user would wonder) or ``BAD`` (does not work).
        what: was looked at.
        text: what was found.
        remedy: what to do, "" where nothing is.
    """

    level: str
    what: str
    text: str
    remedy: str = ""

    def lines(self) -> list[str]:
        """For the screen."""
        first, *rest = self.text.splitlines() or [""]
        lines = [f"{self.level:<6}{self.what + ':':<16}{first}", *(f"{'':<22}{line}" for line in rest)]
        return [*lines, *(f"{'':<20}> {line}" for line in self.remedy.splitlines())]


def good(what: str, text: str) -> Finding:
    """All is well."""
    return Finding(GOOD, what, text)


def note(what: str, text: str, remedy: str = "") -> Finding:
    """It works, but not as well as it could, or not as one may think."""
    return Finding(NOTE, what, text, remedy)


def bad(what: str, text: str, remedy: str = "") -> Finding:
    """It does not work."""
    return Finding(BAD, what, text, remedy)


def any_bad(findings: Iterable[Finding]) -> bool:
    """Whether something does not work."""
    return any(finding.level == BAD for finding in findings)
