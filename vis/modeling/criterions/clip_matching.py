"""Which query answers for which instance of a clip: one query per instance for all frames (DVIS, section 3.4).

An instance is matched in the frame where it is first seen, on that frame alone, and keeps the query: before it enters
and after it leaves, the query has to give its class and an empty mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vis.layers.points import sample_points
from vis.modeling.criterions.mask_criterion import sample_targets
from vis.modeling.matchers.hungarian import HungarianMatcher, Pairs, linear_assignment
from vis.structures import ClipTargets


def first_frames(ids: Tensor) -> Tensor:
    """(N,) the first frame of each instance of ids (N, T), -1 for one that is in no frame."""
    present = ids != -1
    first = present.to(torch.uint8).argmax(dim=1) if ids.shape[1] else ids.new_zeros(len(ids))
    return torch.where(present.any(dim=1), first, first.new_full((), -1))


@torch.no_grad()
def match_by_first_appearance(
    class_logits: Tensor,
    mask_embeds: Tensor,
    features: Tensor,
    target: ClipTargets,
    *,
    matcher: HungarianMatcher,
    num_points: int,
    block_used: bool = True,
) -> list[Pairs]:
    """Pairs (queries, instances) for each layer of one clip.

    Args:
        class_logits: (layers, T, Q, K+1); mask_embeds: (layers, T, Q, C); features: (T, C, h, w).
        block_used: a query that has an instance is not given to one that enters later. An instance for which no query
            is left has no pair.
    """
    num_layers, _, num_queries = class_logits.shape[:3]
    free = [torch.ones(num_queries, dtype=torch.bool) for _ in range(num_layers)]
    chosen: list[list[Pairs]] = [[] for _ in range(num_layers)]
    first = first_frames(target.ids)
    for frame in sorted(set(first.tolist()) - {-1}):
        new = (first == frame).nonzero()[:, 0]
        points = torch.rand(1, num_points, 2, device=features.device)
        with torch.autocast(device_type=features.device.type, enabled=False):
            sampled = sample_points(features[frame, None].float(), points)[0]  # (C, P)
            masks = sample_points(target.masks[new, frame][None].float(), points)[0]  # (new, P)
            logits = mask_embeds[:, frame].float() @ sampled  # (layers, Q, P)
            costs = _costs(logits, class_logits[:, frame], target.labels[new], masks, matcher)
        new = new.cpu()
        for layer, cost in enumerate(costs):
            rows = free[layer].nonzero()[:, 0]
            picked, columns = linear_assignment(cost[rows])
            queries = rows[picked]
            chosen[layer].append((queries, new[columns]))
            if block_used:
                free[layer][queries] = False
    return [_joined(pairs) for pairs in chosen]


@torch.no_grad()
def match_stacked(
    class_logits: Tensor,
    mask_embeds: Tensor,
    features: Tensor,
    target: ClipTargets,
    *,
    matcher: HungarianMatcher,
    num_points: int,
) -> list[Pairs]:
    """Pairs (queries, instances) for each layer of one clip whose T frames, one below the other, are one tall image.

    Args:
        class_logits: (layers, Q, K+1); mask_embeds: (layers, T, Q, C); features: (T, C, h, w).
        num_points: per frame; they are uniform over the whole stack.
    """
    if not len(target.labels):
        return [_joined([])] * len(class_logits)
    points = torch.rand(1, num_points * len(features), 2, device=features.device)
    with torch.autocast(device_type=features.device.type, enabled=False):
        instances = torch.arange(len(target.labels), device=features.device)
        masks = sample_targets(target.masks.flatten(1, 2), instances, points.expand(len(instances), -1, -1))
        # Features are read once, the logits at all points are held for one layer at a time.
        samples = sample_stack(features.float(), points)
        logits = (stack_logits(embeds.float(), samples, points.shape[1]) for embeds in mask_embeds)
        costs = _costs(logits, class_logits, target.labels, masks, matcher)
    return [linear_assignment(cost) for cost in costs]


def sample_stack(features: Tensor, points: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each of T frames, which lie one below the other, gives to ``points`` (1, P, 2) over the whole stack.

    A point near the seam of two frames is interpolated between them, as in the tall image: sampling with zeros outside
    gives each frame's share.

    Args:
        features: (T, C, h, w).

    Returns:
        For each frame the indices (p,) of the points it reaches, and its features (C, p) at them.
    """
    num_frames, height = len(features), features.shape[-2]
    row = points[0, :, 1] * num_frames
    samples = []
    for frame in range(num_frames):
        near = ((row > frame - 0.5 / height) & (row < frame + 1 + 0.5 / height)).nonzero()[:, 0]
        local = torch.stack([points[0, near, 0], row[near] - frame], dim=-1)
        samples.append((near, sample_points(features[frame, None], local[None])[0]))
    return samples


def stack_logits(mask_embeds: Tensor, samples: Sequence[tuple[Tensor, Tensor]], num_points: int) -> Tensor:
    """Mask logits (Q, P) of embeddings (T, Q, C) at the points of :func:`sample_stack`, without the dense masks."""
    out = mask_embeds.new_zeros(mask_embeds.shape[1], num_points)
    for embeds, (near, sampled) in zip(mask_embeds, samples, strict=True):
        out[:, near] += embeds @ sampled
    return out


def _costs(
    mask_logits: Iterable[Tensor], class_logits: Tensor, labels: Tensor, masks: Tensor, matcher: HungarianMatcher
) -> Tensor:
    """(layers, Q, N) on the CPU; ``mask_logits`` gives (Q, P) for one layer after the other, which need not be held."""
    pairs = zip(class_logits, mask_logits, strict=True)
    return torch.stack([matcher.cost(classes, logits, labels, masks) for classes, logits in pairs]).cpu()


def _joined(pairs: list[Pairs]) -> Pairs:
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(q for q, _ in pairs)]), torch.cat([none, *(i for _, i in pairs)])
