"""Selection of the reported tracks, and their masks at the original size, one frame at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.structures import RLE
from vis.structures.rle import encode_masks


def select_tracks(probabilities: Tensor, max_num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``max_num`` best (query, class) pairs of (Q, K) probabilities; a query may come with several classes.

    Returns:
        scores (N,) float32, labels (N,) int64, queries (N,) int64, best first.
    """
    num_classes = probabilities.shape[1]
    scores, index = probabilities.float().flatten().topk(min(max_num, probabilities.numel()))
    return scores, index % num_classes, torch.div(index, num_classes, rounding_mode="floor")


class MaskWriter:
    """Turns the low-resolution logits of K queries into RLEs, frame after frame.

    Logits are resized to the padded input, cropped to the input, resized to the original size and cut at 0, as the
    released models do; a query without a positive logit is skipped, since a bilinear value lies between its neighbours.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        padded_size: tuple[int, int],
        input_size: tuple[int, int],
        output_size: tuple[int, int],
        device: torch.device | str = "cpu",
        with_mask_score: bool = False,
    ) -> None:
        """Args: sizes are (height, width); ``device`` is where resizing runs; see :meth:`mask_scores`."""
        self.padded_size, self.input_size, self.output_size = padded_size, input_size, output_size
        self.device = device
        self.tracks: list[list[RLE | None]] = [[] for _ in range(num_queries)]
        self._with_mask_score = with_mask_score
        self._inside = torch.zeros(num_queries, dtype=torch.float64)
        self._area = torch.zeros(num_queries, dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Encode one frame: (K, h, w) logits."""
        filled = (logits.flatten(1).amax(dim=1) > 0).nonzero()[:, 0].tolist() if len(logits) else []
        coded: dict[int, RLE | None] = {}
        if filled:
            # Transposed throughout: bilinear resizing does not care, and the encoder wants columns.
            full = self._resize(logits[filled].transpose(1, 2).to(self.device))
            masks = full > 0
            if self._with_mask_score:
                self._inside[filled] += (full.sigmoid() * masks).sum(dim=(1, 2)).double().cpu()
                self._area[filled] += masks.sum(dim=(1, 2)).double().cpu()
            coded = dict(zip(filled, encode_masks(masks.cpu()), strict=True))
        for query, track in enumerate(self.tracks):
            track.append(coded.get(query))

    def mask_scores(self) -> Tensor:
        """(K,) float32: mean foreground probability inside each track's masks, 0 for a track without a pixel."""
        return (self._inside / (self._area + 1e-6)).float()

    def _resize(self, logits: Tensor) -> Tensor:
        """(K, w, h) -> (K, width, height)."""
        x = F.interpolate(logits[None], size=self.padded_size[::-1], mode="bilinear", align_corners=False)
        x = x[..., : self.input_size[1], : self.input_size[0]]
        return F.interpolate(x, size=self.output_size[::-1], mode="bilinear", align_corners=False)[0]
