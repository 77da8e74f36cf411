"""Is B better than A? AP, AP50, AR10 and HOTA of two result files, differences and 95 % intervals over the videos."""

from __future__ import annotations

import argparse
import logging
import sys

from vis.evaluation import NoGroundTruth, write_json
from vis.evaluation.compare import compare_tracks
from vis.evaluation.track_metrics import DEFAULT_SCORE
from vis.evaluation.ytvis_eval import read_tracks
from vis.evaluation.ytvis_io import load_ground_truth

_EPILOG = """\
The interval is that of a paired bootstrap over the videos: it says how much the difference hangs on which videos there
are, not how much two trainings of the same configuration differ.

exit status: 0 compared; 1 an input is missing, wrong or does not fit the others; 2 wrong usage; 3 the ground truth has
no annotations.

examples:
  python tools/compare_results.py base/results.json mine/results.json --gt datasets/ovis/annotations_train_minival.json
  python tools/compare_results.py a.json b.zip --gt gt.json --bootstrap 10000 --seed 1 --json difference.json
"""


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="results.json, a zip that holds it, or a folder of part files")
    parser.add_argument("b", metavar="B", help="the same; positive differences mean that this one is better")
    parser.add_argument("--gt", required=True, help="ground truth, a YouTube-VIS json with annotations")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--track-score",
        type=float,
        default=DEFAULT_SCORE,
        metavar="S",
        help="tracks of lower score are left out of HOTA (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers here (fractions; null: nothing to measure)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        truth = load_ground_truth(args.gt)
        a, b = (read_tracks(truth, path)[0] for path in (args.a, args.b))
        found = compare_tracks(truth, a, b, bootstrap=args.bootstrap, seed=args.seed, score_threshold=args.track_score)
        if args.json:
            write_json(args.json, {"gt": args.gt, "results": [args.a, args.b], **found.as_dict()})
    except NoGroundTruth as error:
        print(f"nothing to compare by: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"A: {args.a}\nB: {args.b}\n{found.num_videos} videos, {found.bootstrap} draws, seed {found.seed}; percent:")
    print(found.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
