"""Several result files of one data set made into one: different models, or one model at several test sizes.

The challenge reports that gained by it (2nd place of OVIS 2022: +0.58 AP by two test sizes, +0.91 by two methods; 1st
place of long videos of the 4th LSVOS challenge: +1.25) do not say how they did. Here finished tracks are fused, so that
it works for every method: embeddings of two models cannot be compared, masks can. Tracks of one class are paired
one-to-one by their spatio-temporal IoU. A fused score is the weighted mean over all files, a track that a file does not
have counting 0 there: with two equal files a track that stands alone keeps half of its score. Fused masks are the
weighted vote of the members on each pixel; where it is a draw the member with the largest weight times score decides,
so with two equal files the better scored track gives the masks.

Scores of different methods should be on one scale; weights are what there is to balance them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from vis.config import declare
from vis.evaluation.result_files import iter_results
from vis.evaluation.results_writer import ResultsWriteError, atomic_file, explain
from vis.evaluation.track_iou import pairwise_iou
from vis.evaluation.ytvis_io import (
    GroundTruth,
    GroundTruthError,
    NoGroundTruth,
    Track,
    Tracks,
    check_results,
    load_ground_truth,
)
from vis.structures import RLE
from vis.structures.rle import compress, run_lengths

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    # tools/multi_scale_test.py: short sides in pixels, whose results are fused. Options of the tool come first.
    cfg.TEST.MULTI_SCALE = node = type(cfg)()
    node.SIZES = []
    # One weight for each size; []: equal.
    node.WEIGHTS = []
    # Tracks of two sizes are one from this spatio-temporal IoU on.
    node.IOU = 0.5
    # Tracks kept of a video, the best; 0: all.
    node.MAX_NUM = 0


@dataclass(frozen=True)
class FusedTrack:
    """One track of the result.

    Attributes:
        score: weighted mean, see above.
        masks: per frame an RLE, None where there is no pixel.
        num_members: files that have the track.
    """

    score: float
    masks: list[RLE | None]
    num_members: int


@dataclass
class Fusion:
    """What came out.

    Attributes:
        videos: videos with a prediction in any file.
        by_members: number of files that have a track -> tracks.
        dropped: tracks beyond ``max_num``.
    """

    videos: int = 0
    by_members: Counter[int] = field(default_factory=Counter)
    dropped: int = 0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} in {members} of them" for members, count in sorted(self.by_members.items()))
        return f"{self.videos} videos, {self.by_members.total()} tracks ({counts or 'none'}), {self.dropped} dropped"


@dataclass
class _Cluster:
    """Tracks of different files that are one object: (file, track)."""

    members: list[tuple[int, Track]]


def load_videos(path: str | Path) -> GroundTruth:
    """Sizes of videos and names of categories of a YouTube-VIS json, which needs no annotations.

    Raises:
        FileNotFoundError: no such file.
        GroundTruthError: it is not in the format.
    """
    try:
        return load_ground_truth(path)
    except NoGroundTruth:
        content = json.loads(Path(path).read_bytes())
    try:
        videos = {
            video["id"]: (
                int(video["height"]),
                int(video["width"]),
                int(video["length"] if "length" in video else len(video["file_names"])),
            )
            for video in content["videos"]
        }
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
    except (KeyError, TypeError) as error:
        raise GroundTruthError(f"{path}: {type(error).__name__} {error}: a video or category lacks a key.") from error
    return GroundTruth(videos, categories, {})


def fuse_files(
    truth: GroundTruth,
    files: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    iou_threshold: float = 0.5,
    max_num: int | None = None,
) -> Fusion:
    """Fuse result files into ``output``, in the submission format.

    Masks stay run-length codes, none is ever decoded: memory is that of the files' codes.

    Args:
        truth: videos and categories that all of them belong to.
        files: results.json, a zip or a folder of part files each.
        weights: of the files; None: equal.
        iou_threshold: tracks are paired from this IoU on.
        max_num: tracks kept per video, the best scored; None: all.

    Raises:
        FileNotFoundError: no such file.
        ResultsError: a file is not in the format, or is of other videos or categories.
        ResultsWriteError: the output cannot be written.
        ValueError: the options make no sense.
    """
    shares = check_options(len(files), weights, iou_threshold, max_num)
    results = [check_results(iter_results(file), truth, str(file)) for file in files]
    _report_absent(files, results)
    fusion = Fusion()
    videos = fuse_results(results, shares, iou_threshold)
    write_entries(output, _entries(videos, max_num, fusion))
    logger.info("%s: %d files fused: %s", output, len(files), fusion)
    return fusion


def check_options(
    num_files: int, weights: Sequence[float] | None, iou_threshold: float, max_num: int | None
) -> list[float]:
    """The weight of each file.

    Raises:
        ValueError: an option makes no sense.
    """
    if num_files < 2:
        raise ValueError(f"{num_files} result file was given; an ensemble has two or more")
    chosen = [1.0] * num_files if weights is None else [float(weight) for weight in weights]
    if len(chosen) != num_files or not all(0 < weight < float("inf") for weight in chosen):
        raise ValueError(f"the weights are {chosen}; expected a positive number for each of {num_files} files")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"the IoU from which tracks are paired is {iou_threshold}, expected more than 0 and at most 1")
    if max_num is not None and max_num < 1:
        raise ValueError(f"{max_num} tracks per video are to be kept, expected 1 or more")
    return chosen


def fuse_results(
    results: Sequence[Tracks], weights: Sequence[float], iou_threshold: float
) -> Iterator[tuple[int, list[tuple[int, FusedTrack]]]]:
    """Videos by ascending id: ``(video id, [(category id, track), ...])``, best score first.

    A file without any prediction for a video has no say in it: scores there are means over the other files.
    """
    categories: dict[int, set[int]] = {}
    for tracks in results:
        for video, category in tracks:
            categories.setdefault(video, set()).add(category)
    for video in sorted(categories):
        has = [any((video, category) in tracks for category in categories[video]) for tracks in results]
        total = sum(weight for weight, here in zip(weights, has, strict=True) if here)
        fused = [
            (category, track)
            for category in sorted(categories[video])
            for track in fuse_tracks(
                [tracks.get((video, category), []) for tracks in results], weights, total, iou_threshold
            )
        ]
        yield video, sorted(fused, key=lambda entry: -entry[1].score)


def fuse_tracks(
    results: Sequence[Sequence[Track]], weights: Sequence[float], total: float, iou_threshold: float
) -> list[FusedTrack]:
    """Tracks of one video and one class, of each file.

    Args:
        weights: of the files; total: sum of those that have a say in the video.
    """
    clusters: list[_Cluster] = []
    for file, tracks in enumerate(results):
        paired = pair(clusters, tracks, weights, iou_threshold)
        for row, track in enumerate(tracks):
            if row in paired:
                clusters[paired[row]].members.append((file, track))
            else:
                clusters.append(_Cluster([(file, track)]))
    return [_fuse(cluster, weights, total) for cluster in clusters]


def pair(
    clusters: Sequence[_Cluster], tracks: Sequence[Track], weights: Sequence[float], iou_threshold: float
) -> dict[int, int]:
    """Track -> cluster, one-to-one, with the largest sum of IoUs among those of at least ``iou_threshold``.

    The IoU with a cluster is the weighted mean of those with its members. Two tracks without a pixel are equal. Among
    equal masks the closest scores are paired, so that a file that is fused with itself is what comes out.
    """
    if not clusters or not tracks:
        return {}
    members = [member for cluster in clusters for member in cluster.members]
    iou = pairwise_iou([track for _, track in members], tracks)  # (members, tracks)
    empty_members, empty = (
        np.array([not each.areas.any() for each in group]) for group in ([track for _, track in members], tracks)
    )
    iou[np.ix_(empty_members, empty)] = 1.0
    share = np.array([weights[file] for file, _ in members])
    starts = np.cumsum([0, *(len(cluster.members) for cluster in clusters[:-1])])
    mean = np.add.reduceat(iou * share[:, None], starts) / np.add.reduceat(share, starts)[:, None]
    scores = np.add.reduceat(share * [track.score for _, track in members], starts) / np.add.reduceat(share, starts)
    apart = np.abs(scores[:, None] - [track.score for track in tracks])
    allowed = mean >= iou_threshold
    value = np.where(allowed, mean - 1e-6 * apart / (1 + apart), 0.0)
    rows, columns = linear_sum_assignment(value, maximize=True)
    return {int(column): int(row) for row, column in zip(rows, columns, strict=True) if allowed[row, column]}


def _fuse(cluster: _Cluster, weights: Sequence[float], total: float) -> FusedTrack:
    tracks = [track for _, track in cluster.members]
    share = np.array([weights[file] for file, _ in cluster.members])
    scores = np.array([track.score for track in tracks])
    # from the first on, so that equal scores stay what they are to the last digit
    mean = float(scores[0] + (share * (scores - scores[0])).sum() / share.sum())
    complete = np.isclose(share.sum(), total, rtol=1e-12)
    score = mean if complete else mean * float(share.sum() / total)
    return FusedTrack(score, vote(tracks, share, int(np.argmax(share * scores))), len(tracks))


def vote(tracks: Sequence[Track], weights: NDArray[np.float64], leader: int) -> list[RLE | None]:
    """Masks (T) of what more than half of the weights say of each pixel; at exactly half the leader decides."""
    half = float(weights.sum()) / 2
    margin = 1e-9 * half
    decides = [i for i, weight in enumerate(weights) if weight > half + margin]
    if weights[leader] >= half - margin:
        decides = [leader]
    if decides:
        return [_text(code) for code in tracks[decides[0]].codes]
    return [
        _vote_frame([track.codes[frame] for track in tracks], tracks[0].codes.size, weights, leader, half, margin)
        for frame in range(len(tracks[0].codes))
    ]


def _vote_frame(
    codes: Sequence[dict[str, Any] | None],
    size: tuple[int, int],
    weights: NDArray[np.float64],
    leader: int,
    half: float,
    margin: float,
) -> RLE | None:
    # The votes change only where a run of some mask begins or ends: no mask is ever decoded.
    places, steps, led = [], [], []
    for member, (code, weight) in enumerate(zip(codes, weights, strict=True)):
        if code is not None:
            ends = np.cumsum(run_lengths(code))
            up = np.tile([1, -1], len(ends) // 2)  # the object begins where background ends
            places.append(ends[: len(up)])
            steps.append(weight * up)
            led.append(up * (member == leader))
    if not places:
        return None
    place = np.concatenate(places)
    order = np.argsort(place, kind="stable")
    place, votes = place[order], np.cumsum(np.concatenate(steps)[order])
    leads = np.cumsum(np.concatenate(led)[order]) > 0
    settled = np.append(place[1:] != place[:-1], True)
    inside = ((votes > half + margin) | (leads & (votes >= half - margin)))[settled]
    borders = place[settled][inside != np.append(False, inside[:-1])]
    if not len(borders):
        return None
    runs = np.diff([0, *borders.tolist(), size[0] * size[1]]).tolist()
    return compress({"size": list(size), "counts": runs if runs[-1] else runs[:-1]})


def _text(code: dict[str, Any] | None) -> RLE | None:
    return None if code is None else {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def _report_absent(files: Sequence[str | Path], results: Sequence[Tracks]) -> None:
    videos = [{video for video, _ in tracks} for tracks in results]
    everywhere = set().union(*videos)
    for file, here in zip(files, videos, strict=True):
        if missing := sorted(everywhere - here):
            logger.warning(
                "%s has no prediction for %d of %d videos (ids %s): their scores are means over the other files",
                *(file, len(missing), len(everywhere), missing[:10]),
            )


def _entries(
    videos: Iterable[tuple[int, list[tuple[int, FusedTrack]]]], max_num: int | None, fusion: Fusion
) -> Iterator[dict[str, Any]]:
    """Predictions in the submission format; counts them."""
    for video, tracks in videos:
        fusion.videos += 1
        kept = tracks[:max_num]
        fusion.dropped += len(tracks) - len(kept)
        for category, track in kept:
            fusion.by_members[track.num_members] += 1
            yield {
                "video_id": video,
                "category_id": category,
                "score": track.score,
                "segmentations": track.masks,
            }


def write_entries(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write predictions one by one, atomically, making the folder.

    Raises:
        ResultsWriteError: it cannot be written; an earlier file stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            start = b"[\n"
            for entry in entries:
                file.write(start + json.dumps(entry).encode())
                start = b",\n"
            file.write(b"[]\n" if start == b"[\n" else b"\n]\n")
    except OSError as error:
        raise ResultsWriteError(explain(error, f"{path} cannot be written", "An earlier file stays.")) from error
