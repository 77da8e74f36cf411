"""Heads that are added to a segmenter by name (``MODEL.HEADS``), and what they are given.

A head reads what was predicted, adds entries of its own and has losses on the queries that were matched with an
instance. The meta-architecture loops over its heads and knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from vis.config import declare
from vis.layers.effective_batch import effective_mean
from vis.modeling.matchers.hungarian import Pairs
from vis.modeling.registry import HEAD_REGISTRY, lookup
from vis.modeling.transformer_decoders.masked import predict_masks

Outputs = Mapping[str, Any]
"""Of N frames, among others ``pred_embeds`` (N, Q, C), the queries of the last layer after the norm, and
``mask_features`` (N, Cm, h, w)."""


@declare
def add_config(cfg: CfgNode) -> None:
    # Heads beside those of the method, by name: BoundaryHead, QualityHead.
    cfg.MODEL.HEADS = []


@dataclass
class HeadTargets:
    """What the queries of N frames were matched with.

    Attributes:
        pairs: for each frame (queries, instances), the rows of both.
        masks: for each frame (n, H, W) bool, at the padded size.
        image_sizes: for each frame (height, width) without padding.
        num_masks: what sums over masks are divided by.
        matched_logits: frame -> mask logits (pairs, h, w) of the matched queries; no gradient is taken.
    """

    pairs: Sequence[Pairs]
    masks: Sequence[Tensor]
    image_sizes: Sequence[tuple[int, int]]
    num_masks: Tensor | float
    matched_logits: Callable[[int], Tensor]

    def masks_of_pairs(self, frame: int) -> Tensor:
        """(pairs, H, W) bool: the instance of each matched query."""
        masks = self.masks[frame]
        return masks[self.pairs[frame][1].to(masks.device)]


class QueryHead(nn.Module):
    """A head on queries. ``NAME``: its parameters are ``heads.<NAME>.*``."""

    NAME: ClassVar[str]

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        """New entries of the outputs."""
        raise NotImplementedError

    def losses(self, outputs: Outputs, targets: HeadTargets) -> dict[str, Tensor]:
        """Weighted losses by name; without any pair they are 0 and still part of the graph."""
        raise NotImplementedError

    def score_factors(self, outputs: Outputs) -> Tensor | None:
        """(N, Q), what class scores are multiplied by at test time; None: nothing."""
        return None


class Heads(nn.ModuleDict):
    """The heads of a model, in the order of ``MODEL.HEADS``; may be empty."""

    def __init__(self, heads: Iterable[QueryHead]) -> None:
        super().__init__({head.NAME: head for head in heads})

    def losses(self, outputs: Outputs, targets: HeadTargets) -> dict[str, Tensor]:
        """Losses of all heads; each sees the entries of those before it."""
        losses: dict[str, Tensor] = {}
        for head in self.values():
            outputs = {**outputs, **head(outputs)}
            losses.update(head.losses(outputs, targets))  # type: ignore[operator]
        return losses

    def score_factors(self, outputs: Outputs) -> Tensor | None:
        """(N, Q), the product of what the heads multiply class scores by; None: nothing."""
        found = [head.score_factors(outputs) for head in self.values()]  # type: ignore[operator]
        factors = [factor for factor in found if factor is not None]
        return torch.stack(factors).prod(dim=0) if factors else None


def build_heads(cfg: CfgNode, *, embed_dim: int, feature_dim: int) -> Heads:
    """The heads that ``MODEL.HEADS`` names, for queries and mask features of these widths.

    Raises:
        ValueError: a name is not known or occurs twice.
    """
    names = list(cfg.MODEL.HEADS)
    if len(set(names)) < len(names):
        raise ValueError(f"MODEL.HEADS names a head twice: {names}")
    sizes = {"embed_dim": embed_dim, "feature_dim": feature_dim}
    return Heads(lookup(HEAD_REGISTRY, name, "MODEL.HEADS")(cfg, **sizes) for name in names)


def mask_former_losses(
    heads: Heads,
    outputs: Outputs,
    pairs: Sequence[Pairs],
    masks: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """Losses of the heads on a decoder whose masks are ``mask_embeds`` (N, Q, Cm) times ``mask_features``.

    Args:
        pairs, masks, image_sizes: of each of the N frames, see :class:`HeadTargets`.
    """
    if not len(heads):
        return {}
    embeds, features = outputs["mask_embeds"], outputs["mask_features"]
    num_masks = effective_mean("heads.masks", sum(len(queries) for queries, _ in pairs), embeds.device)

    def matched_logits(frame: int) -> Tensor:
        return predict_masks(matched_rows(embeds, frame, pairs[frame])[None], features[frame, None])[0]

    return heads.losses(outputs, HeadTargets(pairs, masks, image_sizes, num_masks, matched_logits))


def refuse_unused(cfg: CfgNode, architecture: Any) -> None:
    """A method says what it has losses for: ``TAKES_HEADS``, ``TWO_STREAMS`` (of a BatchFormer), and with
    ``HEADS_IN_SCORES`` False that its results do not ask the heads.

    Raises:
        ValueError: there are heads or a BatchFormer in the configuration of a method that would not train them.
    """
    heads, name = list(cfg.MODEL.HEADS), architecture.__name__
    frozen = "sem_seg_head" in getattr(architecture, "FROZEN", ())  # it is in eval mode, where there is no stream
    if heads and frozen:
        raise ValueError(
            f"MODEL.HEADS is {heads}, but {name} leaves the segmenter as it is: train that with them (MinVIS, CTVIS) "
            f"and start {name} from its weights, with MODEL.HEADS []"
        )
    if heads and not getattr(architecture, "TAKES_HEADS", False):
        raise ValueError(f"MODEL.HEADS is {heads}, but {name} trains no such heads")
    if heads and cfg.MODEL.QUALITY_HEAD.SCORE_POWER and not getattr(architecture, "HEADS_IN_SCORES", True):
        raise ValueError(
            f"MODEL.QUALITY_HEAD.SCORE_POWER is {cfg.MODEL.QUALITY_HEAD.SCORE_POWER}, but the heads of {name} know "
            "queries of frames, and its scores are of those of videos: set it to 0"
        )
    if cfg.MODEL.BATCH_FORMER.ENABLED and not frozen and not getattr(architecture, "TWO_STREAMS", False):
        raise ValueError(f"MODEL.BATCH_FORMER.ENABLED: {name} has no losses over two streams; set it to False")


def matched_rows(values: Tensor, frame: int, pairs: Pairs) -> Tensor:
    """(pairs, ...): of (N, Q, ...) the rows of one frame's matched queries."""
    return values[frame][pairs[0].to(values.device)]
