"""One html file that shows how good results are: numbers, classes, and the videos with masks and identities, worst
first; one run, or two side by side. It opens in any browser, without a network, a server or a model."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from vis.engine.report import FRAMES_PER_VIDEO, MAX_MB, MOST_VIDEOS, SCORE_THRESHOLD, ReportOptions, write_report
from vis.evaluation import NoGroundTruth

_EPILOG = """\
exit status: 0 the report was written; 1 an input is missing, wrong or does not fit the other; 2 wrong usage;
3 the ground truth has no annotations (tools/demo.py draws results without them).

examples:
  python tools/report.py --gt train.json --results output/inference/results.json --image-root train/JPEGImages
  python tools/report.py --gt gt.json --results a.json --results b.json --names baseline longer --image-root JPEGImages
  python tools/report.py --gt gt.json --results a.json --videos 30 --frames-per-video 12 --max-mb 5 --output small.html
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--gt", required=True, metavar="FILE", help="ground truth, a YouTube-VIS json with annotations")
    add("--results", required=True, action="append", metavar="FILE",
        help="results.json, a zip that holds it, or a folder of parts; a second time for a second run")  # fmt: skip
    add("--image-root", metavar="DIR", help="the folder that the json's file names are relative to (else: grey)")
    add("--output", default="report.html", metavar="FILE", help="default: %(default)s")
    add("--videos", type=int, metavar="N", help=f"how many, worst first (default: all, up to {MOST_VIDEOS})")
    add("--frames-per-video", type=int, default=FRAMES_PER_VIDEO, metavar="K",
        help="pictures of a video, at most (default: %(default)s)")  # fmt: skip
    add("--max-mb", type=float, default=MAX_MB, metavar="M",
        help="size of the file, at most (default: %(default)g); pictures get smaller, then fewer")  # fmt: skip
    add("--score-threshold", type=float, default=SCORE_THRESHOLD, metavar="T",
        help="show tracks scored >= T (default: %(default)s)")  # fmt: skip
    add("--names", nargs="+", default=[], metavar="NAME", help="names of the runs (default: from their paths)")
    add("--date", metavar="TEXT", help="date in the head (default: that of the newest input)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold} is not between 0 and 1")
    for name in ("videos", "frames_per_video", "max_mb"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, found {value}")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    options = ReportOptions(
        image_root=args.image_root,
        videos=args.videos,
        frames_per_video=args.frames_per_video,
        max_mb=args.max_mb,
        score_threshold=args.score_threshold,
        names=args.names,
        date=args.date,
    )
    try:
        path = write_report(args.gt, args.results, args.output, options)
    except NoGroundTruth as error:
        print(f"no report: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
