"""Noise on what the referring tracker starts from, which it learns to remove (DVIS at LSVOS 2024, section 3.1).

Without noise the tracker is trained on starting points that heuristic matching has put in the right slots already, so
all it learns is to let them pass. A frame's slots are therefore shuffled, averaged or spliced now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vis.layers.item_streams import of_item

MODES = ("none", "wa", "cc", "rs")
_INDICES = ("order", "first", "partner")


@dataclass
class Start:
    """Where the slots of one frame of B videos start from; on the CPU until it is used.

    Attributes:
        order: (B, Q) int64, the segmenter's query that each slot counts as from here on.
        first, partner: (B, Q) int64, the queries that a slot is mixed from.
        share: (B, Q, 1) or (B, Q, C) in 0..1, the part of ``first`` in it; None: all of it.
    """

    order: Tensor
    first: Tensor
    partner: Tensor
    share: Tensor | None = None

    def apply(self, embeds: Tensor) -> Tensor:
        """The segmenter's queries (B, Q, C) -> what the slots start from (B, Q, C)."""
        first = take(embeds, self.first)
        if self.share is None:
            return first
        share = self.share.to(embeds.device, embeds.dtype)
        return share * first + (1 - share) * take(embeds, self.partner)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (..., Q) of ``x`` (..., Q, C); an index on the CPU is brought to ``x``."""
    return x.gather(-2, index.to(x.device)[..., None].expand(*index.shape, x.shape[-1]))


class StartNoise:
    """Draws the noise of a frame, for each video on its own, from torch's generator of the CPU.

    Modes, for slot i with a partner j: ``wa`` weighted average a*q_i + (1-a)*q_j with a ~ U(0, 1); ``cc`` crop and
    concatenate, q_i before channel k and q_j from there, k uniform; ``rs`` a random shuffle of all slots; ``none``.
    """

    def __init__(self, *, mode: str, ratio: float, base: str, partner: str) -> None:
        """Args:
        ratio: probability that a video's frame gets noise.
        base: what is mixed, "matched": slots in track order; "unmatched": in the segmenter's (released DVIS++).
        partner: "iid": every slot draws its own; "permutation": no query is partner twice (released DVIS++).

        Raises:
            ValueError: a value is not one of these.
        """
        for key, value, known in (
            ("MODE", mode, MODES),
            ("BASE", base, ("matched", "unmatched")),
            ("PARTNER", partner, ("iid", "permutation")),
        ):
            if value not in known:
                raise ValueError(f"MODEL.TRACKER.NOISE_{key} is {value!r}, expected one of {', '.join(known)}")
        if not 0 <= ratio <= 1:
            raise ValueError(f"MODEL.TRACKER.NOISE_RATIO is {ratio}, expected a probability in 0..1")
        self.mode, self.ratio, self.base, self.partner = mode, ratio, base, partner

    def draw(self, order: Tensor, channels: int) -> Start:
        """The start of one frame: ``order`` (B, Q) is the heuristic match, ``channels`` the C of the queries."""
        videos = []
        for b in range(len(order)):
            with of_item(b, len(order)):
                videos.append(self._draw(order[b : b + 1], channels))
        return videos[0] if len(videos) == 1 else _joined(videos)

    def _draw(self, order: Tensor, channels: int) -> Start:
        noisy = (torch.rand(len(order), 1) < self.ratio) & (self.mode != "none")  # (B, 1)
        if not noisy.any():
            return Start(order, order, order)
        base = order if self.base == "matched" else torch.arange(order.shape[1]).expand_as(order)
        shuffled = torch.rand(order.shape).argsort(dim=1)
        if self.mode == "rs":
            mixed = torch.where(noisy, base.gather(1, shuffled), order)
            return Start(mixed, mixed, mixed)
        iid = torch.randint(order.shape[1], order.shape)
        partner = base.gather(1, shuffled if self.partner == "permutation" else iid)
        share, own = self._share(order.shape, channels)
        # A video without noise this time keeps its match whole.
        share = torch.where(noisy[..., None], share, torch.ones(()))
        return Start(
            order=torch.where(noisy, torch.where(own, base, partner), order),
            first=torch.where(noisy, base, order),
            partner=partner,
            share=share,
        )

    def _share(self, shape: torch.Size, channels: int) -> tuple[Tensor, Tensor]:
        """How much of the first is in each slot, and (B, Q) bool where that is the larger part."""
        if self.mode == "wa":
            weight = torch.rand(shape)
            return weight[..., None], weight >= 0.5
        cut = torch.randint(channels, shape)
        return (torch.arange(channels) < cut[..., None]).float(), cut >= channels / 2


def _joined(videos: Sequence[Start]) -> Start:
    """The starts of several videos, (1, Q) each, as those of one batch."""
    shares = [video.share for video in videos]
    given = [share for share in shares if share is not None]
    share = None
    if given:
        share = torch.cat([torch.ones_like(given[0]) if one is None else one for one in shares])
    order, first, partner = (torch.cat([getattr(video, name) for video in videos]) for name in _INDICES)
    return Start(order, first, partner, share)
