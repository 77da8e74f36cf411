"""AP and AR of a results.json against a ground truth in the YouTube-VIS format, without a model."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vis.evaluation import NoGroundTruth, write_json
from vis.evaluation.ap_breakdown import join_short_and_long, with_long_videos
from vis.evaluation.ytvis_eval import YTVISResult, evaluate_tracks, read_tracks
from vis.evaluation.ytvis_io import GroundTruth, Tracks, load_ground_truth

_EPILOG = """\
exit status: 0 AP was computed; 1 an input is missing, wrong or does not fit the other; 2 wrong usage;
3 the ground truth has no annotations, so there is no AP (submit the results to the benchmark's server instead).

YouTube-VIS 2022 reports AP of short and of long videos, and their mean. What the long ones are is said by --gt-long,
--long-videos, --long-from, or by "long": true at the videos of --gt.

examples:
  python tools/evaluate.py --gt datasets/ovis/annotations_train.json --results output/inference/ovis_train/results.json
  python tools/evaluate.py --gt gt.json --results submission.zip --json ap.json --per-class
  python tools/evaluate.py --gt gt.json --results output/inference/ovis_train/parts     # of a run that did not end
  python tools/evaluate.py --gt gt_short.json --gt-long gt_long.json --results results.json    # YouTube-VIS 2022
  python tools/evaluate.py --gt gt.json --results results.json --track-metrics --errors    # why AP is what it is
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", required=True, help="ground truth, a YouTube-VIS json with annotations")
    parser.add_argument("--results", required=True, help="results.json, a zip that holds it, or a folder of part files")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here (fractions; -1: nothing to measure)")
    parser.add_argument("--per-class", action="store_true", help="print AP50, AP75 and AR of each category too")
    parser.add_argument("--track-metrics", action="store_true", help="HOTA, IDF1, MOTA and identity switches too")
    parser.add_argument("--errors", action="store_true", help="what kinds of errors cost how much AP")
    parser.add_argument("--require-all-videos", action="store_true", help="refuse results that lack videos of --gt")
    parser.add_argument(
        "--skip-invalid", action="store_true", help="leave out predictions that cannot be evaluated, and say which"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core, 8 at most)")
    parser.add_argument(
        "--length-bounds", type=int, nargs="+", metavar="N", help="AP of videos up to N frames, up to the next N ..."
    )
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--gt-long", metavar="GT", help="--gt has the short videos, this json the long ones")
    long.add_argument("--long-videos", metavar="FILE", help="ids or names of long videos: a json list, or one per line")
    long.add_argument("--long-from", type=int, metavar="N", help="videos of N frames and more are long")
    return parser.parse_args(argv)


def ground_truth(args: argparse.Namespace) -> GroundTruth:
    """The ground truth with its long videos."""
    truth = load_ground_truth(args.gt)
    if args.gt_long:
        return join_short_and_long(truth, load_ground_truth(args.gt_long))
    if args.long_videos:
        return with_long_videos(truth, read_names(Path(args.long_videos)))
    if args.long_from:
        long = [video for video, (_, _, length) in truth.videos.items() if length >= args.long_from]
        if not 0 < len(long) < len(truth.videos):
            raise ValueError(f"--long-from {args.long_from}: {len(long)} of {len(truth.videos)} videos are that long")
        return with_long_videos(truth, long)
    return truth


def read_names(path: Path) -> list[int | str]:
    """Ids or names of videos from a json list or from lines."""
    text = path.read_text(encoding="utf-8")
    names = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    return [int(name) if str(name).strip().isdigit() else str(name).strip() for name in names if str(name).strip()]


def explain(args: argparse.Namespace, truth: GroundTruth, tracks: Tracks) -> dict[str, Any]:
    """The other measures that are asked for, by name; each has ``table()`` and ``as_dict()``."""
    found: dict[str, Any] = {}
    if args.track_metrics:
        from vis.evaluation.track_metrics import track_metrics

        found["track_metrics"] = track_metrics(truth, tracks)
    if args.errors:
        from vis.evaluation.error_breakdown import error_breakdown

        found["errors"] = error_breakdown(truth, tracks)
    return found


def report(result: YTVISResult, others: dict[str, Any], *, per_class: bool) -> str:
    """Everything that is printed."""
    lines = [f"{result.num_results} predictions, {result.num_videos} videos; percent:", result.table()]
    if per_class:
        lines += ["", result.class_table()]
    for name, measured in others.items():
        lines += ["", f"{name.replace('_', ' ')}, percent:", measured.table()]
    if result.skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.skipped["kinds"].items())
        lines += ["", f"{result.skipped['total']} predictions were left out{': ' * bool(kinds)}{kinds}"]
    return "\n".join([*lines, result.copypaste()])


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        truth = ground_truth(args)
        tracks, skipped = read_tracks(
            truth, args.results, allow_missing=not args.require_all_videos, skip_invalid=args.skip_invalid
        )
        result = evaluate_tracks(truth, tracks, workers=args.workers, length_bounds=args.length_bounds)
        if args.skip_invalid:
            result = replace(result, skipped=skipped.as_dict())
        others = explain(args, truth, tracks)
        if args.json:
            write_json(args.json, {**result.as_dict(), **{name: each.as_dict() for name, each in others.items()}})
    except NoGroundTruth as error:
        print(f"no AP: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(result, others, per_class=args.per_class))
    return 0


if __name__ == "__main__":
    sys.exit(main())
