"""Association of IAI (Zhu et al., ECCV 2022, sections 3.1 and 3.2): features of a frame that know who was where before.

Identities of a frame are written as a map of channels, which the identity bank turns into an embedding of each token.
Frames that were seen offer keys and values with that embedding; the next frame reads them, and what it reads replaces
a part of the backbone's last features, so that all heads of the image model see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from vis.layers.hybrid_association import HybridAssociationLayer, Memory
from vis.layers.position_encoding import sine_position_encoding

#: In a map of identities: a pixel that is of no channel, not even of the background.
NO_CHANNEL = 255
_STRIDE = 32  # of the features, and of the identity bank


class Looked(NamedTuple):
    """One layer's view of a frame: input (B, L, C), normalised tokens and keys, see ``HybridAssociationLayer.look``."""

    tokens: Tensor
    normed: Tensor
    keys: Tensor


@dataclass(frozen=True)
class StoredFrame:
    """Memories of one frame, one for each layer. ``kept``: the first frame, or one in which an object was new."""

    layers: tuple[Memory, ...]
    kept: bool


@dataclass(frozen=True)
class AssociationMemory:
    """What is remembered of one video.

    Attributes:
        step, last: number of the last frame and of the last one that was stored, as the release counts them.
        before: the frame before; stored: earlier frames in their order.
    """

    step: int = 0
    last: int = -1
    before: StoredFrame | None = None
    stored: tuple[StoredFrame, ...] = ()

    def wants(self, interval: int, new: bool) -> bool:
        """Whether the frame that comes after ``step - 1`` is stored: 0, 2, 5, 8, ... or with a new object."""
        return self.before is None or new or self.step - self.last >= interval


@dataclass(frozen=True)
class CurrentFrame:
    """A frame that was read and not yet written: what each layer saw; the first layer's input; (h, w) of tokens."""

    looked: tuple[Looked, ...]
    tokens: Tensor
    size: tuple[int, int]


class IdentityBank(nn.Module):
    """Embeds a map of identities: a convolution of its one-hot form with one channel for each identity and background.

    Only channels that occur are convolved, since all others are zero.
    """

    def __init__(self, *, num_ids: int, dim: int, kernel: int = 33, released_init: bool = False) -> None:
        """Args: ``released_init``: weights begin as noise alone, so that the embedding of a mask is next to nothing
        beside the normalised tokens it is added to. Else a channel begins as a vector of about their length, times the
        share of a token's surroundings that the mask covers.
        """
        super().__init__()
        self.num_ids, self.kernel = num_ids, kernel
        self.weight = nn.Parameter(torch.empty(dim, num_ids + 1, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(dim))
        nn.init.xavier_uniform_(self.weight)
        if not released_init:
            with torch.no_grad():
                self.weight.add_(torch.randn(dim, num_ids + 1, 1, 1) / kernel**2)
        # As a convolution's. Before the first frame the embedding is this bias alone.
        bound = (self.weight[0].numel()) ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, labels: Tensor) -> Tensor:
        """Maps of identities (B, H, W), background ``num_ids`` -> (B, h*w, C); H and W are multiples of 32.

        Raises:
            ValueError: a size that is no multiple.
        """
        if labels.shape[1] % _STRIDE or labels.shape[2] % _STRIDE:
            raise ValueError(f"a map of identities is {tuple(labels.shape[1:])}, expected multiples of {_STRIDE}")
        present = labels.unique().long()
        present = present[present <= self.num_ids]
        if not len(present):
            return self.nothing(len(labels), labels.shape[1] * labels.shape[2] // _STRIDE**2)
        one_hot = (labels[:, None] == present[:, None, None]).to(self.weight.dtype)
        weight = self.weight.index_select(1, present)
        embeds = F.conv2d(one_hot, weight, self.bias, stride=_STRIDE, padding=self.kernel // 2)
        return embeds.flatten(2).transpose(1, 2)

    def nothing(self, batch: int, tokens: int) -> Tensor:
        """The embedding of a map without any channel, (B, tokens, C)."""
        return self.bias.expand(batch, tokens, -1)


class Association(nn.Module):
    """Reads and writes memories. Parameters are its own, a video's memory is an :class:`AssociationMemory`."""

    def __init__(
        self,
        *,
        channels: int,
        num_ids: int,
        dim: int,
        num_layers: int,
        global_interval: int,
        max_global_frames: int,
        class_projector: bool = True,
        released_init: bool = False,
        **layer: bool | int | float,
    ) -> None:
        """Args:
        channels: of the backbone's last features, which the result has too.
        global_interval: every which frame is stored; max_global_frames: how many at most, -1 for all. Beyond it the
            oldest goes, frames with new objects last and the first frame never.
        class_projector: beside association the result has a projection of the features (paper, Table 5); without it
            zeros, so that the image model's layers keep their shape.
        layer: options of :class:`~vis.layers.hybrid_association.HybridAssociationLayer`.

        Raises:
            ValueError: the layers need more channels than there are, or an option that cannot be.
        """
        super().__init__()
        projected = channels - dim * (1 + num_layers)
        if num_layers < 1 or projected <= 0:
            raise ValueError(
                f"MODEL.IAI: {num_layers} layers of {dim} channels do not fit into the {channels} of res5: NUM_LAYERS "
                "at least 1, DIM * (1 + NUM_LAYERS) below the channels of res5"
            )
        if global_interval < 1 or (max_global_frames != -1 and max_global_frames < 1):
            raise ValueError(
                f"MODEL.IAI.GLOBAL_INTERVAL is {global_interval}, MODEL.IAI.MAX_GLOBAL_FRAMES {max_global_frames}: "
                "expected at least 1 frame, or -1 for the second"
            )
        if not (layer.get("use_local", True) or layer.get("use_global", True)):
            raise ValueError("MODEL.IAI.LOCAL and MODEL.IAI.GLOBAL are both False: set MODEL.IAI.ASSOCIATION False")
        self.dim, self.global_interval, self.max_global_frames = dim, global_interval, max_global_frames
        self.enc_proj = nn.Conv2d(channels, dim, 1)
        self.cls_proj = nn.Conv2d(channels, projected, 1) if class_projector else None
        self.missing = 0 if class_projector else projected
        self.id_bank = IdentityBank(num_ids=num_ids, dim=dim, released_init=released_init)
        self.layers = nn.ModuleList(
            HybridAssociationLayer(dim=dim, drop_global=index > 0, **layer)  # type: ignore[arg-type]
            for index in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_layers))
        if released_init:
            # Everything of more than one dimension, so gates and offsets too, which else begin as identity.
            for parameter in self.layers.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_node(cls, node: CfgNode, *, channels: int) -> Association:
        """From ``cfg.MODEL.IAI``."""
        return cls(
            channels=channels,
            num_ids=node.NUM_IDS,
            dim=node.DIM,
            num_layers=node.NUM_LAYERS,
            global_interval=node.GLOBAL_INTERVAL,
            max_global_frames=node.MAX_GLOBAL_FRAMES,
            class_projector=node.CLS_PROJECTOR,
            released_init=node.RELEASED.INIT,
            self_heads=node.SELF_HEADS,
            attn_heads=node.ATTN_HEADS,
            ffn_dim=node.FFN_DIM,
            window_radius=node.WINDOW_RADIUS,
            drop_path=node.DROP_PATH,
            drop_per_token=node.RELEASED.DROP_PATH,
            use_self=node.SELF,
            use_local=node.LOCAL,
            use_global=node.GLOBAL,
        )

    def read(self, res5: Tensor, memory: AssociationMemory) -> tuple[Tensor, CurrentFrame]:
        """One frame of one video (1, C, h, w) -> features that replace it, of the same shape, and what to write.

        A video's first frame reads itself, with nobody in it.
        """
        x, size, pos = self._tokens(res5)
        nobody = self.id_bank.nothing(len(x), x.shape[1]) if memory.before is None else None
        outputs, looked = self._pass(x, size, pos, memory, nobody)
        return self._replacement(res5, x, outputs), CurrentFrame(looked, x, size)

    def write(
        self, current: CurrentFrame, labels: Tensor, memory: AssociationMemory, *, new: bool
    ) -> AssociationMemory:
        """The memory after a frame.

        Args:
            labels: map of identities (1, H, W) at the padded input size; new: an object was seen for the first time.
        """
        embeds = self.id_bank(labels)
        looked = current.looked
        if memory.before is None and len(self.layers) > 1:
            # Read once more, now with the identities: deeper layers remember what this gives.
            pos = self._positions(current.size, current.tokens)
            _, looked = self._pass(current.tokens, current.size, pos, memory, embeds)
        first = memory.before is None
        layers = tuple(
            Memory(seen.keys, layer.values(seen.normed, embeds))
            for seen, (layer, _) in zip(looked, self._parts(), strict=True)
        )
        frame = StoredFrame(layers, kept=first or new)
        if first:
            return AssociationMemory(step=1, last=0, before=frame, stored=(frame,))
        memory = replace(memory, step=memory.step + 1, before=frame)
        if not memory.wants(self.global_interval, new):
            return memory
        return replace(memory, last=memory.step, stored=self._bounded((*memory.stored, frame)))

    def forward(self, res5: Tensor, labels: Tensor, stored: Tensor) -> Tensor:
        """All frames of B clips at once, whose identities are known: (B, T, C, h, w) -> the same shape.

        The numbers are those of :meth:`read` and :meth:`write` in turns: layer by layer, what a frame offers does not
        depend on what later ones read.

        Args:
            labels: (B, T, H, W) maps of identities.
            stored: (B, T, T) bool on the CPU, the frames s that frame t reads as stored ones: :func:`stored_frames`.
        """
        batch, length = res5.shape[:2]
        x, size, pos = self._tokens(res5.flatten(0, 1))
        x = x.unflatten(0, (batch, length))
        tokens, outputs = x, []
        embeds = torch.stack([self.id_bank(clip) for clip in labels])  # a clip has few channels, all clips have many
        nobody = self.id_bank.nothing(batch, x.shape[2])
        # What the first frame's memory is made of in deeper layers: it was read once more, see `write`.
        again = x[:, 0]
        used = stored[:, 1:].flatten(0, 1).any(dim=0).nonzero()[:, 0]
        allowed = stored[:, 1:, used]
        for index, (layer, norm) in enumerate(self._parts()):
            x, normed, keys = (y.unflatten(0, (batch, length)) for y in layer.look(x.flatten(0, 1), pos))
            values = layer.values(normed, embeds)
            alone = Memory(keys[:, 0], layer.values(normed[:, 0], nobody))
            if index == 0:
                again_x, again_keys, again_values = x[:, 0], keys[:, 0], values[:, 0]
            else:
                again_x, again_normed, again_keys = layer.look(again, pos)
                again_values = layer.values(again_normed, embeds[:, 0])
            if len(self.layers) > 1:
                itself = Memory(again_keys, again_values)
                again = layer.read(again_x, again_keys, itself, itself, size)
            all_keys = torch.cat([again_keys[:, None], keys[:, 1:]], dim=1)
            all_values = torch.cat([again_values[:, None], values[:, 1:]], dim=1)
            out = [layer.read(x[:, 0], keys[:, 0], alone, alone, size)[:, None]]
            if length > 1:
                far, seen = _far_memory(all_keys, all_values, used, allowed)
                near = Memory(all_keys[:, :-1].flatten(0, 1), all_values[:, :-1].flatten(0, 1))
                later = layer.read(x[:, 1:].flatten(0, 1), keys[:, 1:].flatten(0, 1), far, near, size, seen)
                out.append(later.unflatten(0, (batch, length - 1)))
            x = torch.cat(out, dim=1)
            outputs.append(norm(x).flatten(0, 1))
        replaced = self._replacement(res5.flatten(0, 1), tokens.flatten(0, 1), outputs)
        return replaced.unflatten(0, (batch, length))

    def _parts(self) -> Iterator[tuple[HybridAssociationLayer, nn.Module]]:
        """Layers with the norms of their outputs."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            yield cast(HybridAssociationLayer, layer), norm

    def _tokens(self, res5: Tensor) -> tuple[Tensor, tuple[int, int], Tensor]:
        size = (int(res5.shape[-2]), int(res5.shape[-1]))
        x = self.enc_proj(res5).flatten(2).transpose(1, 2)
        return x, size, self._positions(size, x)

    def _positions(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """(h*w, C)."""
        pos = sine_position_encoding(*size, self.dim, like.device, first=0)
        return pos.flatten(2)[0].T.to(like.dtype)

    def _pass(
        self, x: Tensor, size: tuple[int, int], pos: Tensor, memory: AssociationMemory, own: Tensor | None
    ) -> tuple[list[Tensor], tuple[Looked, ...]]:
        """All layers; with ``own`` identities (1, h*w, C) the frame reads itself, else the memory."""
        outputs, looked = [], []
        for index, (layer, norm) in enumerate(self._parts()):
            seen = Looked(*layer.look(x, pos))
            if own is not None:
                far = near = Memory(seen.keys, layer.values(seen.normed, own))
            else:
                assert memory.before is not None
                near = memory.before.layers[index]
                parts = [frame.layers[index] for frame in memory.stored]
                far = Memory(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
            x = layer.read(seen.tokens, seen.keys, far, near, size)
            outputs.append(norm(x))
            looked.append(seen)
        return outputs, tuple(looked)

    def _replacement(self, res5: Tensor, tokens: Tensor, outputs: list[Tensor]) -> Tensor:
        """Concatenation of the encoder's tokens, each layer's output and the projection of the features."""
        maps = [x.transpose(1, 2).unflatten(2, res5.shape[-2:]) for x in (tokens, *outputs)]
        rest = F.pad(res5[:, :0], (0, 0, 0, 0, 0, self.missing)) if self.cls_proj is None else self.cls_proj(res5)
        return torch.cat([*maps, rest.to(maps[0].dtype)], dim=1)

    def _bounded(self, frames: tuple[StoredFrame, ...]) -> tuple[StoredFrame, ...]:
        if self.max_global_frames == -1 or len(frames) <= self.max_global_frames:
            return frames
        # The first and the newest stay; one with a new object goes when there are only such.
        oldest = next((i for i, frame in enumerate(frames[:-1]) if i and not frame.kept), 1)
        return frames[:oldest] + frames[oldest + 1 :]


def _far_memory(keys: Tensor, values: Tensor, used: Tensor, allowed: Tensor) -> tuple[Memory, Tensor | None]:
    """Memories (B, T, L, C) of the frames ``used`` for each later frame (B*(T-1), S*L, C), and who may look where.

    Args:
        allowed: (B, T-1, S) bool, on the CPU.
    """
    later, tokens = allowed.shape[1], keys.shape[2]
    chosen = (x[:, used].flatten(1, 2)[:, None].expand(-1, later, -1, -1).flatten(0, 1) for x in (keys, values))
    if bool(allowed.all()):
        return Memory(*chosen), None
    mask = allowed.flatten(0, 1)[:, None, None, :, None].expand(-1, 1, 1, -1, tokens).flatten(3)
    return Memory(*chosen), mask.to(keys.device)


def stored_frames(new: Tensor, interval: int) -> Tensor:
    """Which frames are stored when a frame of a clip is read.

    Args:
        new: (T,) bool, an object is seen for the first time; all False for the release's training.

    Returns:
        (T, T) bool: row t, the frames s < t that are stored by then.
    """
    stored = torch.zeros(len(new), len(new), dtype=torch.bool)
    memory = AssociationMemory()
    nothing = StoredFrame((), kept=False)
    for t in range(len(new)):
        memory = replace(memory, step=t + 1)
        if memory.wants(interval, bool(new[t])):
            memory = replace(memory, last=t + 1 if t else 0, before=nothing)
            stored[t + 1 :, t] = True
    return stored
