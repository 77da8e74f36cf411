"""Cross attention whose residual is not its query (Zhang et al., DVIS, ICCV 2023, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from vis.layers.attention import MultiheadAttention


class ReferringAttentionLayer(nn.Module):
    """``norm(identity + attention(query, memory))``; parameters are named as in ``CrossAttentionLayer``.

    The tracker asks with what an object was in the frame before and adds the answer to what it is now, so the query
    decides where to look and nothing else. With ``identity`` as query this is plain post-norm cross attention.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, identity: Tensor, query: Tensor, memory: Tensor) -> Tensor:
        """``identity``, ``query`` (B, Q, C) and ``memory`` (B, L, C) -> (B, Q, C)."""
        return self.norm(identity + self.dropout(self.multihead_attn(query, memory, memory)))
