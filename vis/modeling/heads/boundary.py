"""Boundary branch (Sun et al., "2nd Place Solution for OVIS Challenge", 2022, section 2.1.4; the winner of long videos
of the 4th LSVOS challenge has the same): where objects meet, their outlines are predicted too.

As with masks, a query predicts the weights of a 1x1 convolution over a map of features, here one of its own so that
those of the masks stay what they are. The branch is for training; at test time nothing reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.config import declare
from vis.layers.mlp import MLP
from vis.modeling.heads.build import HeadTargets, Outputs, QueryHead, matched_rows
from vis.modeling.pixel_decoders.msdeformattn import num_groups
from vis.modeling.registry import HEAD_REGISTRY


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.BOUNDARY_HEAD = node = type(cfg)()
    # loss_boundary = DICE_WEIGHT * dice + CE_WEIGHT * cross entropy; the reports give no weights.
    node.DICE_WEIGHT = 1.0
    node.CE_WEIGHT = 1.0
    # Weight of boundary pixels in the cross entropy: they are few.
    node.POSITIVE_WEIGHT = 1.0
    # A pixel is on the boundary where the Laplacian of its mask, 0 to 8, exceeds this; the reports give no value.
    node.THRESHOLD = 0.0


@HEAD_REGISTRY.register()
class BoundaryHead(QueryHead):
    """Outlines of the objects of matched queries, on both sides of the edge."""

    NAME: ClassVar[str] = "boundary"

    @configurable
    def __init__(
        self,
        *,
        embed_dim: int,
        feature_dim: int,
        dice_weight: float,
        ce_weight: float,
        positive_weight: float,
        threshold: float,
    ) -> None:
        super().__init__()
        self.dice_weight, self.ce_weight = dice_weight, ce_weight
        self.positive_weight, self.threshold = positive_weight, threshold
        self.embed = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=feature_dim)
        self.features = nn.Sequential(
            nn.Conv2d(feature_dim, feature_dim, 3, padding=1, bias=False),
            nn.GroupNorm(num_groups(feature_dim), feature_dim),
            nn.ReLU(),
        )
        nn.init.kaiming_uniform_(self.features[0].weight, a=1)  # type: ignore[arg-type]  # it is a tensor

    @classmethod
    def from_config(cls, cfg: CfgNode, *, embed_dim: int, feature_dim: int) -> dict[str, Any]:
        node = cfg.MODEL.BOUNDARY_HEAD
        return {
            "embed_dim": embed_dim,
            "feature_dim": feature_dim,
            "dice_weight": node.DICE_WEIGHT,
            "ce_weight": node.CE_WEIGHT,
            "positive_weight": node.POSITIVE_WEIGHT,
            "threshold": node.THRESHOLD,
        }

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        """``boundary_embeds`` (N, Q, Cm) and ``boundary_features`` (N, Cm, h, w); logits are their product."""
        # a reid branch appends its embeddings to those of the queries
        queries = outputs["pred_embeds"][..., : self.embed.layers[0].in_features]  # type: ignore[misc]
        return {"boundary_embeds": self.embed(queries), "boundary_features": self.features(outputs["mask_features"])}

    def losses(self, outputs: Outputs, targets: HeadTargets) -> dict[str, Tensor]:
        """``loss_boundary``: of each matched query over all its pixels, since points would miss thin lines."""
        embeds, features = outputs["boundary_embeds"], outputs["boundary_features"]
        total = features.new_zeros((), dtype=torch.float32)
        for frame, pairs in enumerate(targets.pairs):
            logits = (matched_rows(embeds, frame, pairs) @ features[frame].flatten(1)).float()  # (pairs, h*w)
            wanted = boundary_targets(
                targets.masks_of_pairs(frame), targets.image_sizes[frame], features.shape[-2:], self.threshold
            ).flatten(1)
            weight = logits.new_tensor(self.positive_weight)
            ce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none", pos_weight=weight).mean(dim=1)
            dice = squared_dice(logits.sigmoid(), wanted)
            total = total + (self.dice_weight * dice + self.ce_weight * ce).sum()
        return {"loss_boundary": total / targets.num_masks}


def squared_dice(p: Tensor, q: Tensor) -> Tensor:
    """1 - 2 sum p q / (sum p^2 + sum q^2 + 1) over pixels (eq. 1 of the report): (R, P) each -> (R,)."""
    return 1 - 2 * (p * q).sum(dim=1) / (p.square().sum(dim=1) + q.square().sum(dim=1) + 1)


def boundary_of(masks: Tensor, threshold: float = 0.0) -> Tensor:
    """Pixels where the 3x3 Laplacian (8 in the middle, -1 around it) of a mask exceeds ``threshold`` in size.

    Beyond its border a picture goes on as at the border, so that an object that is cut off there has no outline there.

    Args:
        masks: (n, H, W) bool.

    Returns:
        (n, H, W) bool: with a threshold below 1 every pixel with a neighbour that differs, on both sides of the edge.
    """
    if not masks.numel():
        return masks
    kernel = torch.full((1, 1, 3, 3), -1.0, device=masks.device)
    kernel[..., 1, 1] = 8.0
    with torch.autocast(device_type=masks.device.type, enabled=False):
        laplacian = F.conv2d(F.pad(masks[:, None].float(), (1, 1, 1, 1), mode="replicate"), kernel)[:, 0]
    return laplacian.abs() > threshold


@torch.no_grad()
def boundary_targets(masks: Tensor, image_size: tuple[int, int], size: Sequence[int], threshold: float) -> Tensor:
    """(n, h, w) float32, 1 for cells that contain a boundary pixel; padding is background, as in the mask losses.

    Args:
        masks: (n, H, W) bool, padded; image_size: (height, width) of what is picture in them; size: (h, w).
    """
    if not len(masks):
        return masks.new_zeros(0, *size, dtype=torch.float32)
    height, width = image_size
    edge = torch.zeros_like(masks, dtype=torch.float32)
    edge[:, :height, :width] = boundary_of(masks[:, :height, :width], threshold).float()
    return F.adaptive_max_pool2d(edge[:, None], tuple(size))[:, 0]
