"""The report: reads ground truth and results, measures them and writes one html file (``vis.visualization.report``)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from vis.engine.report_numbers import HELP, error_rows, number_groups
from vis.evaluation.error_breakdown import ErrorBreakdown, error_breakdown
from vis.evaluation.result_files import iter_results
from vis.evaluation.results_writer import atomic_file
from vis.evaluation.track_iou import frame_intersections
from vis.evaluation.track_metrics import TrackMetrics, track_metrics
from vis.evaluation.ytvis_eval import YTVISResult, evaluate_tracks
from vis.evaluation.ytvis_io import (
    GroundTruth,
    GroundTruthError,
    Track,
    Tracks,
    check_results,
    load_ground_truth,
)
from vis.visualization.report import (
    Coverage,
    ReportTrack,
    ReportVideo,
    ReportWriter,
    cover,
    picture_readers,
    video_name,
)

logger = logging.getLogger(__name__)

MOST_VIDEOS = 100
MOST_RUNS = 2
FRAMES_PER_VIDEO = 36
MAX_MB = 20.0
SCORE_THRESHOLD = 0.3
_LOG_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class ReportOptions:
    """What a report is to show.

    Attributes:
        image_root: the folder that the json's ``file_names`` are relative to; None: masks on grey.
        videos: how many, the worst first; None: all, up to 100.
        frames_per_video: pictures of a video, at most; the worst frame is always among them.
        max_mb: size of the file in 10^6 bytes, at most.
        score_threshold: tracks below it are not shown, and not counted by the track metrics.
        names: of the runs; empty: from the paths of their files.
        date: shown in the head; None: the time of the newest input, so that equal inputs give equal bytes.
    """

    image_root: str | Path | None = None
    videos: int | None = None
    frames_per_video: int = FRAMES_PER_VIDEO
    max_mb: float = MAX_MB
    score_threshold: float = SCORE_THRESHOLD
    names: Sequence[str] = ()
    date: str | None = None


Entry = tuple[Any, Any, Any]
"""Video id, category id and, where there is one, the number of the track of a prediction."""


@dataclass
class Run:
    """One result file, measured.

    Attributes:
        shown: the tracks of each video that the report shows.
        best_score: of all its predictions.
        silent: videos of which it has no prediction.
    """

    name: str
    path: Path
    result: YTVISResult
    metrics: TrackMetrics
    errors: ErrorBreakdown
    shown: dict[int, list[tuple[ReportTrack, Track]]]
    best_score: float
    silent: int
    coverage: dict[int, Coverage] = field(default_factory=dict)


def write_report(
    gt: str | Path, results: Sequence[str | Path], output: str | Path, options: ReportOptions | None = None
) -> Path:
    """Write a report.

    Args:
        gt: a YouTube-VIS json with annotations.
        results: one or two result files (a ``results.json``, a zip that holds one, or a folder of parts).
        output: the html file; its folder must exist. It appears whole or not at all.
        options: what to show.

    Raises:
        FileNotFoundError: a file or folder is not there, or there is not one picture under the image root.
        ValueError: a file is not in the format or does not belong to the other (``GroundTruthError``,
            ``NoGroundTruth``, ``ResultsError``), or so many videos do not fit the size.
        OSError: the file cannot be written.
    """
    options = options or ReportOptions()
    output = Path(output)
    _check_arguments(results, output, options)
    content, truth = _read_truth(Path(gt))
    objects = _objects(content, truth)
    del content["annotations"]  # the tracks hold the same in a third of the memory
    names = list(options.names) or _names([Path(path) for path in results])
    runs = [
        _measure(Path(path), name, truth, options.score_threshold) for path, name in zip(results, names, strict=True)
    ]
    for video, (_, _, length) in truth.videos.items():
        for run in runs:
            run.coverage[video] = _cover(objects[video], run.shown.get(video, []), length)
    chosen = _worst_first(truth, runs)[: options.videos or MOST_VIDEOS]
    entries = {video["id"]: video for video in content["videos"]}
    readers = picture_readers([(entries[video], truth.videos[video]) for video in chosen], options.image_root)
    summary = _summary(Path(gt), truth, runs, options, len(chosen))
    with atomic_file(output) as file:
        writer = ReportWriter(
            file,
            summary,
            videos=len(chosen),
            frames_per_video=options.frames_per_video,
            max_bytes=int(options.max_mb * 1e6),
        )
        said = time.monotonic()
        for count, video in enumerate(chosen, start=1):
            height, width, length = truth.videos[video]
            writer.add(
                ReportVideo(
                    number=video,
                    name=video_name(entries[video]),
                    height=height,
                    width=width,
                    length=length,
                    truth=[item for item, _ in objects[video]],
                    runs=[[item for item, _ in run.shown.get(video, [])] for run in runs],
                    coverage=[run.coverage[video] for run in runs],
                    read=readers.get(video),
                )
            )
            if time.monotonic() - said > _LOG_EVERY_SECONDS:
                said = time.monotonic()
                logger.info("%d of %d videos", count, len(chosen))
        writer.finish()
    return output


def _check_arguments(results: Sequence[str | Path], output: Path, options: ReportOptions) -> None:
    if not 1 <= len(results) <= MOST_RUNS:
        raise ValueError(f"a report shows one run or two side by side, not {len(results)}; make one report per pair")
    if options.names and len(options.names) != len(results):
        raise ValueError(f"{len(options.names)} names for {len(results)} result files; give one name for each")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent.absolute()} of the output does not exist; make it first")
    if output.is_dir():
        raise ValueError(f"the output {output} is a folder; name a file in it, {output / 'report.html'}")
    if options.image_root is not None and not Path(options.image_root).is_dir():
        raise FileNotFoundError(
            f"the image root {options.image_root} is not a folder; it is what the json's file_names are relative to. "
            "Without pictures: leave it out"
        )


def _read_truth(path: Path) -> tuple[dict[str, Any], GroundTruth]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise GroundTruthError(f"{path}: not a json file ({error}). Was it cut off while it was written?") from error
    try:
        truth = load_ground_truth(content)
    except GroundTruthError as error:
        raise GroundTruthError(f"{path}: {error}") from error
    for video, size in truth.videos.items():
        if not all(type(number) is int for number in (video, *size)) or min(size) < 1:
            raise GroundTruthError(
                f"{path}: video {video!r} has height, width and length {size}, expected whole numbers above 0 (and a "
                "whole number as its id). `python tools/check_dataset.py` lists every problem."
            )
    return content, truth


def _measure(path: Path, name: str, truth: GroundTruth, threshold: float) -> Run:
    order: list[Entry] = []
    found = check_results(_noting(iter_results(path), order), truth, str(path))
    shown = _shown(order, found, truth, threshold)
    best = max((track.score for tracks in found.values() for track in tracks), default=0.0)
    logger.info(
        "%s: %d predictions, %d tracks shown (score >= %g)",
        path, len(order), sum(map(len, shown.values())), threshold,
    )  # fmt: skip
    return Run(
        name=name,
        path=path,
        result=evaluate_tracks(truth, found),
        metrics=track_metrics(truth, found, score_threshold=threshold),
        errors=error_breakdown(truth, found),
        shown=shown,
        best_score=best,
        silent=len(set(truth.videos) - {video for video, _ in found}),
    )


def _noting(entries: Iterable[Any], order: list[Entry]) -> Iterator[Any]:
    """The entries as they come; what the tracks made of them lose is noted: their order, and the number of a track."""
    for entry in entries:
        if isinstance(entry, Mapping):
            order.append((entry.get("video_id"), entry.get("category_id"), entry.get("track_id")))
        yield entry


def _objects(content: Mapping[str, Any], truth: GroundTruth) -> dict[int, list[tuple[ReportTrack, Track]]]:
    """Objects and crowds of every video in the order of the file; objects are numbered from 1, crowds are 0."""
    objects: dict[int, list[tuple[ReportTrack, Track]]] = {video: [] for video in truth.videos}
    taken: Counter[tuple[int, int]] = Counter()
    number: Counter[int] = Counter()
    for annotation in content["annotations"]:
        key = video, category = annotation["video_id"], annotation["category_id"]
        track = truth.tracks[key][taken[key]]
        taken[key] += 1
        number[video] += not track.ignore
        shown = ReportTrack(
            number=0 if track.ignore else number[video],
            name=truth.categories[category],
            codes=track.codes,
            areas=track.areas,
            crowd=track.ignore,
        )
        objects[video].append((shown, track))
    return objects


def _shown(
    order: Sequence[Entry], found: Tracks, truth: GroundTruth, threshold: float
) -> dict[int, list[tuple[ReportTrack, Track]]]:
    """Of each track of a video the class of the highest score, if that reaches the threshold, best first.

    Methods report one query with several classes. A ``track_id`` beside the keys of the format says which entries are
    one track; without it, those that have the same masks are, and they are numbered in the order of the file.
    """
    best: dict[int, dict[Any, tuple[ReportTrack, Track]]] = defaultdict(dict)
    taken: Counter[tuple[int, int]] = Counter()
    for video, category, given in order:
        track = found[video, category][taken[video, category]]
        taken[video, category] += 1
        known = best[video]
        same: Any = given if type(given) is int else (track.codes.text, track.codes.ends.tobytes())
        number = given if type(given) is int else known[same][0].number if same in known else len(known)
        if same in known and known[same][1].score >= track.score:
            continue
        known[same] = (
            ReportTrack(number, truth.categories[category], track.codes, track.areas, score=track.score),
            track,
        )
    return {
        video: sorted((pair for pair in tracks.values() if pair[1].score >= threshold), key=lambda pair: -pair[1].score)
        for video, tracks in best.items()
    }


def _cover(
    objects: Sequence[tuple[ReportTrack, Track]], tracks: Sequence[tuple[ReportTrack, Track]], length: int
) -> Coverage:
    shared = np.zeros((len(tracks), len(objects), length), np.int64)
    if objects and tracks:
        shared = frame_intersections([track for _, track in tracks], [track for _, track in objects])
    return cover([item for item, _ in objects], [item for item, _ in tracks], shared)


def _worst_first(truth: GroundTruth, runs: Sequence[Run]) -> list[int]:
    """Videos by the quality of the first run; those with nothing to see in any run come last."""

    def key(video: int) -> tuple[float, ...]:
        values = [run.coverage[video].quality for run in runs]
        return (*(2.0 if math.isnan(value) else value for value in values), float(video))

    return sorted(truth.videos, key=key)


def _names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many folders before them as it takes to tell them apart."""
    for count in range(1, 1 + max(len(path.absolute().parts) for path in paths)):
        names = ["/".join(path.absolute().parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({index})" for index, path in enumerate(paths, start=1)]


def _summary(gt: Path, truth: GroundTruth, runs: Sequence[Run], options: ReportOptions, chosen: int) -> dict[str, Any]:
    """What the head and the tables of the page show."""
    objects = Counter(dict.fromkeys(truth.categories, 0))
    for (_, category), tracks in truth.tracks.items():
        objects[category] += sum(not track.ignore for track in tracks)
    times = [max(path.stat().st_mtime for path in _files(path)) for path in (gt, *(run.path for run in runs))]
    date = options.date or datetime.fromtimestamp(max(times), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    facts: list[dict[str, Any]] = [{"label": "Ground truth", "value": gt.name, "hash": _digest(gt)}]
    for index, run in enumerate(runs):
        label = f"Run {chr(65 + index)}" if len(runs) > 1 else "Results"
        facts.append({"label": label, "value": run.name, "hash": _digest(run.path), "run": index})
    facts += [
        {"label": "Videos", "value": str(len(truth.videos))},
        {"label": "Objects", "value": str(sum(objects.values()))},
        {"label": "Tracks shown", "value": f"score \u2265 {options.score_threshold:g}"},
        {"label": "Date", "value": date},
    ]
    return {
        "title": f"{' against '.join(run.name for run in runs)} on {gt.name}",
        "facts": facts,
        "notes": _notes(truth, runs, options, chosen),
        "runs": [{"name": run.name} for run in runs],
        "threshold": options.score_threshold,
        "groups": number_groups(
            [run.result for run in runs], [run.metrics for run in runs], [run.coverage.values() for run in runs]
        ),
        "errors": error_rows([run.errors for run in runs]),
        "classes": [
            {
                "name": name,
                "objects": objects[category],
                "values": [_percent(run.result.per_class[name]) for run in runs],
            }
            for category, name in truth.categories.items()
        ],
        "total": len(truth.videos),
        "help": [[term, text.format(threshold=options.score_threshold)] for term, text in HELP],
    }


def _notes(truth: GroundTruth, runs: Sequence[Run], options: ReportOptions, chosen: int) -> list[str]:
    notes = []
    if options.image_root is None:
        notes.append("No image root was given, so the masks are drawn on grey.")
    if chosen < len(truth.videos):
        notes.append(f"Shown are the {chosen} worst of {len(truth.videos)} videos; the numbers are of all of them.")
    for run in runs:
        if run.silent:
            notes.append(f"{run.name}: no prediction for {run.silent} of {len(truth.videos)} videos.")
        if run.result.num_results and not any(run.shown.values()):
            notes.append(
                f"{run.name}: no track reaches the score {options.score_threshold:g} (the best has "
                f"{run.best_score:.3f}), so none is shown; a lower threshold shows more."
            )
    return notes


def _percent(value: float) -> float | None:
    return round(value * 100, 3) if value >= 0 else None


def _files(path: Path) -> list[Path]:
    """The files behind a path: itself, or the parts in a folder."""
    return sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the parts in a folder one after the other."""
    digest = hashlib.sha256()
    for part in _files(path):
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
