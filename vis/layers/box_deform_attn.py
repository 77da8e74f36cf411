"""Deformable attention as detectors use it: boxes as references, and levels of which a part is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vis.layers.ms_deform_attn import MSDeformAttn, ms_deform_attn
from vis.layers.ms_deform_attn.op import SpatialShapes, shape_pairs


class BoxDeformAttn(MSDeformAttn):
    """:class:`MSDeformAttn` whose reference may be a box (Deformable DETR, appendix A.4), in float32.

    Around a point, offsets count cells of the level; in a box, an offset of ``num_points`` is half of the box's side.
    """

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        source: Tensor,
        spatial_shapes: SpatialShapes,
        level_start_index: Sequence[int] | Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``query`` (N, Lq, C) to ``source`` (N, S, C).

        Args:
            reference_points: (1 or N, Lq, L, 2) points (x, y) or (1 or N, Lq, L, 4) boxes (x, y, w, h) in 0..1.
            padding: (N, S) bool, True for rows of ``source`` that are read as zero; None: none.

        Returns:
            (N, Lq, C).
        """
        num, length = query.shape[:2]
        sampled = (num, length, self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(source)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        weights = self.attention_weights(query).view(num, length, self.num_heads, -1).softmax(dim=-1)
        offsets = self.sampling_offsets(query).view(*sampled, 2)
        reference = reference_points[:, :, None, :, None, :]
        if reference.shape[-1] == 4:
            offsets = offsets / self.num_points * reference[..., 2:] * 0.5
        else:
            sides = [[width, height] for height, width in shape_pairs(spatial_shapes)]
            offsets = offsets / torch.tensor(sides, device=query.device, dtype=offsets.dtype)[:, None]
        value = value.unflatten(-1, (self.num_heads, -1))
        locations = reference[..., :2] + offsets
        return self.output_proj(
            ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights.view(sampled))
        )
