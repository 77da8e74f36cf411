"""BatchFormerV2 (Hou et al., "BatchFormerV2: Exploring Sample Relationships for Dense Representation Learning", 2022).

A transformer layer in which the pictures of a batch attend to one another, each position on its own. It is trained in
two streams: one goes past the layer, one through it, and all that follows is shared and trained on both. So the layer
can be left out at test time, where a result must not depend on what else is in the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vis.layers.attention import FFNLayer, MultiheadAttention

logger = logging.getLogger(__name__)

Shapes = Sequence[tuple[int, int]]

POSITIONS = ("after", "parallel", "before")

_CHUNK = 1 << 14  # positions that attend at once: more than 2^16 exceed the grid of some CUDA kernels


class BatchFormerLayer(nn.Module):
    """Post-norm attention among pictures and a feed-forward network, positions side by side."""

    def __init__(self, *, embed_dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FFNLayer(embed_dim=embed_dim, hidden_dim=feedforward_dim, dropout=dropout)

    def forward(self, x: Tensor, others: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Pictures (S, N, C) that look at ``others`` (S, M, C), themselves among them -> (S, N, C).

        Args:
            allowed: (S, M) bool, which of the others have that position; None: all.
        """
        may_look = None if allowed is None else allowed[:, None, None].expand(-1, -1, x.shape[1], -1)
        return self.ffn(self.norm(x + self.dropout(self.self_attn(x, others, others, may_look))))


class BatchFormer(nn.Module):
    """One or more :class:`BatchFormerLayer` at one place of a network; 0.40 M parameters with 256 channels."""

    def __init__(self, *, num_layers: int = 1, across_gpus: bool = False, **layer: Any) -> None:
        """Args:
        across_gpus: pictures attend to those of all processes; else to those of their own process.
        layer: of :class:`BatchFormerLayer`.
        """
        super().__init__()
        self.across_gpus = across_gpus
        self.layers = nn.ModuleList(BatchFormerLayer(**layer) for _ in range(num_layers))

    @property
    def num_processes(self) -> int:
        """Processes whose pictures attend to one another."""
        return dist.get_world_size() if self.across_gpus and dist.is_available() and dist.is_initialized() else 1

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """(N, S, C) -> (N, S, C); ``shapes`` are the (height, width) of the levels that the S positions are of."""
        x = x.transpose(0, 1)  # (S, N, C)
        for layer in self.layers:
            others, allowed = (x, None) if self.num_processes == 1 else gather_pictures(x, shapes)
            masks = [None] * len(x) if allowed is None else allowed.split(_CHUNK)
            parts = zip(x.split(_CHUNK), others.split(_CHUNK), masks, strict=False)
            x = torch.cat([layer(own, other, mask) for own, other, mask in parts])
        return x.transpose(0, 1)


class BatchFormers(nn.ModuleDict):
    """The places of an encoder at which a second stream of pictures goes through a :class:`BatchFormer`.

    The first place doubles the batch: the first half are the pictures as they are, the second half those that went
    through it. Later places touch the second half alone.
    """

    def __init__(self, *, layers: Sequence[int], position: str, encoder_layers: int, **former: Any) -> None:
        """Args:
        layers: encoder layers, from 0, at which there is one each, not shared.
        position: "after": it takes the layer's output; "parallel": the layer's input, in the layer's stead;
            "before": the layer's input, and both streams go through the layer.
        encoder_layers: how many layers the encoder has.
        former: of :class:`BatchFormer`.

        Raises:
            ValueError: there is no such position or layer.
        """
        if position not in POSITIONS:
            raise ValueError(f"MODEL.BATCH_FORMER.POSITION is {position!r}, expected one of {', '.join(POSITIONS)}")
        if not layers or len(set(layers)) < len(layers) or not all(0 <= index < encoder_layers for index in layers):
            raise ValueError(
                f"MODEL.BATCH_FORMER.LAYERS is {list(layers)}, expected different encoder layers out of "
                f"0..{encoder_layers - 1}"
            )
        super().__init__({str(index): BatchFormer(**former) for index in sorted(layers)})
        self.position, self.first = position, min(layers)
        self._told = False

    def run(self, index: int, layer: Callable[[Tensor], Tensor], x: Tensor, shapes: Shapes) -> Tensor:
        """The encoder layer ``index`` with what stands at its place, in training; else the layer alone.

        Args:
            layer: takes any number of pictures, (N, S, C) -> (N, S, C).
            x: N pictures, or 2N after the first place.
            shapes: (height, width) of the levels.
        """
        if not self.training or str(index) not in self:
            return layer(x)
        if self.position == "before":
            return layer(self._streams(index, x, x, shapes))
        out = layer(x)
        return self._streams(index, out, out if self.position == "after" else x, shapes)

    def _streams(self, index: int, out: Tensor, source: Tensor, shapes: Shapes) -> Tensor:
        """Both streams; ``source`` is what the second one is made of."""
        former: BatchFormer = self[str(index)]  # type: ignore[assignment]
        doubled = index != self.first and len(out) % 2 == 0
        num_pictures = len(out) // 2 if doubled else len(out)
        if num_pictures * former.num_processes == 1:
            return self._alone(out) if index == self.first else out
        with torch.autocast(device_type=source.device.type, enabled=False):
            second = former(source[len(source) - num_pictures :].float(), shapes)
        return torch.cat([out[:num_pictures], second.to(out.dtype)])

    def _alone(self, out: Tensor) -> Tensor:
        """A batch of one picture: no second stream. Parameters stay in the graph, for data-parallel training waits for
        their gradients forever."""
        if not self._told:
            self._told = True
            logger.warning(
                "BatchFormer: one picture per process has no other to attend to, so it does nothing. Raise "
                "SOLVER.IMS_PER_BATCH or INPUT.SAMPLING_FRAME_NUM, or set MODEL.BATCH_FORMER.ACROSS_GPUS True"
            )
        return out + torch.stack([parameter.sum() for parameter in self.parameters()]).sum().to(out.dtype) * 0.0


def gather_pictures(x: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor | None]:
    """The pictures of all processes at the positions of this one, counted from the upper left corner of each level.

    Args:
        x: (S, N, C); sizes and N may differ between processes, the number of levels may not.

    Returns:
        (S, M, C) with gradients to every process, and (S, M) bool, False where a picture is smaller; None where all
        processes have the same sizes.
    """
    own = torch.tensor([x.shape[1], *(side for shape in shapes for side in shape)], device=x.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    counts = [int(each[0]) for each in found]
    sizes = [tuple(each[1:].tolist()) for each in found]
    if len(set(counts)) == len(set(sizes)) == 1:
        return Gather.apply(x).transpose(0, 1).flatten(1, 2), None  # type: ignore[no-untyped-call]
    common = [max(sides) for sides in zip(*sizes, strict=True)]
    places = [_places(size, common).to(x.device) for size in sizes]
    mine = places[dist.get_rank()]
    num_places = sum(h * w for h, w in zip(common[::2], common[1::2], strict=True))
    there = torch.zeros(len(sizes), num_places, max(counts), dtype=torch.bool, device=x.device)
    for row, place, count in zip(there, places, counts, strict=True):
        row[place, :count] = True
    padded = x.new_zeros(num_places, max(counts), x.shape[2])
    padded = padded.index_copy(0, mine, torch.cat([x, x.new_zeros(len(x), max(counts) - x.shape[1], x.shape[2])], 1))
    gathered = Gather.apply(padded)[:, mine]  # type: ignore[no-untyped-call]  # (processes, S, N, C)
    return gathered.transpose(0, 1).flatten(1, 2), there[:, mine].transpose(0, 1).flatten(1, 2)


def _places(size: Sequence[int], common: Sequence[int]) -> Tensor:
    """(S,) where the positions of levels of ``size`` (h, w, h, w ...) are among those of ``common``."""
    places, start = [], 0
    for h, w, height, width in zip(size[::2], size[1::2], common[::2], common[1::2], strict=True):
        places.append((start + torch.arange(h)[:, None] * width + torch.arange(w)).flatten())
        start += height * width
    return torch.cat(places)


class Gather(torch.autograd.Function):
    """(...) -> (processes, ...); the gradient of every process reaches the one that the tensor is from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(found, x.contiguous())
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]
