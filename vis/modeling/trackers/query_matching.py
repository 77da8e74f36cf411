"""Tracking by matching query embeddings of consecutive frames (Huang et al., MinVIS, NeurIPS 2022, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.modeling.matchers.hungarian import linear_assignment
from vis.modeling.registry import TRACKER_REGISTRY
from vis.modeling.transformer_decoders.masked import DecoderOutput


@dataclass
class QueryMatchingState:
    """Memory of one video: ``embeds`` (Q, C), the queries of the last frame in track order."""

    embeds: Tensor


def cosine_similarity(reference: Tensor, current: Tensor, *, added: float = 0.0) -> Tensor:
    """Of every reference query (..., Q, C) with every current one: (..., Q, Q) float32.

    Args:
        added: to every norm. Without, a query of zeros has similarity 0 with all.
    """
    with torch.autocast(device_type=current.device.type, enabled=False):
        reference, current = (
            x.float() / (x.float().norm(dim=-1, keepdim=True) + added).clamp(min=1e-6) for x in (reference, current)
        )
        return reference @ current.mT


def match_queries(reference: Tensor, current: Tensor) -> Tensor:
    """For each reference query the index of its match: ``current[index]`` is in the order of ``reference``.

    The assignment minimises 1 - cosine similarity over all Q queries.

    Args:
        reference, current: (Q, C).

    Returns:
        (Q,) int64 on the device of ``current``.
    """
    _, index = linear_assignment(1 - cosine_similarity(reference, current))
    return index.to(current.device)


@TRACKER_REGISTRY.register()
class QueryMatchingTracker(nn.Module):
    """Re-orders the queries of every frame to those of the frame before; no parameters, no birth, no death.

    A track lives as long as its query, also while its mask is empty.
    """

    @configurable
    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def forward(
        self, outputs: DecoderOutput, state: QueryMatchingState | None
    ) -> tuple[DecoderOutput, QueryMatchingState]:
        """Bring T frames of one video into track order.

        Args:
            outputs: of T consecutive frames, as the decoder gives them.
            state: what the call for the frames before returned; None opens a video.

        Returns:
            Logits, embeddings and mask embeddings with queries in track order, and the new state.
        """
        embeds = outputs["pred_embeds"]  # (T, Q, C)
        orders, last = [], None if state is None else state.embeds
        for current in embeds:
            same = torch.arange(len(current), device=current.device)
            order = same if last is None else match_queries(last, current)
            last = current[order]
            orders.append(order)
        if last is None:
            raise ValueError("the tracker was given no frame")
        order = torch.stack(orders)[..., None]  # (T, Q, 1)
        tracked: DecoderOutput = {
            "pred_logits": _reorder(outputs["pred_logits"], order),
            "pred_embeds": _reorder(embeds, order),
            "mask_embeds": _reorder(outputs["mask_embeds"], order),
            "mask_features": outputs["mask_features"],
        }
        return tracked, QueryMatchingState(embeds=last)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.expand(-1, -1, x.shape[-1]))
