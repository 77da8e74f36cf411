"""YouTube-VIS AP step by step: what ``vis.evaluation`` is compared with, in numbers (tests) and in time (benchmark).

Written from the description of the metric (Yang et al., "Video Instance Segmentation", ICCV 2019, section 5; COCO's
matching), and as the official code goes about it: four calls of pycocotools for every pair of tracks and every frame,
one loop per threshold, prediction and object. Nothing of ``vis.evaluation`` is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
LIMITS = (1, 10, 100)
RANGES = ((0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10))

Object = dict[str, Any]
Key = tuple[int, int]


def pairwise_evaluation(
    gt: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> tuple[list[float], dict[int, float]]:
    """The 12 numbers in the official order, and AP of each category by id; -1 where nothing is measured.

    Args:
        gt: content of a YouTube-VIS json. Unlike for the official code, ``areas`` may be null: those of the masks then.
        results: in the submission format.
    """
    objects, found = _grouped(gt, results)
    videos = sorted({video["id"] for video in gt["videos"]})
    categories = sorted({category["id"] for category in gt["categories"]})
    ious = {key: pairwise_ious(found[key], objects[key]) for key in sorted({*objects, *found})}
    precision = -np.ones((len(THRESHOLDS), len(RECALLS), len(categories), len(RANGES), len(LIMITS)))
    recall = -np.ones((len(THRESHOLDS), len(categories), len(RANGES), len(LIMITS)))
    for k, category in enumerate(categories):
        for a, bounds in enumerate(RANGES):
            keys = [(video, category) for video in videos if (video, category) in ious]
            matched = [_match_video(found[key], objects[key], ious[key], bounds) for key in keys]
            for m, limit in enumerate(LIMITS):
                _curves(matched, limit, precision[:, :, k, a, m], recall[:, k, a, m])

    def ap(chosen: np.ndarray) -> float:
        return float(chosen[chosen > -1].mean()) if (chosen > -1).any() else -1.0

    at_all = precision[:, :, :, 0, 2]
    stats = [ap(at_all), ap(at_all[:1]), ap(at_all[5:6]), *(ap(precision[:, :, :, a, 2]) for a in (1, 2, 3))]
    stats += [ap(recall[:, :, 0, m]) for m in range(3)] + [ap(recall[:, :, a, 2]) for a in (1, 2, 3)]
    return stats, {category: ap(at_all[:, :, k]) for k, category in enumerate(categories)}


def _grouped(
    gt: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> tuple[dict[Key, list[Object]], dict[Key, list[Object]]]:
    """Objects and predictions by video and category; at most 100 of the latter, by falling score."""
    sizes = {video["id"]: (video["height"], video["width"]) for video in gt["videos"]}
    objects: dict[Key, list[Object]] = defaultdict(list)
    found: dict[Key, list[Object]] = defaultdict(list)
    for entry in gt["annotations"]:
        masks = [_rle(mask, *sizes[entry["video_id"]]) if mask else None for mask in entry["segmentations"]]
        areas = entry.get("areas")
        if areas is None:
            areas = [mask_utils.area(mask) if mask else None for mask in masks]
        each = {"masks": masks, "area": _mean_of_seen(areas), "crowd": bool(entry.get("iscrowd", 0))}
        objects[entry["video_id"], entry["category_id"]].append(each)
    for result in results:
        masks = list(result["segmentations"])
        areas = [mask_utils.area(mask) if mask else None for mask in masks]
        each = {"masks": masks, "area": _mean_of_seen(areas), "score": result["score"]}
        found[result["video_id"], result["category_id"]].append(each)
    for key in found:
        found[key] = sorted(found[key], key=lambda each: -each["score"])[: LIMITS[-1]]  # stable
    return objects, found


def _rle(mask: Any, height: int, width: int) -> Any:
    if isinstance(mask, list):
        return mask_utils.merge(mask_utils.frPyObjects(mask, height, width))
    return mask_utils.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask


def _mean_of_seen(areas: Sequence[float | None]) -> float:
    seen = [area for area in areas if area]
    return float(np.array(seen).mean()) if seen else 0.0


def pairwise_ious(found: Sequence[Object], objects: Sequence[Object]) -> np.ndarray:
    """(D, G) spatio-temporal IoU, pair by pair and frame by frame."""
    ious = np.zeros((len(found), len(objects)))
    for d, g in np.ndindex(ious.shape):
        shared = union = 0.0
        for a, b in zip(found[d]["masks"], objects[g]["masks"], strict=True):
            if a and b:
                shared += mask_utils.area(mask_utils.merge([a, b], True))
                union += mask_utils.area(mask_utils.merge([a, b], False))
            elif a or b:
                union += mask_utils.area(a or b)
        ious[d, g] = shared / union if union > 0 else 0.0
    return ious


def _match_video(
    found: Sequence[Object], objects: Sequence[Object], ious: np.ndarray, bounds: tuple[float, float]
) -> tuple[list[float], np.ndarray, np.ndarray, int]:
    """Scores, (T, D) found something, (T, D) ignored, and the number of objects that count."""
    low, high = bounds
    ignore = [each["crowd"] or each["area"] < low or each["area"] > high for each in objects]
    order = [g for g in range(len(objects)) if not ignore[g]] + [g for g in range(len(objects)) if ignore[g]]
    hit, ignored = np.zeros((2, len(THRESHOLDS), len(found)), bool)
    for t, threshold in enumerate(THRESHOLDS):
        taken: set[int] = set()
        for d in range(len(found)):
            best, chosen = min(threshold, 1 - 1e-10), -1
            for g in order:
                if g in taken and not objects[g]["crowd"]:
                    continue
                if chosen >= 0 and not ignore[chosen] and ignore[g]:
                    break  # an object that counts was found, the rest is ignored ones
                if ious[d, g] >= best:
                    best, chosen = ious[d, g], g
            if chosen >= 0:
                taken.add(chosen)
                hit[t, d], ignored[t, d] = True, ignore[chosen]
            else:
                ignored[t, d] = found[d]["area"] < low or found[d]["area"] > high
    return [each["score"] for each in found], hit, ignored, ignore.count(False)


def _curves(matched: Sequence[Any], limit: int, precision: np.ndarray, recall: np.ndarray) -> None:
    """Fills (T, 101) precision and (T,) recall of one category, range of areas and limit."""
    count = sum(each[3] for each in matched)
    if count == 0:
        return
    scores = np.concatenate([each[0][:limit] for each in matched])
    order = np.argsort(-scores, kind="mergesort")
    hit = np.concatenate([each[1][:, :limit] for each in matched], axis=1)[:, order]
    ignored = np.concatenate([each[2][:, :limit] for each in matched], axis=1)[:, order]
    for t in range(len(THRESHOLDS)):
        right = np.cumsum(hit[t] & ~ignored[t]).astype(float)
        wrong = np.cumsum(~hit[t] & ~ignored[t]).astype(float)
        recalls = right / count
        values = (right / (right + wrong + np.spacing(1))).tolist()
        recall[t] = recalls[-1] if len(recalls) else 0
        for i in range(len(values) - 1, 0, -1):
            values[i - 1] = max(values[i - 1], values[i])
        for r, at in enumerate(np.searchsorted(recalls, RECALLS, side="left")):
            precision[t, r] = values[at] if at < len(values) else 0
