"""Embeddings that tell instances apart (Wu et al., IDOL, ECCV 2022, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.layers.mlp import MLP
from vis.modeling.losses.contrastive import contrastive_loss

#: Negatives that the cosine loss compares with, for each positive.
_NEGATIVES_PER_POSITIVE = 10


class ContrastiveHead(MLP):
    """Queries to embeddings that are compared by their products; the output is not normalised."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=embed_dim)


def key_reference_losses(anchor: Tensor, keys: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Losses of one instance between two frames.

    The contrastive loss log(1 + sum over pairs of exp(v.k- - v.k+)) counts all keys. The auxiliary one, the mean of
    (cos(v, k) - y)^2, counts the positives (y = 1) and ten times as many random negatives (y = 0).

    Args:
        anchor: (C,) the instance in the key frame.
        keys: (Q, C) queries of the reference frame; positive, negative: (Q,) bool, which of them are the instance, and
            which are not; one may be neither.

    Returns:
        (2,) float32: contrastive, auxiliary.
    """
    anchor, keys = anchor.float(), keys.float()
    with torch.autocast(
        device_type=keys.device.type, enabled=False
    ):  # products of many channels overflow half precision
        similarity = keys @ anchor
    contrastive = contrastive_loss(similarity[None], positive[None], negative[None])[0]
    own, others = positive.nonzero()[:, 0], negative.nonzero()[:, 0]
    count = min(_NEGATIVES_PER_POSITIVE * max(len(own), 1), len(others))
    # Drawn on the CPU: one seed, one training, whatever the device.
    drawn = others[torch.randperm(len(others))[:count].to(others.device)]
    compared = keys[torch.cat([own, drawn])]
    wanted = torch.cat([compared.new_ones(len(own)), compared.new_zeros(len(drawn))])
    auxiliary = (F.cosine_similarity(anchor[None], compared, dim=-1) - wanted).square()
    return torch.stack([contrastive, auxiliary.mean() if len(compared) else auxiliary.sum()])
