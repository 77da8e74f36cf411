"""AP and AR of a results.json against a ground truth in the YouTube-VIS format, without a model."""

from __future__ import annotations

import argparse
import logging
import sys

from vis.evaluation import NoGroundTruth, evaluate_ytvis, write_json

_EPILOG = """\
exit status: 0 AP was computed; 1 an input is missing, wrong or does not fit the other; 2 wrong usage;
3 the ground truth has no annotations, so there is no AP (submit the results to the benchmark's server instead).

examples:
  python tools/evaluate.py --gt datasets/ovis/annotations_train.json --results output/inference/ovis_train/results.json
  python tools/evaluate.py --gt gt.json --results submission.zip --json ap.json
  python tools/evaluate.py --gt gt.json --results output/inference/ovis_train/parts     # of a run that did not end
"""


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", required=True, help="ground truth, a YouTube-VIS json with annotations")
    parser.add_argument("--results", required=True, help="results.json, a zip that holds it, or a folder of part files")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here (fractions; -1: nothing to measure)")
    parser.add_argument("--require-all-videos", action="store_true", help="refuse results that lack videos of --gt")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        result = evaluate_ytvis(args.gt, args.results, allow_missing=not args.require_all_videos)
        if args.json:
            write_json(args.json, result.as_dict())
    except NoGroundTruth as error:
        print(f"no AP: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{result.num_results} predictions, {result.num_videos} videos; percent:\n{result.table()}")
    print(result.copypaste())
    return 0


if __name__ == "__main__":
    sys.exit(main())
