"""What segmenter, tracker and refiner of DVIS (Zhang et al., ICCV 2023) hand to one another and to the criterions.

Letters: B videos, T frames, Q queries, K classes, L layers, N instances, C channels of a query, Cm of a mask embedding,
h w the size of the mask features. A mask is never stored: the logits of query q in frame t are the inner product of
``mask_embeds[..., t, q, :]`` with ``mask_features[:, t]``, made where somebody reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class SegmenterClip:
    """The segmenter's predictions of B videos of T frames, every frame in the segmenter's own query order.

    Attributes:
        pred_logits: (B, T, Q, K+1).
        pred_embeds: (B, T, Q, C), the normalised queries; with a reid branch, its output is appended.
        raw_embeds: (B, T, Q, C), the same before normalisation, or None where the decoder does not give them.
        mask_embeds: (B, T, Q, Cm).
        mask_features: (B, T, Cm, h, w).
    """

    pred_logits: Tensor
    pred_embeds: Tensor
    raw_embeds: Tensor | None
    mask_embeds: Tensor
    mask_features: Tensor


@dataclass
class TrackerOutput:
    """The tracker's predictions, slot q the same object in every frame.

    Attributes:
        pred_logits: (L, B, T, Q, K+1), in training of every layer, in eval mode of the last alone (L = 1).
        mask_embeds: (L, B, T, Q, Cm).
        mask_features: (B, T, Cm, h, w), what ``mask_embeds`` multiply (DVIS++: after the tracker's projection).
        pred_embeds: (B, T, Q, C) of the last layer (DVIS: normalised, DVIS++: not).
        references: (B, T, Q, C), what a frame's queries were led by (DVIS++), else None.
        order: (B, T, Q) int64, the segmenter's query that slot q of frame t started from.
    """

    pred_logits: Tensor
    mask_embeds: Tensor
    mask_features: Tensor
    pred_embeds: Tensor
    references: Tensor | None
    order: Tensor


@dataclass
class RefinerOutput:
    """The refiner's predictions of whole tracks.

    Attributes:
        pred_logits: (L, B, Q, K+1), one per track: pooled over time.
        mask_embeds: (L, B, T, Q, Cm).
        pred_embeds: (B, T, Q, C) of the last layer.
        mask_features: (B, T, Cm, h, w), what ``mask_embeds`` multiply: the segmenter's own, which in DVIS++ are not the
            tracker's. None where nobody has said so yet.
    """

    pred_logits: Tensor
    mask_embeds: Tensor
    pred_embeds: Tensor
    mask_features: Tensor | None = None


@dataclass
class ClipTargets:
    """The instances of one video's clip; N may be 0.

    Attributes:
        labels: (N,) int64.
        ids: (N, T) int64, -1 where the instance is absent in that frame.
        masks: (N, T, H, W) bool at the padded size, empty where the instance is absent.
    """

    labels: Tensor
    ids: Tensor
    masks: Tensor
