"""Writes the embedded synthetic data sets (YouTube-VIS format) into the data folder.

python datasets/prepare_synthetic.py                            # both presets, under $DETECTRON2_DATASETS or ./datasets
python datasets/prepare_synthetic.py --preset synthetic_ytvis --root /data --seed 1
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from vis.data.synthetic import PRESETS, generate


def main() -> int:
    """Generate what the command line asks for; 0 if all of it is on disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), action="append", help="default: all; may be repeated")
    parser.add_argument(
        "--root", default=os.environ.get("DETECTRON2_DATASETS", "datasets"), help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--train-videos", type=int, help="number of training videos, default: as the preset says")
    parser.add_argument("--val-videos", type=int, help="number of validation videos, default: as the preset says")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that was made with other arguments")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    wanted = {"train": args.train_videos, "val": args.val_videos}
    num_videos = {split: count for split, count in wanted.items() if count is not None}
    for preset in args.preset or sorted(PRESETS):
        start = time.monotonic()
        try:
            result = generate(preset, args.root, seed=args.seed, num_videos=num_videos, overwrite=args.overwrite)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        for split, info in result.items():
            classes = ", ".join(f"{name} {count}" for name, count in info["classes"].items())
            state = "written" if info["written"] else "was complete already"
            print(f"{preset} {split}: {info['videos']} videos, {info['frames']} frames, {info['instances']} instances")
            print(f"  classes: {classes}\n  {info['json_file']} ({state})")
        print(f"{preset}: {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
