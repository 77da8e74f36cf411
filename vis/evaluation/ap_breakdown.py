"""AP of parts of a data set: objects by how much they are occluded, videos by how long they are.

**Occlusion** (data sets whose annotations carry ``occlusion``, as OVIS does). OVIS (Qi et al., "Occluded Video Instance
Segmentation: A Benchmark", IJCV 2022) reports AP for slightly, moderately and heavily occluded objects; the code of its
server is not public, and nothing here has been compared with it. What is computed here:

- the score of an object in a frame is 0 for ``no_occlusion``, 0.25 for ``slight_occlusion``, 0.75 for
  ``severe_occlusion``; frames without a level (the object is not there) do not count;
- the score of an object is the mean over the half of its frames with the highest scores (rounded up);
- ``AP_so``: objects of scores up to 0.25; ``AP_mo``: above 0.25, up to 0.5; ``AP_ho``: above 0.5;
- an object of another group, or without any level, is ignored, as objects of other sizes are for APs, APm and APl: a
  prediction that finds it counts neither as right nor as wrong;
- predictions have no level of occlusion. So one that finds no object at all is wrong in all three groups, and the three
  are lower than AP would be on a data set with objects of that group alone. Compare a group between methods, on one
  ground truth; not one group with another.

**Length**: all objects and predictions of the videos of a group and of no other, as if the ground truth had only those.
So does YouTube-VIS 2022, whose AP is the mean of those of the short and of the long videos.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vis.evaluation.ytvis_io import GroundTruth, GroundTruthError, Track, Tracks, span_of

OCCLUSION_GROUPS = ("AP_so", "AP_mo", "AP_ho")
"""Slightly, moderately and heavily occluded objects."""

_LEVEL_SCORES = np.array([0.0, 0.25, 0.75])  # of OCCLUSION_LEVELS
_GROUP_BOUNDS = np.array([0.25, 0.5])

Groups = dict[str, frozenset[int]]
"""Name of a group -> its videos."""


def has_occlusion(truth: GroundTruth) -> bool:
    """Whether any object has a level of occlusion in any frame."""
    return any(occlusion_group(track) >= 0 for tracks in truth.tracks.values() for track in tracks)


def occlusion_group(track: Track) -> int:
    """Place of an object in ``OCCLUSION_GROUPS``; -1 without any level."""
    if track.occlusion is None:
        return -1
    scores = np.sort(_LEVEL_SCORES[track.occlusion[track.occlusion >= 0]])[::-1]
    if not len(scores):
        return -1
    half = scores[: (len(scores) + 1) // 2]
    return int(np.searchsorted(_GROUP_BOUNDS, half.mean()))


def outside_occlusion(objects: Sequence[Track]) -> NDArray[np.bool_]:
    """(3, G): the object is not of the group."""
    groups = np.array([occlusion_group(track) for track in objects], np.int64)
    outside: NDArray[np.bool_] = groups != np.arange(len(OCCLUSION_GROUPS))[:, None]
    return outside


def length_groups(truth: GroundTruth, bounds: Sequence[int] | None = None) -> Groups:
    """Videos by their number of frames.

    Args:
        bounds: a group ends with each of these lengths, and one begins behind the last of them: ``(36,)`` gives "1 to
            36 frames" and "over 36 frames". None: three groups, of as many videos each as equal lengths allow.

    Returns:
        By rising length, groups without videos left out.

    Raises:
        ValueError: the bounds are not positive or do not rise.
    """
    lengths = {video: length for video, (_, _, length) in truth.videos.items()}
    if bounds is None:
        ordered = np.sort(list(lengths.values()))
        bounds = sorted({int(ordered[len(ordered) * part // 3 - 1]) for part in (1, 2) if len(ordered) * part // 3})
        bounds = [bound for bound in bounds if bound < ordered[-1]]
    if any(bound < 1 for bound in bounds) or any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"lengths that end a group must be positive and rise, found {list(bounds)}")
    names = [f"{a + 1} to {b} frames" for a, b in zip([0, *bounds], bounds, strict=False)]
    names.append(f"over {bounds[-1]} frames" if bounds else "all lengths")
    place = {video: int(np.searchsorted(bounds, length)) for video, length in lengths.items()}
    groups = {name: frozenset(v for v in lengths if place[v] == i) for i, name in enumerate(names)}
    return {name: videos for name, videos in groups.items() if videos}


def ytvis2022_groups(truth: GroundTruth) -> Groups:
    """The short and the long videos; empty where nothing tells them apart."""
    if truth.long_videos is None:
        return {}
    return {"short": frozenset(truth.videos) - truth.long_videos, "long": truth.long_videos}


def join_short_and_long(short: GroundTruth, long: GroundTruth) -> GroundTruth:
    """One ground truth of the two of YouTube-VIS 2022, ``gt_short.json`` and ``gt_long.json``.

    Raises:
        GroundTruthError: they share a video, or differ in their categories.
    """
    common = sorted(set(short.videos) & set(long.videos))
    if common:
        raise GroundTruthError(
            f"the ground truths of the short and of the long videos both hold the videos {common[:10]}: each video "
            "belongs to one of them. Is one of the two the ground truth of all videos? Name the long ones instead."
        )
    if short.categories != long.categories:
        raise GroundTruthError("the ground truths of the short and of the long videos differ in their categories.")
    tracks: Tracks = defaultdict(list, {**short.tracks, **long.tracks})
    return GroundTruth(
        {**short.videos, **long.videos}, short.categories, tracks, frozenset(long.videos), {**short.names, **long.names}
    )


def with_long_videos(gt: GroundTruth, chosen: Sequence[int | str]) -> GroundTruth:
    """The same with its long videos named, by id or by the folder of their frames.

    Raises:
        GroundTruthError: one of them is not in it.
    """
    ids = {name: i for i, name in gt.names.items() if name}
    found = {item if item in gt.videos else ids.get(str(item)) for item in chosen}
    if None in found or not found:
        missing = [item for item in chosen if item not in gt.videos and str(item) not in ids]
        raise GroundTruthError(
            f"of {len(chosen)} long videos {len(missing)} are not in the ground truth: {missing[:10]}. Give ids or "
            f"names of videos; it has {len(gt.videos)} videos, {span_of(gt.videos)}."
        )
    return replace(gt, long_videos=frozenset(i for i in gt.videos if i in found))


def mean_of_groups(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over the groups; -1 where a group has nothing to measure."""
    rows = list(groups.values())
    return {
        name: float(np.mean([row[name] for row in rows])) if min(row[name] for row in rows) >= 0 else -1.0
        for name in rows[0]
    }
