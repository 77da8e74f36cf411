"""SimOTA: several queries for each instance (Ge et al., YOLOX, 2021, section 2.1), as IDOL uses it on box queries.

How many queries an instance gets follows from how well they fit it: the sum of its best IoUs. A query belongs to one
instance at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vis.modeling.losses.boxes import corners, overlaps
from vis.modeling.losses.focal import focal_cost
from vis.modeling.matchers.finite import finite_or_error

# YOLOX counts 2.5 cells of stride 32, in pixels; IDOL kept the numbers with boxes in shares of the picture.
CENTRE_RADIUS = 2.5 / 32
_GIOU_WEIGHT = 3.0
_OFF_CENTRE, _OUTSIDE = 100.0, 10000.0
_TAKEN = 100000.0
_OVERFLOW = (
    "{what} are not finite: the network's outputs have overflowed. Lower SOLVER.BASE_LR, or train without SOLVER.AMP"
)


class Assignment(NamedTuple):
    """Of one picture, on the CPU.

    Attributes:
        queries: (n,) int64, those that were selected, rising; instances: (n,) int64, what each is to find.
        best: (M,) int64, of each instance the cheapest of its queries; -1 where there were more instances than queries.
    """

    queries: Tensor
    instances: Tensor
    best: Tensor


@torch.no_grad()
def ota_costs(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cost and IoU of every query with every instance.

    Args:
        logits: (..., Q, K); boxes: (..., Q, 4), targets: (M, 4): centre and size in 0..1; labels: (M,).

    Returns:
        (..., Q, M) float32 each, on the CPU.

    Raises:
        FloatingPointError: a prediction is not finite.
    """
    boxes = finite_or_error(boxes, _OVERFLOW.format(what="boxes"), instead=0.5)
    with torch.autocast(device_type=boxes.device.type, enabled=False):
        boxes, targets = boxes.float()[..., :, None, :], targets.float()
        logits = finite_or_error(logits.float(), _OVERFLOW.format(what="class logits"), instead=0.0)
        classes = focal_cost(logits)[..., labels]
        iou, giou = overlaps(corners(boxes), corners(targets))
        centre, edges = boxes[..., :2], corners(targets)
        in_box = ((centre > edges[..., :2]) & (centre < edges[..., 2:])).all(dim=-1)
        in_centre = ((centre - targets[..., :2]).abs() < CENTRE_RADIUS).all(dim=-1)
        cost = classes - _GIOU_WEIGHT * giou + _OFF_CENTRE * ~(in_box & in_centre)
        somewhere = (in_box | in_centre).any(dim=-1, keepdim=True)
        cost = cost + _OUTSIDE * ~somewhere
    return cost.cpu(), iou.cpu()


def assign(cost: Tensor, iou: Tensor, *, num_candidates: int = 10, released: bool = False) -> Assignment:
    """Queries for each instance.

    Args:
        cost, iou: (Q, M), from :func:`ota_costs`. With ``released``, ``cost`` is changed.
        num_candidates: the best IoUs whose sum, rounded down and at least 1, is the number of an instance's queries.
        released: as the released code repairs instances without a query: it looks for conflicts only among the queries
            that were in conflict before, so that two instances may end with one query.
    """
    num_queries, num_instances = cost.shape
    if not num_instances:
        none = torch.zeros(0, dtype=torch.int64)
        return Assignment(none, none, none)
    chosen = _dynamic_k(cost, iou, num_candidates)
    conflicts = chosen.sum(dim=1) > 1
    _keep_cheapest(chosen, cost, conflicts)
    if released:
        _released_repair(chosen, cost, conflicts)
    else:
        _repair(chosen, cost)
    queries = chosen.any(dim=1).nonzero()[:, 0]
    best = cost.masked_fill(~chosen, float("inf")).argmin(dim=0)
    return Assignment(queries, chosen[queries].int().argmax(dim=1), best.masked_fill(~chosen.any(dim=0), -1))


def _dynamic_k(cost: Tensor, iou: Tensor, num_candidates: int) -> Tensor:
    """(Q, M) bool: for each instance the k queries of the least cost."""
    best = iou.topk(min(num_candidates, len(iou)), dim=0).values
    k = best.sum(dim=0).int().clamp(min=1, max=len(iou))
    order = cost.argsort(dim=0, stable=True)
    wanted = torch.arange(len(cost))[:, None] < k
    return torch.zeros_like(wanted).scatter_(0, order, wanted)


def _keep_cheapest(chosen: Tensor, cost: Tensor, rows: Tensor) -> None:
    """Leave each of the marked queries to the instance for which it costs least, whoever asked for it, as in YOLOX."""
    cheapest = cost[rows].argmin(dim=1)
    chosen[rows] = torch.nn.functional.one_hot(cheapest, cost.shape[1]).bool()


def _repair(chosen: Tensor, cost: Tensor) -> None:
    """Give every instance that is left empty the cheapest query that nobody has, as long as there is one."""
    while True:
        empty, taken = (~chosen.any(dim=0)).nonzero()[:, 0], chosen.any(dim=1)
        if not len(empty) or taken.all():
            return
        free = cost.masked_fill(taken[:, None], float("inf"))
        chosen[free[:, empty].argmin(dim=0), empty] = True
        # Empty instances that wish for the same query: the cheaper one has it, the other is empty still.
        wishes = chosen & ~taken[:, None]
        rows = wishes.sum(dim=1) > 1
        _keep_cheapest(chosen, cost.masked_fill(~chosen, float("inf")), rows)


def _released_repair(chosen: Tensor, cost: Tensor, conflicts: Tensor) -> None:
    while not chosen.any(dim=0).all() and not chosen.any(dim=1).all():
        cost[chosen.any(dim=1)] += _TAKEN
        for instance in (~chosen.any(dim=0)).nonzero()[:, 0].tolist():
            chosen[int(cost[:, instance].argmin()), instance] = True
        if (chosen.sum(dim=1) > 1).any():
            _keep_cheapest(chosen, cost, conflicts)
