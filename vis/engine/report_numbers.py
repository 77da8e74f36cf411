"""The numbers of a report and what they mean, in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from vis.evaluation.error_breakdown import KINDS, ErrorBreakdown
from vis.evaluation.track_metrics import COUNT_NAMES, TrackMetrics
from vis.evaluation.ytvis_eval import NAMES, YTVISResult
from vis.visualization.report import Coverage

_AP_WORDS = {
    "AP": "average precision: mean over classes and the ten IoU thresholds 0.50 to 0.95, percent",
    "AP50": "average precision at the IoU threshold 0.50",
    "AP75": "average precision at the IoU threshold 0.75",
    "APs": "AP of small objects: mean area under 128\u00b2 pixels",
    "APm": "AP of medium objects: mean area from 128\u00b2 to 256\u00b2 pixels",
    "APl": "AP of large objects: mean area over 256\u00b2 pixels",
    "AR1": "average recall with the best prediction of each class in a video",
    "AR10": "average recall with the ten best predictions of each class in a video",
    "AR100": "average recall with the hundred best predictions of each class in a video",
    "ARs": "average recall of small objects",
    "ARm": "average recall of medium objects",
    "ARl": "average recall of large objects",
}
_TRACK_WORDS = {
    "HOTA": "higher order tracking accuracy: geometric mean of detection and association, percent",
    "DetA": "detection accuracy: are the objects found, frame by frame",
    "AssA": "association accuracy: does an object keep its identity",
    "LocA": "how well the masks fit that were found",
    "IDF1": "share of detections that carry the right identity over the whole video",
    "MOTA": "one minus misses, false masks and switches, over all masks of the ground truth",
    "IDSW": "identity switches: an object is covered by another track than before",
    "Frag": "how often an object is lost and found again",
}
_ERROR_WORDS = {
    "duplicate": "IoU high enough with an object that a prediction of higher score has",
    "wrong_class": "IoU high enough with an object of another class",
    "identity_switch": "good masks that follow several objects",
    "poor_mask": "IoU of at least 0.1 with an object of the class, but too low",
    "class_and_mask": "IoU of at least 0.1, but too low, with an object of another class",
    "background": "IoU under 0.1 with every object",
    "missed": "objects that no prediction finds, and that none would find if it were mended",
}
_LOWER_IS_BETTER = {"IDSW", "Frag", "missed", "false"}
_CARDS = {"AP", "AP50", "AR10", "HOTA", "AssA", "IDF1", "IDSW"}

HELP = (
    (
        "Video quality",
        "The IoUs of the matched pairs, summed, over the mean of the number of objects and the number of tracks of a "
        "video, in percent. A pair is an object and a track of the same class with a score of at least {threshold:g}; "
        "every track serves one object, assigned so that the sum of the spatio-temporal IoUs is largest. 100 only if "
        "every object is matched exactly and nothing else is there. The list begins with the lowest.",
    ),
    (
        "Missed, false",
        "An object is missed if its matched track has an IoU below 50; a track is false if it is not the match of an "
        "object that was found and does not lie on a crowd.",
    ),
    (
        "Verdict",
        "What became of a track. found: it is the match of an object, with an IoU of at least 50. duplicate, wrong "
        "class: its IoU with an object is that high, but another track is the match, or the class differs. partial: "
        "an IoU of 10 to 50, from poor masks, or because it follows an object for a part of the video only. "
        "background: less than that.",
    ),
    (
        "Colours",
        "A track wears the colour of the object that it covers in most frames; every other track has a colour of its "
        "own. They stay the same through the video, in every picture, row and table, and are shared by both runs.",
    ),
    (
        "Who is who",
        "One row for every object. A bar says which track covers it in a frame (mask IoU of at least 50, whatever its "
        "class); an object keeps its track as long as the two overlap. A triangle marks a switch to another track, a "
        "dashed red box frames in which nothing covers the object. The last row holds masks that cover no object.",
    ),
    (
        "Tracks shown",
        "Of each track the class of the highest score, if that is at least {threshold:g}. AP and AR count every "
        "prediction, the track metrics every prediction from {threshold:g} on.",
    ),
    (
        "Keys",
        "Left and right: frames. Space: play. Home and End: first and last frame. j and k: next and previous video. "
        "Escape: show all tracks again after one was picked out by a click on a mask or a row.",
    ),
)
"""Terms and explanations; ``threshold`` is to be filled in."""


def number_groups(
    results: Sequence[YTVISResult], metrics: Sequence[TrackMetrics], coverages: Sequence[Collection[Coverage]]
) -> list[dict[str, Any]]:
    """Groups of rows ``{name, help, digits, lower (is better), card, values: one per run or None}``.

    Args:
        results, metrics: of each run.
        coverages: of each run, those of all videos.
    """
    precision = [
        _row(name, _AP_WORDS[name], [_percent(result.stats[place]) for result in results])
        for place, name in enumerate(NAMES)
    ]
    tracking = [
        _row(name, words, [each.class_averaged[name] * (1 if name in COUNT_NAMES else 100) for each in metrics])
        for name, words in _TRACK_WORDS.items()
    ]
    threshold = metrics[0].score_threshold
    return [
        {"title": "Precision and recall", "rows": precision},
        {"title": f"Tracking, score \u2265 {threshold:g}, mean over classes", "rows": tracking},
        {"title": f"Videos, score \u2265 {threshold:g}", "rows": _video_rows(coverages)},
    ]


def error_rows(errors: Sequence[ErrorBreakdown]) -> list[dict[str, Any]]:
    """Kinds of errors: ``{name, help, lost: AP in percent per run, counts: errors at IoU 0.5 per run}``."""
    return [
        {
            "name": kind.replace("_", " "),
            "help": _ERROR_WORDS[kind],
            "lost": [round(100 * each.lost[kind], 3) for each in errors],
            "counts": [each.count50[kind] for each in errors],
        }
        for kind in KINDS
    ]


def _video_rows(coverages: Sequence[Collection[Coverage]]) -> list[dict[str, Any]]:
    quality, found, missed, false = [], [], [], []
    for videos in coverages:
        measured = [video.quality for video in videos if not math.isnan(video.quality)]
        quality.append(100 * sum(measured) / len(measured) if measured else None)
        found.append(float(sum(int(video.found.sum()) for video in videos)))
        missed.append(float(sum(int((~video.found).sum()) for video in videos)))
        false.append(float(sum(int(video.false.sum()) for video in videos)))
    return [
        _row("quality", "mean over the videos of their quality (see below), percent", quality),
        _row("found", "objects whose matched track has a spatio-temporal IoU of at least 0.5", found),
        _row("missed", "objects without such a track", missed),
        _row("false", "tracks that are not the match of a found object", false),
    ]


def _row(name: str, words: str, values: Sequence[float | None]) -> dict[str, Any]:
    counted = name in (*COUNT_NAMES, "found", "missed", "false")
    return {
        "name": name,
        "help": words,
        "digits": 0 if counted else 1,
        "lower": name in _LOWER_IS_BETTER,
        "card": name in _CARDS,
        "values": [None if value is None else round(value, 3) for value in values],
    }


def _percent(value: float) -> float | None:
    return value * 100 if value >= 0 else None
