"""The encoder of Deformable DETR (Zhu et al., ICLR 2021), over pictures that are padded to a common size.

Its layers are those of :mod:`.msdeformattn`; what differs is that padding is known: it is read as zero, positions and
reference points count from the valid part of each picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vis.layers.batch_former import BatchFormers
from vis.layers.box_deform_attn import BoxDeformAttn
from vis.modeling.pixel_decoders.msdeformattn import EncoderLayer, Shapes, cell_centres


@dataclass
class PaddedLevels:
    """The valid part of the levels of N pictures.

    Attributes:
        shapes: (height, width) of each level; starts: first row of each among all S cells.
        inside: for each level (N, h, w) bool, True where the picture is.
        valid_ratios: (N, L, 2), the valid share of each level's width and height.
        padding: (N, S) bool, True outside the picture; None where no picture is padded.
    """

    shapes: Shapes
    inside: list[Tensor]
    valid_ratios: Tensor
    padding: Tensor | None

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(h * w for h, w in self.shapes[:-1])]

    @classmethod
    def of(
        cls, shapes: Shapes, image_sizes: Sequence[tuple[int, int]], padded: tuple[int, int], device: torch.device
    ) -> PaddedLevels:
        """Args:
        shapes: levels, fine to coarse; the last was made of a projected level, the others by the backbone.
        image_sizes: (height, width) of each picture, without padding; padded: their common size.
        """
        axes = [_valid_axis([size[axis] for size in image_sizes], padded[axis], device) for axis in (0, 1)]
        levels = [(_nearest(axes[0], h), _nearest(axes[1], w)) for h, w in shapes[:-1]]
        # Released: the mask of the coarsest level is made from that of the finest one.
        levels.append((_nearest(levels[0][0], shapes[-1][0]), _nearest(levels[0][1], shapes[-1][1])))
        ratios = [torch.stack([x.float().mean(dim=1), y.float().mean(dim=1)], dim=1) for y, x in levels]
        inside = [y[:, :, None] & x[:, None, :] for y, x in levels]
        any_padding = any(tuple(size) != tuple(padded) for size in image_sizes)
        padding = ~torch.cat([level.flatten(1) for level in inside], dim=1) if any_padding else None
        return cls(shapes, inside, torch.stack(ratios, dim=1), padding)

    def reference_points(self) -> Tensor:
        """(N, S, L, 2): the centre (x, y) of every cell, in shares of the valid part, as each level counts them."""
        centres = cell_centres(tuple(self.shapes), self.valid_ratios.device)  # (1, S, 1, 2) in shares of the level
        repeats = torch.tensor([h * w for h, w in self.shapes], device=centres.device)
        own = self.valid_ratios.repeat_interleave(repeats, dim=1, output_size=centres.shape[1])  # (N, S, 2)
        return centres / own[:, :, None] * self.valid_ratios[:, None]


def _valid_axis(sides: Sequence[int], length: int, device: torch.device) -> Tensor:
    """(N, length) bool, True for the first ``sides[n]``."""
    return torch.arange(length, device=device)[None] < torch.tensor(list(sides), device=device)[:, None]


def _nearest(axis: Tensor, length: int) -> Tensor:
    return F.interpolate(axis[:, None].float(), size=length)[:, 0].bool()


def valid_position_encoding(inside: Tensor, num_channels: int) -> Tensor:
    """Sine encoding of the valid part, cells counted at their centres (in DETR's own encoding at their ends).

    Args:
        inside: (N, h, w) bool, True where the picture is.

    Returns:
        (N, h*w, num_channels) float32: first half for the row, second half for the column.
    """
    half = num_channels // 2
    channel = torch.arange(half, dtype=torch.float32, device=inside.device)
    wavelength = 10000.0 ** (2 * torch.div(channel, 2, rounding_mode="floor") / half)
    count = inside.float()
    parts = []
    for dim in (1, 2):
        position = count.cumsum(dim)
        last = position.narrow(dim, position.shape[dim] - 1, 1)
        angle = ((position - 0.5) / (last + 1e-6) * (2 * math.pi))[..., None] / wavelength
        parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(3))
    return torch.cat(parts, dim=-1).flatten(1, 2)


class PaddedEncoderLayer(EncoderLayer):
    """An :class:`EncoderLayer` that reads padding as zero."""

    self_attn: BoxDeformAttn

    def __init__(self, **layer: Any) -> None:
        super().__init__(**layer)
        sizes = {name: layer[name] for name in ("embed_dim", "num_levels", "num_heads", "num_points")}
        self.self_attn = BoxDeformAttn(**sizes)

    def forward(  # type: ignore[override]  # one argument more
        self,
        x: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        shapes: Shapes,
        starts: list[int],
        padding: Tensor | None,
    ) -> Tensor:
        """(N, S, C) -> (N, S, C)."""
        attended = self.self_attn(x + pos, reference_points, x, shapes, starts, padding)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableEncoder(nn.Module):
    """A stack of :class:`PaddedEncoderLayer`."""

    def __init__(self, *, num_layers: int, use_checkpoint: bool = False, **layer: Any) -> None:
        """Args: ``use_checkpoint``: recompute the layers in the backward pass."""
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.layers = nn.ModuleList(PaddedEncoderLayer(**layer) for _ in range(num_layers))

    def forward(self, x: Tensor, pos: Tensor, levels: PaddedLevels, bf: BatchFormers | None = None) -> Tensor:
        """Cells of all levels (N, S, C) -> (N, S, C); ``pos`` is added to the queries.

        2N with ``bf`` in training, see :class:`~vis.layers.batch_former.BatchFormers`.
        """
        references = levels.reference_points()
        recompute = self.use_checkpoint and self.training and torch.is_grad_enabled()

        def run(layer: nn.Module, x: Tensor) -> Tensor:
            streams = len(x) // len(pos)
            own = (repeated(pos, streams), repeated(references, streams), levels.shapes, levels.starts)
            arguments = (x, *own, None if levels.padding is None else repeated(levels.padding, streams))
            return checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)

        for i, layer in enumerate(self.layers):
            x = run(layer, x) if bf is None else bf.run(i, partial(run, layer), x, levels.shapes)
        return x


def repeated(x: Tensor, times: int) -> Tensor:
    """(N, ...) -> (times * N, ...), one after the other; ``x`` itself once."""
    return x if times == 1 else x.repeat(times, *[1] * (x.dim() - 1))
