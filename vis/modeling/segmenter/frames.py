"""Frames as the network takes them: normalised, then padded to a common size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrameNormalizer(nn.Module):
    """Subtracts the mean, divides by the standard deviation, pads bottom and right with zeros; holds no saved state."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, *, pixel_mean: Sequence[float], pixel_std: Sequence[float], size_divisibility: int) -> None:
        super().__init__()
        self.size_divisibility = size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, frames: Sequence[Tensor]) -> Tensor:
        """N frames (3, H_i, W_i), RGB 0..255 -> (N, 3, H, W) float32, H and W the largest, rounded up."""
        if not len(frames):
            raise ValueError("no frames were given")
        height, width = self.padded_size([tuple(frame.shape[-2:]) for frame in frames])
        # On CPUs channels last: what oneDNN works in, and where 1x1 convolutions are linear layers of rows. Elsewhere
        # as usual, so that gradients lie as the parameters do, which data-parallel training wants.
        on_cpu = self.device.type == "cpu"
        layout = torch.channels_last if on_cpu else torch.contiguous_format
        out = torch.empty(len(frames), 3, height, width, device=self.device, memory_format=layout).zero_()
        for row, frame in zip(out, frames, strict=True):
            if frame.dim() != 3 or frame.shape[0] != 3:
                raise ValueError(f"a frame must be (3, H, W), found {tuple(frame.shape)}")
            on_device = frame.to(self.device, non_blocking=True)
            row[:, : frame.shape[1], : frame.shape[2]] = (on_device - self.pixel_mean) / self.pixel_std
        return out

    def padded_size(self, sizes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """The common size (H, W) that frames of these sizes are padded to."""
        step = self.size_divisibility
        height, width = (-(-max(size[axis] for size in sizes) // step) * step for axis in (0, 1))
        return height, width


def pad_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) -> (..., *size), padded bottom and right with False."""
    return F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
