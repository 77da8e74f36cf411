"""Evaluation: YouTube-VIS AP and AR, results on disk, running a model over a data set."""

from __future__ import annotations

from vis.evaluation.ensemble import fuse_files
from vis.evaluation.inference import VideoInferenceError, VideoInputError, inference_on_dataset
from vis.evaluation.results_writer import PartWriter, ResultsWriteError, compose_results, iter_parts, write_json
from vis.evaluation.video_evaluator import VideoEvaluator, build_evaluator
from vis.evaluation.ytvis_eval import YTVISResult, evaluate_ytvis
from vis.evaluation.ytvis_io import GroundTruthError, NoGroundTruth, ResultsError

__all__ = [
    "GroundTruthError",
    "NoGroundTruth",
    "PartWriter",
    "ResultsError",
    "ResultsWriteError",
    "VideoEvaluator",
    "VideoInferenceError",
    "VideoInputError",
    "YTVISResult",
    "build_evaluator",
    "compose_results",
    "evaluate_ytvis",
    "fuse_files",
    "inference_on_dataset",
    "iter_parts",
    "write_json",
]
