"""A stack of linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vis.layers.linear import Linear


class MLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them; parameters are named ``layers.{i}``."""

    def __init__(self, *, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int = 3) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) -> (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
