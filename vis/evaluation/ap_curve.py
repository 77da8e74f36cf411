"""AP of many samples of one ranking at once: what resampling and oracles need thousands of times."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.ap_core import RECALL_THRESHOLDS


def average_precision(
    hits: NDArray[np.float64], misses: NDArray[np.float64], num_objects: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Interpolated AP at 101 recalls, the same number that ``ap_core.accumulate`` leads to.

    Only the places of right predictions are needed: recall rises nowhere else, and the best precision from any place on
    is at one of them.

    Args:
        hits: (B, P) right predictions up to and with each of the P places of right predictions, by falling score.
        misses: (B, P) wrong ones up to there.
        num_objects: (B,).

    Returns:
        (B,) fractions; nan where there is no object.
    """
    precision = hits / (hits + misses + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recalls = hits / np.maximum(1, num_objects)[:, None]
    reached = np.searchsorted(RECALL_THRESHOLDS, recalls, side="right")  # how many of the 101 are at most this recall
    total = (envelope * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALL_THRESHOLDS)
    ap: NDArray[np.float64] = np.where(num_objects > 0, total, np.nan)
    return ap
