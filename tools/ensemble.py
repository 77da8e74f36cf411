"""Fuse result files of one data set: tracks of one class are paired by mask IoU, scores averaged, masks voted on."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from vis.evaluation import evaluate_ytvis
from vis.evaluation.ensemble import fuse_files, load_videos
from vis.evaluation.submission import write_submission

_EPILOG = """\
The reports of challenges that gained by an ensemble do not say how they fused; what is done here is in
vis/evaluation/ensemble.py. Scores of different methods should be on one scale: a result file can only be balanced by
its weight. Two sizes of one model: tools/multi_scale_test.py.

exit status: 0 fused; 1 an input is missing, wrong or does not fit the others; 2 wrong usage.

examples:
  python tools/ensemble.py minvis/results.json idol/results.json --gt-or-json datasets/ovis/annotations_valid.json \\
      --output ensemble/results.json --weights 1 1.2 --zip
  python tools/ensemble.py a.json b.json c.zip --gt-or-json gt.json --output fused.json --evaluate
"""


def main(argv: list[str] | None = None) -> int:
    """Fuse; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results.json, a zip or a folder of part files")
    parser.add_argument(
        "--gt-or-json", required=True, metavar="JSON", help="YouTube-VIS json of the videos; needs no annotations"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the fused results.json")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per file (default: equal)")
    parser.add_argument(
        "--iou", type=float, default=0.5, help="tracks are paired from this IoU on (default: %(default)s)"
    )
    parser.add_argument("--max-num", type=int, metavar="N", help="keep the N best tracks of a video (default: all)")
    parser.add_argument("--evaluate", action="store_true", help="print AP of every file and of the fused one")
    parser.add_argument("--zip", action="store_true", help="write submission.zip beside the output")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        if Path(args.output).resolve() in [Path(file).resolve() for file in args.results]:
            raise ValueError(f"{args.output} is one of the files to fuse: name another --output")
        fusion = fuse_files(
            load_videos(args.gt_or_json),
            args.results,
            args.output,
            weights=args.weights,
            iou_threshold=args.iou,
            max_num=args.max_num,
        )
        print(f"{args.output}: {fusion}")
        if args.zip:
            print(write_submission(args.output))
        for file in [*args.results, args.output] if args.evaluate else []:
            print(f"AP {evaluate_ytvis(args.gt_or_json, file).percent()['AP']:.2f}  {file}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
