"""Embeddings by which detections of different frames are told to be one object.

:class:`TrackHead` is MaskTrack R-CNN's (Yang et al., "Video Instance Segmentation", ICCV 2019, section 4): two linear
layers on the pooled features of a box. (CondInst has no pooled boxes; its tower of embeddings is part of its dense
head, :mod:`vis.modeling.heads.fcos`.) :class:`MatchLogits` compares embeddings, in training and at test time alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Initial weights of MaskTrack R-CNN's linear layers.
_STD = 0.01


class TrackHead(nn.Module):
    """Pooled features of n boxes -> embeddings."""

    def __init__(self, *, in_features: int, hidden_dim: int = 1024, embed_dim: int = 1024, last_relu: bool = False):
        """Args:
        in_features: channels times pooled area (256 * 7 * 7).
        last_relu: ReLU after the second layer too, as in mmtracking; the original has none there.
        """
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_dim), nn.Linear(hidden_dim, embed_dim)
        self.last_relu = last_relu
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, embed_dim)."""
        embeds = self.fc2(F.relu(self.fc1(pooled.flatten(1))))
        return F.relu(embeds) if self.last_relu else embeds


class MatchLogits:
    """Logits of each detection for "a new object" and for every known one. Without parameters.

    ``product``: the product of the embeddings, as MaskTrack R-CNN has it. ``cosine``: the cosine over a temperature.
    The logit of a new object is 0 in both.
    """

    KINDS = ("product", "cosine")

    def __init__(self, *, kind: str = "product", temperature: float = 1.0) -> None:
        """Args:
        kind: one of :attr:`KINDS`.
        temperature: of cosines; products have none.
        """
        if kind not in self.KINDS:
            raise ValueError(f"MODEL.MASKTRACK.SIMILARITY is {kind!r}, expected one of {', '.join(self.KINDS)}")
        if not temperature > 0:
            raise ValueError(f"MODEL.MASKTRACK.TEMPERATURE is {temperature}, expected a number above 0")
        self.kind, self.temperature = kind, temperature

    def __call__(self, embeds: Tensor, known: Tensor) -> Tensor:
        """Embeddings (m, C) of detections, (n, C) of known objects -> (m, 1+n) float32, column 0 of a new object."""
        # In float32: a product of many channels has no place in half precision.
        with torch.autocast(device_type=embeds.device.type, enabled=False):
            embeds, known = embeds.float(), known.float()
            if self.kind == "cosine":
                embeds, known = F.normalize(embeds, dim=1) / self.temperature, F.normalize(known, dim=1)
            return F.pad(embeds @ known.T, (1, 0))
