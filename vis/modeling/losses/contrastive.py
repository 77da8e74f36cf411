"""Contrastive losses of query embeddings with any number of positives and negatives, as CTVIS and DVIS++ use them.

For an anchor v with positives k+ and negatives k-

    L = log(1 + sum over all pairs (k+, k-) of exp(v.k- - v.k+))

without a temperature. The sum is a product, so L = softplus(logsumexp(v.k-) + logsumexp(-v.k+)), which no number of
pairs and no size of the products can overflow. Products are made in float32: those of embeddings without normalisation
overflow in half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The loss of each of M anchors against J keys; 0 for an anchor without a positive or without a negative.

    Args:
        similarity: (M, J) products of anchors and keys.
        positive, negative: (M, J) bool; a key that is neither does not count.

    Returns:
        (M,) float32.
    """
    similarity = similarity.float()
    return F.softplus(_log_sum_exp(similarity, negative) + _log_sum_exp(-similarity, positive))


def _log_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    """log of the sum of exp over the marked entries of each row, -inf (without a gradient) where there are none."""
    some = mask.any(dim=1)
    # An empty row is computed over all of its entries and then replaced: -inf itself would have the gradient nan.
    summed = values.masked_fill(~(mask | ~some[:, None]), float("-inf")).logsumexp(dim=1)
    return summed.masked_fill(~some, float("-inf"))


def cosine_loss(anchors: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """Squared difference of each anchor's cosine with each key from 1 (positive) or 0 (negative), mean over the keys.

    Args:
        anchors: (M, C); keys: (M, J, C); positive: (M, J) bool.

    Returns:
        (M,) float32.
    """
    cosine = F.cosine_similarity(anchors.float()[:, None], keys.float(), dim=-1)
    return (cosine - positive.float()).square().mean(dim=1)


def adjacent_frames_loss(embeds: Tensor, queries: Tensor) -> Tensor:
    """Mean contrastive loss of matched queries against the frames before and after (DVIS++'s tracker).

    The anchor is query q of frame t >= 1; in the frame before, and in the one after where there is one, the same query
    is the positive and every other query a negative.

    Args:
        embeds: (T, Q, C); queries: (n,) matched queries.

    Returns:
        Scalar; 0, attached to ``embeds``, where there is no pair of frames or no query.
    """
    num_frames = len(embeds)
    if num_frames < 2 or not len(queries):
        return embeds.float().sum() * 0.0
    pairs = [(t, other) for t in range(1, num_frames) for other in (t - 1, t + 1) if other < num_frames]
    frames, others = torch.tensor(pairs, device=embeds.device).T
    with torch.autocast(device_type=embeds.device.type, enabled=False):
        anchors = embeds[frames][:, queries].float()  # (pairs, n, C)
        similarity = (anchors @ embeds[others].float().transpose(1, 2)).flatten(0, 1)  # (pairs*n, Q)
    positive = F.one_hot(queries, embeds.shape[1]).bool().repeat(len(pairs), 1)
    return contrastive_loss(similarity, positive, ~positive).mean()


def whole_track_loss(embeds: Tensor, queries: Tensor, others: list[Tensor]) -> Tensor:
    """Mean contrastive loss of matched queries over a whole clip (DVIS++'s refiner).

    The anchor is query q of frame t, its positives are the same query in all frames. An anchor has two items: one whose
    negatives are the other queries of frame t, and, where there are any, one whose negatives are the remembered
    embeddings of the query's class from other videos. The mean is over all items.

    Args:
        embeds: (T, Q, C); queries: (n,) matched queries.
        others: for each of the queries (m, C) embeddings of other videos; m may be 0 and may differ.

    Returns:
        Scalar; 0, attached to ``embeds``, where there is no query.
    """
    if not len(queries):
        return embeds.float().sum() * 0.0
    embeds = embeds.float()
    items = []
    for query, remembered in zip(queries.tolist(), others, strict=True):
        anchors = embeds[:, query]  # (T, C)
        with torch.autocast(device_type=embeds.device.type, enabled=False):
            own = anchors @ anchors.T
            in_frame = torch.einsum("tc,tqc->tq", anchors, embeds)
            in_memory = anchors @ remembered.float().T
        rest = torch.ones_like(in_frame, dtype=torch.bool)
        rest[:, query] = False  # the anchor itself among the queries of its frame
        items.append(_positives_against(own, in_frame, rest))
        if len(remembered):
            items.append(_positives_against(own, in_memory, torch.ones_like(in_memory, dtype=torch.bool)))
    return torch.cat(items).mean()


def _positives_against(positives: Tensor, others: Tensor, negative: Tensor) -> Tensor:
    """(M,) losses of products with positives (M, P) and with others (M, J), of which ``negative`` (M, J) count."""
    one, none = torch.ones_like(positives, dtype=torch.bool), torch.zeros_like(negative)
    return contrastive_loss(
        torch.cat([positives, others], dim=1), torch.cat([one, none], dim=1), torch.cat([~one, negative], dim=1)
    )
