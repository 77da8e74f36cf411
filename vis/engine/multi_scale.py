"""Multi-scale test: one model at several test sizes, each evaluated as usual, then fused as an ensemble.

The reports that test at 720 and 1080 pixels do not say where they merge. Merging before tracking would need the queries
of one frame at two sizes to be matched, in a way of its own for every method; finished tracks are fused here instead,
which is the same for all (:mod:`vis.evaluation.ensemble`).

Cost: the runs of all sizes; pixels, and about the time, grow with the square of a size, so 720 and 1080 take 3.25 times
what 720 takes alone, and memory is that of the largest. Benefit: 46.26 -> 46.84 AP on the test set of OVIS in the 2nd
place solution of 2022.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from vis.config import CfgNode
from vis.engine.trainer import evaluate_only
from vis.evaluation import NoGroundTruth, YTVISResult, evaluate_ytvis
from vis.evaluation.ensemble import check_options, fuse_files, load_videos
from vis.evaluation.submission import benchmark_of, write_submission

logger = logging.getLogger(__name__)


def at_size(cfg: CfgNode, size: int) -> CfgNode:
    """The configuration for one test size (short side, pixels), with results under ``OUTPUT_DIR/size_<size>``.

    ``INPUT.MAX_SIZE_TEST`` grows with it: else 1080 pixels of a wide video would become 750.
    """
    scaled = cfg.clone()
    scaled.defrost()
    scaled.INPUT.MIN_SIZE_TEST = size
    scaled.INPUT.MAX_SIZE_TEST = round(cfg.INPUT.MAX_SIZE_TEST * size / cfg.INPUT.MIN_SIZE_TEST)
    scaled.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / f"size_{size}")
    scaled.freeze()
    return scaled


def multi_scale_test(
    cfg: CfgNode,
    sizes: Sequence[int] | None = None,
    *,
    weights: Sequence[float] | None = None,
    iou_threshold: float | None = None,
    max_num: int | None = None,
) -> dict[str, YTVISResult | None]:
    """Evaluate ``MODEL.WEIGHTS`` at every size and fuse the results to ``OUTPUT_DIR/fused/<data set>/results.json``.

    A size that was evaluated before with the same weights, config and code is not computed again.

    Args:
        sizes, weights, iou_threshold, max_num: of the short side, and as :func:`~vis.evaluation.ensemble.fuse_files`
            has them; None: what ``TEST.MULTI_SCALE`` says.

    Returns:
        For each data set the evaluation of the fused results, None where it has no annotations; empty in other
        processes than the main one.

    Raises:
        ValueError: sizes or options make no sense; and what an evaluation raises.
    """
    node = cfg.TEST.MULTI_SCALE
    sizes = list(node.SIZES) if sizes is None else sizes
    weights = list(node.WEIGHTS) or None if weights is None else weights
    iou_threshold = float(node.IOU) if iou_threshold is None else iou_threshold
    max_num = node.MAX_NUM or None if max_num is None else max_num
    if len(set(sizes)) < len(sizes) or min(sizes, default=0) < 1:
        raise ValueError(
            f"the test sizes are {list(sizes)}; expected different positive numbers of pixels (--sizes or "
            "TEST.MULTI_SCALE.SIZES)"
        )
    if cfg.INPUT.MIN_SIZE_TEST < 1:
        raise ValueError(
            f"INPUT.MIN_SIZE_TEST is {cfg.INPUT.MIN_SIZE_TEST}: set the size that MAX_SIZE_TEST is meant for"
        )
    check_options(len(sizes), weights, iou_threshold, max_num)
    scaled = [at_size(cfg, size) for size in sizes]
    for size, each in zip(sizes, scaled, strict=True):
        logger.info("test size %d (at most %d)", size, each.INPUT.MAX_SIZE_TEST)
        evaluate_only(each)
    comm.synchronize()
    found: dict[str, YTVISResult | None] = {}
    for name in cfg.DATASETS.TEST if comm.is_main_process() else ():
        folder = name if len(cfg.DATASETS.TEST) > 1 else ""
        files = [Path(each.OUTPUT_DIR) / "inference" / folder / "results.json" for each in scaled]
        videos = MetadataCatalog.get(name).json_file
        output = Path(cfg.OUTPUT_DIR) / "fused" / name / "results.json"
        fuse_files(*(load_videos(videos), files, output), weights=weights, iou_threshold=iou_threshold, max_num=max_num)
        if benchmark_of(name) is not None:
            logger.info("to submit: %s", write_submission(output))
        found[name] = _ap(name, videos, [*files, output])
    return found


def _ap(name: str, videos: str, files: Sequence[Path]) -> YTVISResult | None:
    """AP of every file in the log, the last one's returned; None without annotations."""
    result = None
    try:
        for file in files:
            result = evaluate_ytvis(videos, str(file))
            logger.info("%s: AP %.2f of %s", name, result.percent()["AP"], file)
    except NoGroundTruth:
        logger.info("%s has no annotations, so there is no AP", name)
    return result
