"""What the evaluation servers take: a zip with ``results.json`` at its root.

The portals move and their links die, so :data:`BENCHMARKS` is the one place that says where results go, in words that a
search finds.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vis.evaluation.results_writer import ResultsWriteError, atomic_file, explain

ZIP_NAME = "submission.zip"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose ground truth is hidden.

    Attributes:
        pattern: of the names of the data sets that are submitted to it.
        page: where to look for its server.
    """

    pattern: str
    page: str


_YTVIS = "the challenge page of the YouTube-VIS benchmark (youtube-vos), which names its CodaLab or Codabench server"

BENCHMARKS = (
    Benchmark(r"ytvis_2019_(val|test)", f"{_YTVIS}: 'Video Instance Segmentation', edition 2019"),
    Benchmark(r"ytvis_2021_(val|test)", f"{_YTVIS}: edition 2021, or 2022, which contains the videos of 2021"),
    Benchmark(r"ytvis_2022_(val|test)", f"{_YTVIS}: edition 2022, short and long videos in one file"),
    Benchmark(r"(ytvis_)?ovis_(val|test)", "the challenge page of OVIS (Occluded Video Instance Segmentation)"),
)


def benchmark_of(dataset_name: str) -> Benchmark | None:
    """The benchmark that a data set's results are submitted to; None for any other data set."""
    return next((each for each in BENCHMARKS if re.fullmatch(each.pattern, dataset_name)), None)


def write_submission(results: str | Path) -> Path:
    """Write ``submission.zip`` beside a ``results.json``, which is at its root; equal results give equal bytes.

    Raises:
        ResultsWriteError: it cannot be written; ``results.json`` stays, and so does an earlier zip.
    """
    results = Path(results)
    path = results.with_name(ZIP_NAME)
    entry = zipfile.ZipInfo("results.json")  # dated 1980: the bytes do not depend on when it was made
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    entry.file_size = results.stat().st_size  # from which zipfile tells whether it needs its format for large files
    try:
        with (
            open(results, "rb") as source,
            atomic_file(path) as file,
            zipfile.ZipFile(file, "w", compresslevel=6) as archive,
            archive.open(entry, "w") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise ResultsWriteError(explain(error, f"{path} cannot be written", f"{results} is complete.")) from error
    return path
