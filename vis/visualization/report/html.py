"""Writes the page: one file with everything in it, video by video."""

from __future__ import annotations

import base64
import hashlib
import html
import logging
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, BinaryIO

from vis.visualization.colors import track_color
from vis.visualization.report.collect import ReportVideo, dump, summary_row, video_block

SCRIPTS = ("report.js", "player.js", "timeline.js")
logger = logging.getLogger(__name__)

_MARK = "<!--videos-->"
_RESERVE = 2000
_LEAST = 4000  # bytes of a video: its numbers, and the outlines of a frame or two
_COLOURS = 40  # after so many track_color repeats itself


class ReportWriter:
    """Writes a report into a file that is open for writing.

    Only one video is in memory at a time. What is left of the limit is shared by the videos that are still to come.

    Args:
        file: takes bytes.
        summary: what the tables show, see ``vis.engine.report``; ``title`` is a text.
        videos: how many will be added.
        frames_per_video: pictures of a video, at most.
        max_bytes: size of the file, at most; a warning says where the numbers alone, without any picture, are more.

    Raises:
        ValueError: so many videos do not fit that size.
    """

    def __init__(
        self,
        file: BinaryIO,
        summary: Mapping[str, Any],
        *,
        videos: int,
        frames_per_video: int,
        max_bytes: int,
    ) -> None:
        self._file = file
        self._limit, self._written = max_bytes, 0
        self._summary = dict(summary)
        self._frames = frames_per_video
        self._left = videos
        self._rows: list[dict[str, Any]] = []
        head, self._tail = _template(str(summary["title"])).split(_MARK)
        self._room = max_bytes - len(head) - len(self._tail.encode()) - len(dump(self._summary)) - _RESERVE
        self._room -= 400 * videos  # their lines in the list
        if self._room < _LEAST * videos:
            raise ValueError(
                f"{videos} videos do not fit {max_bytes / 1e6:.1f} MB: a video takes {_LEAST // 1000} kB at least. "
                "Show fewer videos, or allow a larger file."
            )
        self._put(head.encode())

    def add(self, video: ReportVideo) -> None:
        """Add a video; the list begins with the order in which they are added."""
        block = video_block(video, frames=self._frames, budget=self._room // self._left)
        self._left -= 1
        self._room -= len(block)
        self._rows.append(summary_row(video))
        self._put(b'<script type="application/json" id="video-%d">' % video.number)
        self._put(block)
        self._put(b"</script>\n")

    def finish(self) -> None:
        """Write what comes behind the videos."""
        palette = ["#{:02x}{:02x}{:02x}".format(*track_color(number)) for number in range(_COLOURS)]
        content = dump({**self._summary, "videos": self._rows, "palette": palette}).decode("ascii")
        self._put(self._tail.replace("{{summary}}", content).encode())
        if self._written > self._limit:
            logger.warning(
                "The report has %.2f MB, more than the %.2f that were allowed: its numbers alone take so much. Show "
                "fewer videos, or only tracks of a higher score.", self._written / 1e6, self._limit / 1e6,
            )  # fmt: skip

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._written += len(data)


def _template(title: str) -> str:
    """The page with its style and script; what is left to fill is the summary and the videos.

    The policy lets run and apply only what is in this file, and load nothing.
    """
    folder = files(__package__)
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name, text in (("policy", policy), ("style", style), ("script", script), ("title", html.escape(title))):
        page = page.replace(f"{{{{{name}}}}}", text)
    return page


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
