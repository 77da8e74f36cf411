"""A linear layer that is fast on CPUs too.

torch gives float32 matrix products on CPUs to MKL, which on AMD processors leaves half of the vector unit unused;
convolutions go to oneDNN, which does not. A linear layer is a 1x1 convolution over its rows, so in float32 on the CPU
it is computed as one, with results that are equal to rounding. Elsewhere this is ``torch.nn.functional.linear``.
``tools/benchmark.py linear`` measures both side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

# On one thread torch hands a 1x1 convolution to oneDNN only for this many pictures: the rows are dealt out to as many.
_PICTURES = 16
# Below this many rows the detour costs more than it gains.
_MIN_ROWS = 96
_detour = True


@contextmanager
def torch_products() -> Iterator[None]:
    """While the body runs, matrix products are torch's own.

    For comparisons with what another program has computed, down to pixels whose mask logit is zero but for rounding.
    """
    global _detour
    before, _detour = _detour, False
    try:
        yield
    finally:
        _detour = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` (..., C) times ``weight`` (D, C) transposed, plus ``bias`` (D,) -> (..., D)."""
    rows = x.numel() // max(x.shape[-1], 1)
    if not _through_convolution(x, weight, rows):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1])
    missing = -rows % _PICTURES
    if missing:
        flat = F.pad(flat, (0, 0, 0, missing))
    # (16, C, rows/16, 1) in channels-last order is the memory of `flat` as it is.
    pictures = flat.view(_PICTURES, -1, 1, flat.shape[1]).permute(0, 3, 1, 2)
    out = F.conv2d(pictures, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(rows + missing, -1)
    return out[:rows].view(*x.shape[:-1], -1)


def _through_convolution(x: Tensor, weight: Tensor, rows: int) -> bool:
    return bool(
        _detour
        and not torch.compiler.is_compiling()  # asked early: a compiler cannot follow the questions below
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and rows >= _MIN_ROWS
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """``nn.Linear``, computed by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        return linear(x, self.weight, self.bias)


class PointwiseConv2d(Conv2d):
    """detectron2's ``Conv2d`` with a 1x1 kernel, computed by :func:`linear` where the pixels lie as rows in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, D, h, w)."""
        if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        x = linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def speed_up_pointwise(module: nn.Module) -> None:
    """Turn the 1x1 convolutions of detectron2's ``Conv2d`` in ``module`` into :class:`PointwiseConv2d`.

    The parameters, their names and the results stay; only on CPUs the computation is another one.
    """
    for child in module.modules():
        if type(child) is Conv2d and _is_pointwise(child):
            child.__class__ = PointwiseConv2d


def _is_pointwise(conv: Conv2d) -> bool:
    plain = conv.groups == 1 and conv.padding == (0, 0) and conv.dilation == (1, 1)
    return plain and conv.kernel_size == (1, 1) and conv.stride == (1, 1)
