"""Evaluation of a model: after and during a training, or of weights alone."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

from vis.config import CfgNode
from vis.data.loaders import build_test_loader
from vis.engine.ema import load_for_evaluation
from vis.engine.state import last_checkpoint
from vis.evaluation import build_evaluator, inference_on_dataset
from vis.modeling import build_model

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, model: nn.Module) -> OrderedDict[str, Any]:
    """Run ``model`` over every data set of ``DATASETS.TEST``; results go to ``OUTPUT_DIR/inference``.

    An evaluation of the same weights that was stopped is continued (``TEST.RESUME``).

    Returns:
        For one data set its results, for several ``{data set: results}``; in the main process.
    """
    names = list(cfg.DATASETS.TEST)
    results: OrderedDict[str, Any] = OrderedDict()
    for name in names:
        folder = Path(cfg.OUTPUT_DIR) / "inference" / (name if len(names) > 1 else "")
        loader = build_test_loader(cfg, name)
        found = inference_on_dataset(model, loader, build_evaluator(cfg, name, folder, model=model))
        results[name] = found or OrderedDict()
    return results[names[0]] if len(names) == 1 else results


def evaluate_only(cfg: CfgNode, *, resume: bool = False) -> OrderedDict[str, Any]:
    """Load ``MODEL.WEIGHTS`` strictly and evaluate; no training data are needed.

    Args:
        resume: take the last checkpoint of ``OUTPUT_DIR`` instead, where there is one.

    Raises:
        ValueError: there is nothing to load or nothing to evaluate on, or the weights are not of this model.
        FileNotFoundError: the weights or the data set are not there.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name the data sets to evaluate on")
    weights: str | Path | None = last_checkpoint(cfg.OUTPUT_DIR) if resume else None
    if weights is not None and cfg.MODEL.WEIGHTS:
        logger.warning("--resume evaluates %s; MODEL.WEIGHTS %s is NOT used", weights, cfg.MODEL.WEIGHTS)
    weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            "nothing to evaluate: set MODEL.WEIGHTS to a file, or use --resume with the OUTPUT_DIR of a training"
        )
    model = build_model(cfg)
    load_for_evaluation(cfg, model, weights)
    model.eval()
    return evaluate(cfg, model)


def check_test_set(cfg: CfgNode, name: str) -> None:
    """Find out before the training, not after it, that there is nothing to evaluate on."""
    try:
        build_test_loader(cfg, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error} (DATASETS.TEST "()" trains without evaluation)') from error
