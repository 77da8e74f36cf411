"""Quality assessment (Sun et al., "2nd Place Solution for OVIS Challenge", 2022, section 2.1.5): a query says how well
its own mask fits. Learning to say it is what helps; at test time the reports do not use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from vis.config import declare
from vis.layers.mlp import MLP
from vis.modeling.heads.build import HeadTargets, Outputs, QueryHead, matched_rows
from vis.modeling.registry import HEAD_REGISTRY


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.QUALITY_HEAD = node = type(cfg)()
    node.WEIGHT = 1.0
    # At test time class scores are multiplied by quality to the power of this. 0, as in the reports: not at all. Only
    # matched queries learn their quality, so what it says of background is not known.
    node.SCORE_POWER = 0.0


@HEAD_REGISTRY.register()
class QualityHead(QueryHead):
    """IoU that the mask of each query is expected to have."""

    NAME: ClassVar[str] = "quality"

    @configurable
    def __init__(self, *, embed_dim: int, weight: float, score_power: float) -> None:
        super().__init__()
        if score_power < 0:
            raise ValueError(f"MODEL.QUALITY_HEAD.SCORE_POWER is {score_power}, expected 0 or more")
        self.weight, self.score_power = weight, score_power
        self.embed = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=1, num_layers=2)

    @classmethod
    def from_config(cls, cfg: CfgNode, *, embed_dim: int, feature_dim: int) -> dict[str, Any]:
        node = cfg.MODEL.QUALITY_HEAD
        return {"embed_dim": embed_dim, "weight": node.WEIGHT, "score_power": node.SCORE_POWER}

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        """``pred_quality`` (N, Q) in 0..1."""
        # a reid branch appends its embeddings to those of the queries
        queries = outputs["pred_embeds"][..., : self.embed.layers[0].in_features]  # type: ignore[misc]
        return {"pred_quality": self.embed(queries)[..., 0].float().sigmoid()}

    def losses(self, outputs: Outputs, targets: HeadTargets) -> dict[str, Tensor]:
        """``loss_quality``: the mean over masks of the squared error (eq. 2 of the report)."""
        total = outputs["pred_quality"].new_zeros(())
        for frame, pairs in enumerate(targets.pairs):
            with torch.no_grad():
                logits = targets.matched_logits(frame)
                wanted = mask_iou(logits > 0, shrink(targets.masks_of_pairs(frame), logits.shape[-2:]))
            total = total + (matched_rows(outputs["pred_quality"], frame, pairs) - wanted).square().sum()
        return {"loss_quality": self.weight * total / targets.num_masks}

    def score_factors(self, outputs: Outputs) -> Tensor | None:
        """(N, Q): quality to the power of ``score_power``; None where that is 0."""
        return self(outputs)["pred_quality"] ** self.score_power if self.score_power else None


def shrink(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(n, H, W) bool -> (n, h, w) bool: cells of which at least half is inside."""
    if not len(masks):
        return masks.new_zeros(0, *size)
    return F.interpolate(masks[:, None].float(), size=tuple(size), mode="area")[:, 0] >= 0.5


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each mask of ``a`` with that of ``b``, (n, h, w) bool each -> (n,) float32; 0 where both are empty."""
    shared = (a & b).flatten(1).sum(dim=1)
    union = (a | b).flatten(1).sum(dim=1)
    return shared / union.clamp(min=1)
