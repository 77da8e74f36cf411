"""Is B better than A? Differences of two result files on the same videos, with what chance the videos leave to them.

Paired bootstrap over videos (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16): the
videos of the ground truth are drawn with replacement, as many as there are, both files are measured on the same draw,
and the spread of the difference over many draws gives the interval. It covers the choice of the videos only: not the
random numbers of training, for which several runs must be compared. Few videos vary too little among themselves to
tell, so no interval is given where fewer than five have objects.

Masks are compared once. A draw then only changes how often each video counts, so that it is a cumulative sum with
weights; it gives the number that measuring the drawn videos afresh would give. (Only between predictions of exactly
equal score, whose order is arbitrary, is there a choice: all copies of one come before those of the next.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.ap_core import IOU_THRESHOLDS, Match, by_score, match
from vis.evaluation.ap_curve import average_precision
from vis.evaluation.track_iou import pairwise_iou
from vis.evaluation.track_metrics import DEFAULT_SCORE, NUM_COUNTS, has_objects, summarize, track_counts
from vis.evaluation.ytvis_io import GroundTruth, Track, Tracks

METRICS = ("AP", "AP50", "AR10", "HOTA")
"""What is compared; HOTA is that of ``track_metrics``, averaged over the classes."""

MIN_VIDEOS = 5
"""Videos with objects (of a class) below which no interval is given."""

_CHUNK = 250  # draws at a time, which bounds the memory
_AR_LIMIT = 10


@dataclass(frozen=True)
class Difference:
    """One number of two files; fractions, nan where there is nothing to measure.

    Attributes:
        a, b: the values on all videos.
        difference: b - a.
        low, high: 95 % interval of the difference (percentiles of the draws); nan with too few videos.
        p: how easily the draws contradict the sign: twice the smaller share of draws with a difference of >= 0 or of
            <= 0, at most 1; with n draws never below 2 / (n + 1). Small means that the sign does not hang on the choice
            of the videos. With many classes some are small by chance. nan as the interval.
        num_videos: videos that have objects (of the class).
        draws: draws in which the number exists (a class may be in none of the drawn videos).
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    num_videos: int
    draws: int


@dataclass(frozen=True)
class Comparison:
    """Two result files compared.

    Attributes:
        overall: metric (``METRICS``) -> difference.
        per_class: class -> metric -> difference.
        num_videos: videos of the ground truth.
        bootstrap, seed: number of draws and seed of the generator they come from.
        score_threshold: see ``track_metrics``; for HOTA alone.
    """

    overall: dict[str, Difference]
    per_class: dict[str, dict[str, Difference]]
    num_videos: int
    bootstrap: int
    seed: int
    score_threshold: float

    def as_dict(self) -> dict[str, Any]:
        """For a json file; null where there is nothing to measure."""
        content: dict[str, Any] = _without_nan(asdict(self))
        return content

    def table(self) -> str:
        """Text tables in percent: all metrics, then AP per class."""
        rows = {**self.overall, **{f"AP-{name}": each["AP"] for name, each in self.per_class.items()}}
        rows = {name: row for name, row in rows.items() if not np.isnan(row.difference)}
        wide = max(map(len, rows), default=0)
        lines = [f"{'':<{wide}} {'A':>8} {'B':>8} {'B - A':>8} {'videos':>6}   {'95 % interval':^19} {'p':>6}"]
        for name, row in rows.items():
            cells = f"{100 * row.a:8.3f} {100 * row.b:8.3f} {100 * row.difference:+8.3f} {row.num_videos:6d}"
            interval = f"[{100 * row.low:+8.3f}, {100 * row.high:+8.3f}] {row.p:6.3f}"
            lines.append(f"{name:<{wide}} {cells}   {interval if row.p == row.p else 'too few videos'}")
        return "\n".join(lines)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


@dataclass
class _Ranked:
    """The predictions (N,) of one class by falling score.

    Attributes:
        video: (N,) place of the video.
        hit, counted: (T, N) the prediction is right; it counts (is not ignored).
        early: (N,) among the first predictions of its video, those that AR measures.
    """

    video: NDArray[np.int64]
    hit: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    early: NDArray[np.bool_]


@dataclass
class _Side:
    """One result file, matched: its predictions per class and the counts of its tracks (V, K, NUM_COUNTS)."""

    ranked: list[_Ranked]
    counts: NDArray[np.float64]


def compare_tracks(
    gt: GroundTruth,
    a: Tracks,
    b: Tracks,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    score_threshold: float = DEFAULT_SCORE,
) -> Comparison:
    """Compare two loaded result files; the same arguments give the same numbers.

    Args:
        gt: as ``load_ground_truth`` gives it.
        a, b: as ``read_tracks`` gives them. Videos without predictions count as "nothing found".
        bootstrap: number of draws.
        seed: of the draws, 0 or positive.
        score_threshold: tracks below are left out of HOTA (not of AP).

    Raises:
        ValueError: ``bootstrap`` or ``seed`` is out of range.
    """
    if bootstrap < 1 or seed < 0:
        raise ValueError(f"expected at least 1 draw and a seed of 0 or more, found {bootstrap} draws and seed {seed}")
    videos = sorted(gt.videos)
    objects = np.array(
        [[sum(not t.ignore for t in gt.tracks.get((video, c), [])) for c in gt.categories] for video in videos], float
    )
    sides = [_side(gt, videos, tracks, score_threshold) for tracks in (a, b)]
    point_a, point_b = (_measure(side, objects, np.ones((1, len(videos))))[0] for side in sides)
    draws = np.concatenate(
        [
            _measure(sides[1], objects, weights) - _measure(sides[0], objects, weights)
            for weights in _weights(len(videos), bootstrap, seed)
        ]
    )
    # places: (metric, 0) overall, (metric, 1 + k) class k
    found = [
        {name: _difference(point_a[m, k], point_b[m, k], draws[:, m, k], shown) for m, name in enumerate(METRICS)}
        for k, shown in enumerate([(objects.sum(1) > 0).sum(), *(objects > 0).sum(0)])
    ]
    per_class = dict(zip(gt.categories.values(), found[1:], strict=True))
    return Comparison(found[0], per_class, len(videos), bootstrap, seed, score_threshold)


def _weights(num_videos: int, bootstrap: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each video is drawn, (B, V), a chunk of the draws at a time."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, bootstrap, _CHUNK):
        count = min(_CHUNK, bootstrap - start)
        drawn = rng.integers(0, num_videos, (count, num_videos))
        drawn += num_videos * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * num_videos).reshape(count, num_videos).astype(np.float64)


def _difference(a: float, b: float, draws: NDArray[np.float64], num_videos: int) -> Difference:
    draws = draws[~np.isnan(draws)]
    low = high = p = np.nan
    if num_videos >= MIN_VIDEOS and len(draws):
        low, high = np.percentile(draws, (2.5, 97.5)).tolist()
        least = min(int((draws >= 0).sum()), int((draws <= 0).sum()))
        p = min(1.0, 2 * (least + 1) / (len(draws) + 1))
    return Difference(float(a), float(b), float(b - a), low, high, p, int(num_videos), len(draws))


def _side(gt: GroundTruth, videos: Sequence[int], tracks: Tracks, score_threshold: float) -> _Side:
    place = {video: v for v, video in enumerate(videos)}
    column = {category: k for k, category in enumerate(gt.categories)}
    counts = np.zeros((len(videos), len(column), NUM_COUNTS))
    for (video, category), row in track_counts(gt, tracks, score_threshold=score_threshold).items():
        counts[place[video], column[category]] = row
    ranked = []
    for category in gt.categories:
        keys = [(video, category) for video in videos if tracks.get((video, category))]
        matches = [_match(tracks[key], gt.tracks.get(key, [])) for key in keys]
        ranked.append(_rank([place[video] for video, _ in keys], matches))
    return _Side(ranked, counts)


def _match(tracks: Sequence[Track], objects: Sequence[Track]) -> Match:
    """The matching behind AP, all sizes together: only crowds are ignored."""
    scores = np.array([track.score for track in tracks], np.float64)
    order = by_score(scores)
    crowd = np.array([track.ignore for track in objects], bool)
    ious = pairwise_iou([tracks[i] for i in order], objects) if objects else np.zeros((len(order), 0))
    none = np.zeros((1, len(order)), bool)
    return match(ious, scores[order], crowd=crowd, unwanted=crowd[None], outside=none)


def _rank(places: Sequence[int], matches: Sequence[Match]) -> _Ranked:
    counts = [len(each.scores) for each in matches]
    order = np.argsort(-np.concatenate([np.zeros(0), *(each.scores for each in matches)]), kind="stable")
    none = np.zeros((len(IOU_THRESHOLDS), 0), bool)
    hit = np.concatenate([none, *(each.matched[0] & ~each.ignored[0] for each in matches)], axis=1)
    counted = np.concatenate([none, *(~each.ignored[0] for each in matches)], axis=1)
    early = np.concatenate([np.zeros(0, bool), *(np.arange(count) < _AR_LIMIT for count in counts)])
    video = np.repeat(np.array(places, np.int64), counts)
    return _Ranked(video[order], hit[:, order], counted[:, order], early[order])


def _measure(side: _Side, objects: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """All numbers of one file on drawn videos.

    Args:
        objects: (V, K) objects per video and class.
        weights: (B, V) how often each video counts.

    Returns:
        (B, metrics, 1 + K): the mean over the classes, then each class; nan where there is nothing to measure.
    """
    num_objects = weights @ objects  # (B, K)
    by_class = np.full((len(weights), len(METRICS), objects.shape[1]), np.nan)
    for k, ranked in enumerate(side.ranked):
        ap, recall = _ap_and_recall(ranked, weights, num_objects[:, k])
        by_class[:, :3, k] = np.stack([ap.mean(1), ap[:, 0], recall.mean(1)], axis=1)
    counts = (weights @ side.counts.reshape(len(side.counts), -1)).reshape(len(weights), objects.shape[1], NUM_COUNTS)
    by_class[:, 3] = np.where(has_objects(counts), summarize(counts)["HOTA"], np.nan)
    exists = ~np.isnan(by_class)
    total = np.where(exists, by_class, 0.0).sum(2)
    overall = np.divide(total, exists.sum(2), out=np.full(total.shape, np.nan), where=exists.any(2))
    return np.concatenate([overall[..., None], by_class], axis=2)


def _ap_and_recall(
    ranked: _Ranked, weights: NDArray[np.float64], num_objects: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AP and AR10 of one class, each (B, T); nan where no object is drawn."""
    each = weights[:, ranked.video]  # (B, N)
    ap = np.full((len(weights), len(ranked.hit)), np.nan)
    recall = np.full(ap.shape, np.nan)
    exists = num_objects > 0
    upto: NDArray[np.float64] | None = None
    for t, (hit, counted) in enumerate(zip(ranked.hit, ranked.counted, strict=True)):
        if upto is None or not np.array_equal(counted, ranked.counted[t - 1]):  # without crowds it is computed once
            upto = np.cumsum(each * counted, axis=1)
        places = np.flatnonzero(hit)
        hits = np.cumsum(each[:, places], axis=1)
        ap[:, t] = average_precision(hits, upto[:, places] - hits, num_objects)
        found = each[:, hit & ranked.early].sum(1)
        recall[exists, t] = found[exists] / num_objects[exists]
    return ap, recall
