"""Draws the tracks of a model, of a results file or of annotations: PNG frames, an mp4 and a contact sheet."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vis.visualization import (
    FrameError,
    FrameStream,
    Progress,
    VideoTrack,
    read_results,
    render_video,
    tracks_of_prediction,
    tracks_of_record,
    tracks_of_results,
    visible_tracks,
    write_results,
)

if TYPE_CHECKING:
    from vis.data import VideoDataset
    from vis.engine.predictor import VideoPredictor
    from vis.structures import VideoPrediction

logger = logging.getLogger("vis.demo")

EXAMPLES = """\
examples:
  a model on a video file (or a folder of frames, or a pattern in quotes):
    demo.py --config-file configs/minvis/ytvis19_r50.yaml --input street.mp4 --output out \\
        --opts MODEL.WEIGHTS model_final.pth
  the same pictures again from its results, without a model:
    demo.py --results out/results.json --input street.mp4 --output again
  results of an evaluation on a data set, two of its videos, beside the ground truth:
    demo.py --results results.json --dataset ytvis_2019_train --video 3 17 --side-by-side --output out
  the same with files instead of a name; without --results the ground truth alone is drawn:
    demo.py --results results.json --gt-json instances.json --image-root JPEGImages --output out

written: OUTPUT/frames/*.png, OUTPUT/overlay.mp4, OUTPUT/contact_sheet.png and, with a model, OUTPUT/results.json;
for videos of a data set in a folder OUTPUT/video_<id>. Exit status: 0 all well, 1 an input cannot be used (what was
written until then is kept), 2 wrong usage.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--config-file", metavar="FILE", help="yaml of the model; with --results only for its data sets and class names"
    )
    add(
        "--input",
        nargs="+",
        metavar="PATH",
        help="a folder of frames, a video file, a pattern in quotes, or picture files",
    )
    add("--output", required=True, metavar="DIR", help="folder to write to")
    add(
        "--confidence-threshold",
        type=float,
        default=0.3,
        metavar="T",
        help="draw tracks scored >= T (default %(default)s)",
    )
    add(
        "--results",
        metavar="FILE",
        help="draw these results (YouTube-VIS submission format) instead of running a model",
    )
    add("--dataset", metavar="NAME", help="the videos are those of this data set")
    add("--gt-json", metavar="FILE", help="the videos are those of this YouTube-VIS json; needs --image-root")
    add("--image-root", metavar="DIR", help="the folder that the json's file names are relative to")
    add("--video", nargs="+", type=int, metavar="ID", help="only these videos of the data set")
    add("--side-by-side", action="store_true", help="draw the ground truth to the left of the results")
    add("--classes", metavar="A,B,...", help="class names, in the order of the classes; default: those of the data set")
    add("--fps", type=float, default=10.0, help="frame rate of the mp4 where the input has none (default %(default)s)")
    add(
        "--scale",
        type=float,
        metavar="S",
        help="size of the pictures over that of the frames (default: 1, more if < 320 px wide)",
    )
    add("--boxes", action="store_true", help="draw boxes too")
    add("--no-frames", action="store_true", help="write no PNG frames")
    add("--no-video", action="store_true", help="write no mp4")
    add("--verbose", action="store_true", help="show where an error came from")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, after checks that need no file; exits with status 2 where they make no sense."""
    parser = build_parser()
    overrides = argv[argv.index("--opts") + 1 :] if "--opts" in argv else []
    # argparse would take these for overrides and then complain about something else, or about nothing.
    swallowed = [token for token in overrides if token.startswith("--")]
    if swallowed:
        parser.error(f"{', '.join(swallowed)} after --opts: everything behind --opts is KEY VALUE, give --opts last")
    args = parser.parse_args(argv)
    if len(args.opts) % 2:
        parser.error(f"--opts needs pairs KEY VALUE, got {len(args.opts)} words: {' '.join(args.opts)}")
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold {args.confidence_threshold} is not between 0 and 1")
    if args.fps <= 0 or (args.scale is not None and args.scale <= 0):
        parser.error("--fps and --scale must be greater than 0")
    sources = [name for name in ("input", "dataset", "gt_json") if getattr(args, name)]
    if len(sources) != 1:
        parser.error("give the videos by exactly one of --input, --dataset and --gt-json")
    if bool(args.gt_json) != bool(args.image_root):
        parser.error("--gt-json and --image-root go together")
    if args.input and not args.results and not args.config_file:
        parser.error("--input needs a model (--config-file) or results to draw (--results)")
    if args.input and (args.side_by_side or args.video):
        parser.error("--side-by-side and --video need a data set: --dataset, or --gt-json with --image-root")
    if args.side_by_side and not args.results:
        parser.error("--side-by-side compares the ground truth with --results")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status."""
    args = parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("vis").setLevel(logging.INFO)
    try:
        if args.dataset or args.gt_json:
            return draw_data_set(args)
        return draw_results_of_input(args) if args.results else predict_and_draw(args)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend; the message says how
        logger.error("error: %s", error, exc_info=args.verbose)
        return 1


def predict_and_draw(args: argparse.Namespace) -> int:
    """A model on one video."""
    # The slow imports after the command line was checked.
    from vis.engine import load_cfg
    from vis.engine.predictor import VideoPredictor

    cfg = load_cfg(args.config_file, args.opts)
    stream = FrameStream.of(args.input, fps=args.fps)
    names = class_names_of(args, cfg)
    prediction, error = predict(VideoPredictor(cfg), stream)
    output = Path(args.output)
    write_results(output / "results.json", prediction, sorted(names), [names[key] for key in sorted(names)])
    logger.info("%d tracks over %d frames in %s", len(prediction.scores), prediction.length, output / "results.json")
    tracks = tracks_of_prediction(prediction, [names[key] for key in sorted(names)])
    draw(args, stream, tracks, output, length=prediction.length)
    if error is not None:
        logger.error("error: %s\nThe %d frames before it were predicted and drawn.", error, prediction.length)
    return int(error is not None)


def predict(predictor: VideoPredictor, stream: FrameStream) -> tuple[VideoPrediction, FrameError | None]:
    """The prediction of a video; up to the first frame that cannot be read, and that error, where there is one."""
    progress = Progress("predicting", stream.length)
    predictor.open(stream.height, stream.width)
    try:
        for frame in stream:
            predictor.push(frame)
            progress.step()
    except FrameError as error:
        if progress.count == 0:
            raise
        failure: FrameError | None = error
    else:
        failure = None
    # The model works in windows: the last one runs in close(), which belongs to the time it took.
    prediction = predictor.close()
    progress.finish()
    return prediction, failure


def draw_results_of_input(args: argparse.Namespace) -> int:
    """A results file of one video over its frames."""
    results = read_results(args.results)
    if len(results) > 1:
        raise ValueError(
            f"{args.results} has results of {len(results)} videos; --input is one video. "
            "Name the data set with --dataset, or with --gt-json and --image-root"
        )
    names: dict[int, str] = {}
    if args.classes or args.config_file:
        names = class_names_of(args, _cfg_of(args))
    entries = next(iter(results.values()), [])
    draw(args, FrameStream.of(args.input, fps=args.fps), tracks_of_results(entries, names), Path(args.output))
    return 0


def draw_data_set(args: argparse.Namespace) -> int:
    """Videos of a data set: results, ground truth, or both."""
    records, names = load_data_set(args)
    results = read_results(args.results) if args.results else {}
    failed = 0
    for number in choose_videos(args, records, results):
        record = records[number]
        # Contiguous classes are in the order of the data set's ids.
        truth = (
            tracks_of_record(record, [names[key] for key in sorted(names)])
            if record.get("annotations") is not None
            else None
        )
        if truth is None and (args.side_by_side or not args.results):
            raise ValueError(
                f"video {number} has no annotations, so its ground truth cannot be drawn; is this a test split?"
            )
        tracks = tracks_of_results(results.get(number, []), names) if args.results else truth or []
        logger.info("video %d: %d frames", number, record["length"])
        try:
            stream = FrameStream(record["file_names"], fps=args.fps)
            draw(
                args, stream, tracks, Path(args.output) / f"video_{number}", truth=truth if args.side_by_side else None
            )
        except ValueError as error:
            # One broken video must not cost the others.
            logger.error("error: video %d: %s", number, error, exc_info=args.verbose)
            failed += 1
    if failed:
        logger.error("%d videos could not be drawn whole", failed)
    return int(failed > 0)


def draw(args: argparse.Namespace, stream: FrameStream, tracks: Sequence[VideoTrack], output: Path, *,
         length: int | None = None, truth: Sequence[VideoTrack] | None = None) -> None:  # fmt: skip
    """Draws one video and says where."""
    written = render_video(
        stream,
        visible_tracks(tracks, args.confidence_threshold),
        output,
        length=length,
        fps=stream.fps,
        scale=args.scale,
        boxes=args.boxes,
        ground_truth=truth,
        write_frames=not args.no_frames,
        write_video=not args.no_video,
    )
    logger.info("wrote %s", ", ".join(str(path) for path in written))


def choose_videos(args: argparse.Namespace, records: Mapping[int, Any], results: Mapping[int, Any]) -> list[int]:
    """The ids of the videos to draw: those named, else those with results, else all."""
    if args.video:
        unknown = [number for number in args.video if number not in records]
        if unknown:
            raise ValueError(f"--video {unknown}: the data set has no such video; it has {_span(records)}")
        return list(args.video)
    if not args.results:
        return sorted(records)
    strangers = sorted(set(results) - set(records))
    if strangers:
        raise ValueError(
            f"{args.results} has results of videos that the data set does not have: {_span(strangers)}; "
            f"the data set has {_span(records)}. Is it the right data set and split?"
        )
    if not results:
        raise ValueError(
            f"{args.results} is an empty list: nothing was found in any video. --video ID draws one anyway"
        )
    return sorted(results)


def load_data_set(args: argparse.Namespace) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Records by video id, and class names by category id."""
    from vis.data import VideoDataset, get_dataset

    _cfg_of(args)  # registers the data sets of the yaml
    if args.dataset:
        data_set = get_dataset(args.dataset)
    else:
        # Absolute: a data set's own paths are relative to the folder of all data sets, these to the current one.
        json_file, root = (os.path.abspath(os.path.expanduser(path)) for path in (args.gt_json, args.image_root))
        data_set = VideoDataset(os.path.basename(json_file), (json_file,), (root,))
    return {record["video_id"]: record for record in data_set()}, _named(args, _names_in(data_set))


def class_names_of(args: argparse.Namespace, cfg: Any) -> dict[int, str]:
    """Class names by category id, in the order of the classes: from --classes, else from the data set of the config."""
    from vis.data import get_dataset

    data_sets = [*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[-1:]] if cfg is not None else []
    if not data_sets:
        if not args.classes:
            logger.info("the config names no data set: classes are shown by their number; --classes gives them names")
        return _named(args, {})
    return _named(args, _names_in(get_dataset(data_sets[0])))


def _names_in(data_set: VideoDataset) -> dict[int, str]:
    from vis.data.categories import class_names, contiguous_ids

    categories = data_set.known_categories()
    names = class_names(categories)
    return {
        number: names[label] for number, label in sorted(contiguous_ids(categories).items(), key=lambda item: item[1])
    }


def _named(args: argparse.Namespace, names: dict[int, str]) -> dict[int, str]:
    if not args.classes:
        return names
    given = [name.strip() for name in args.classes.split(",")]
    if names and len(given) != len(names):
        raise ValueError(f"--classes has {len(given)} names, the data set has {len(names)} classes")
    return dict(zip(names or range(1, len(given) + 1), given, strict=True))


def _cfg_of(args: argparse.Namespace) -> Any:
    if not args.config_file:
        return None
    from vis.engine import load_cfg

    return load_cfg(args.config_file, args.opts)


def _span(numbers: Mapping[int, Any] | Sequence[int]) -> str:
    ordered = sorted(numbers)
    shown = ", ".join(map(str, ordered[:5]))
    return f"{shown} ... {ordered[-1]} ({len(ordered)} videos)" if len(ordered) > 5 else shown or "no videos"


if __name__ == "__main__":
    sys.exit(main())
