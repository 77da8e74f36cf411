"""A report in one html file: numbers, classes, and the videos with their masks and identities, worst first.

``coverage`` compares tracks with objects, ``collect`` turns a video into what the page shows of it, ``html`` writes the
page from the files beside it. What is measured comes from above (``vis.engine.report``).
"""

from __future__ import annotations

from vis.visualization.report.collect import ReportVideo
from vis.visualization.report.coverage import Coverage, ReportTrack, cover
from vis.visualization.report.html import ReportWriter
from vis.visualization.report.sources import picture_readers, video_name

__all__ = ["Coverage", "ReportTrack", "ReportVideo", "ReportWriter", "cover", "picture_readers", "video_name"]
