"""Masks by dynamic convolutions (Tian et al., CondInst, ECCV 2020), on features made of an encoder's memory.

Only queries that are asked for get a mask: at test time those that survive box NMS, in training the positives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vis.layers.dynamic_conv import aligned_bilinear, dynamic_convs, num_parameters, relative_axes
from vis.layers.mlp import MLP

#: Channels of the dynamic layers: two coordinates and eight features, two layers of eight, one logit.
WIDTHS = (10, 8, 8, 1)


class MaskBranch(nn.Module):
    """Memory at strides 8, 16 and 32 to mask features at stride 8; names are the released ones."""

    def __init__(self, *, embed_dim: int, out_channels: int = WIDTHS[0] - 2) -> None:
        super().__init__()
        middle = embed_dim // 4
        self.lay3 = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.lay4 = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.dcn = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.lay1 = nn.Conv2d(embed_dim, middle, 3, padding=1)
        self.lay2 = nn.Conv2d(middle, out_channels, 3, padding=1)
        for conv in (self.lay3, self.lay4, self.dcn, self.lay1, self.lay2):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps (N, C, h_l, w_l), fine to coarse -> (N, 8, h_0, w_0), none of it negative."""
        fine, middle, coarse = levels
        x = F.relu(self.lay3(coarse))
        x = F.relu(self.lay4(middle + F.interpolate(x, size=middle.shape[-2:], mode="nearest")))
        x = F.relu(self.dcn(fine + F.interpolate(x, size=fine.shape[-2:], mode="nearest")))
        return F.relu(self.lay2(F.relu(self.lay1(x))))


def build_controller(embed_dim: int) -> MLP:
    """From queries to the parameters of their convolutions."""
    controller = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=num_parameters(WIDTHS))
    for layer in controller.layers:
        nn.init.xavier_uniform_(layer.get_parameter("weight"))
        nn.init.zeros_(layer.get_parameter("bias"))
    return controller


def dynamic_masks(features: Tensor, parameters: Tensor, points: Tensor, *, stride: int = 8) -> Tensor:
    """Mask logits of n queries of one picture, at half of the features' stride.

    Args:
        features: (8, h, w) at ``stride``.
        parameters: (n, 169) from the controller.
        points: (n, 2) each query's (x, y) in pixels; coordinates are relative to it, in pixels, not normalised.

    Returns:
        (n, 2h, 2w).
    """
    height, width = features.shape[-2:]
    x, y = relative_axes(points, height, width, stride)
    logits = dynamic_convs(features, parameters, x, y, WIDTHS)
    return aligned_bilinear(logits, 2)[:, 0]
