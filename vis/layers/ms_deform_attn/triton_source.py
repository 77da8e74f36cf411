"""The Triton kernels of multi-scale deformable attention, which :mod:`.triton_kernels` launches.

A program takes a tile of neighbouring queries of one image and one head, with all channels: a (BLOCK_Q, BLOCK_D) tile.
Tiles are counted for each image, so none holds queries of two. The lanes of a query read 16 bytes of a value row each,
and the set-up of a point (floor, four shares, four offsets) is done by the few lanes that share the query.

Bounds: the forward kernel by instructions and L1 (4 rows of D values for each point), not by memory, since the
values of a level fit into L2. The backward kernel by the atomics into L2, one for each value that was read.

Positions are ``location * size - 0.5`` and outside of a level is zero. A cell outside is never read or written. A
position that is NaN reads nothing either, but its shares stay NaN and so does the output of its query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton; `triton_kernels.available` tells why it is not used

    def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function
else:
    _jit = triton.jit


def encoded(size: int) -> int:
    """A size as the kernels take it: odd and above 1.

    Triton compiles a kernel again for each "is 1" and "is a multiple of 16" among its integers, and among the members
    of a tuple whatever it is told. These sizes differ from picture to picture, so they give it nothing to specialise.
    """
    return 2 * size + 3


@_jit
def _level(sizes: tl.tensor, level: tl.constexpr) -> tl.tuple:
    """Height, width and first row of a level."""
    return (sizes[4 + 3 * level] - 3) >> 1, (sizes[5 + 3 * level] - 3) >> 1, (sizes[6 + 3 * level] - 3) >> 1


@_jit
def _axis(position: tl.tensor, size: tl.tensor) -> tl.tuple:
    """The two cells beside ``position`` on an axis of ``size`` cells: as floats, whether they may be read, shares."""
    lower = tl.floor(position)
    upper = lower + 1
    share = position - lower
    # `outside` and `inside` are both false for NaN. A share is replaced, not multiplied by 0: it is NaN where the
    # position has overflowed to infinity.
    low_share = tl.where((lower < 0) | (lower >= size), 0.0, 1 - share)
    high_share = tl.where((upper < 0) | (upper >= size), 0.0, share)
    return lower, (lower >= 0) & (lower < size), low_share, (upper >= 0) & (upper < size), high_share


@_jit
def _point(
    x: tl.tensor,
    y: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    used: tl.tensor,
    WIDE: tl.constexpr,
) -> tl.tuple:
    """Offsets, masks and shares of the four cells around (x, y), as (BLOCK_Q,) each: y before x, low before high.

    The offset of a cell that is masked means nothing.
    """
    left, x0_inside, x0, x1_inside, x1 = _axis(x * width - 0.5, width)
    top, y0_inside, y0, y1_inside, y1 = _axis(y * height - 0.5, height)
    # Far positions and NaN do not fit the integer: they are replaced while they are still floats.
    column = tl.where(x0_inside | x1_inside, left, 0.0).to(tl.int32)
    line = tl.where(y0_inside | y1_inside, top, 0.0).to(tl.int32)
    row = start + line * width + column
    if WIDE:
        row = row.to(tl.int64)
    low = row * stride
    high = (row + width) * stride
    y0_inside, y1_inside = y0_inside & used, y1_inside & used
    masks = y0_inside & x0_inside, y0_inside & x1_inside, y1_inside & x0_inside, y1_inside & x1_inside
    return (low, low + stride, high, high + stride), masks, (x0, x1, y0, y1)


@_jit
def _tile(sizes: tl.tensor, BLOCK_Q: tl.constexpr) -> tl.tuple:
    """Heads in all; what a program works on: the first place of its head in (N, S, M), the places of its queries in
    (N, Lq, M), both of 64 bits, and which of the queries exist."""
    rows, queries, heads, tiles = (sizes[0] - 3) >> 1, (sizes[1] - 3) >> 1, (sizes[2] - 3) >> 1, (sizes[3] - 3) >> 1
    program = tl.program_id(0)
    head = program % heads  # neighbours in time take the heads of the same queries, whose locations lie side by side
    tile = program // heads
    image = (tile // tiles).to(tl.int64)
    query = (tile % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return heads, image * rows * heads + head, (image * queries + query) * heads + head, query < queries


@_jit
def forward_kernel(
    value: tl.tensor,
    locations: tl.tensor,
    attention: tl.tensor,
    out: tl.tensor,
    sizes: tl.tensor,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """``out`` (N, Lq, M, D). ``sizes``, encoded: S, Lq, M, tiles of an image; height, width, start of each level."""
    heads, first, item, used = _tile(sizes, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)[None, :]
    column = channel < D
    value += first * D
    attention += item * (L * P)
    xy = locations + item * (L * P * 2)
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=locations.dtype.element_ty)
    for level in tl.static_range(L):
        height, width, start = _level(sizes, level)
        for p in tl.range(0, P, loop_unroll_factor=UNROLL):
            point = level * P + p
            x = tl.load(xy + 2 * point, mask=used, other=0.0)
            y = tl.load(xy + 2 * point + 1, mask=used, other=0.0)
            weight = tl.load(attention + point, mask=used, other=0.0).to(x.dtype)
            offsets, masks, shares = _point(x, y, height, width, start, heads * D, used, WIDE)
            for corner in tl.static_range(4):
                share = shares[corner % 2] * shares[2 + corner // 2] * weight
                mask = masks[corner][:, None] & column
                cell = tl.load(value + offsets[corner][:, None] + channel, mask=mask, other=0.0)
                total += share[:, None] * cell.to(x.dtype)
    tl.store(out + item[:, None] * D + channel, total.to(out.dtype.element_ty), mask=used[:, None] & column)


@_jit
def backward_kernel(
    grad_out: tl.tensor,
    value: tl.tensor,
    locations: tl.tensor,
    attention: tl.tensor,
    grad_value: tl.tensor,
    grad_locations: tl.tensor,
    grad_attention: tl.tensor,
    sizes: tl.tensor,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Adds to ``grad_value`` (in the dtype of ``locations``, zero before); writes the other two gradients in full.

    Only the products <grad_out, cell> of the four cells are reduced over channels; the rest follows from them.
    """
    heads, first, item, used = _tile(sizes, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)[None, :]
    column = channel < D
    point_of_item = item * (L * P)
    grad = tl.load(grad_out + item[:, None] * D + channel, mask=used[:, None] & column, other=0.0)
    grad = grad.to(locations.dtype.element_ty)
    for level in tl.static_range(L):
        height, width, start = _level(sizes, level)
        for p in tl.range(0, P, loop_unroll_factor=UNROLL):
            point = point_of_item + (level * P + p)
            x = tl.load(locations + 2 * point, mask=used, other=0.0)
            y = tl.load(locations + 2 * point + 1, mask=used, other=0.0)
            weight = tl.load(attention + point, mask=used, other=0.0).to(x.dtype)
            offsets, masks, shares = _point(x, y, height, width, start, heads * D, used, WIDE)
            in_x = tl.zeros_like(x)  # d sample / dx, in cells
            in_y = tl.zeros_like(x)
            sample = tl.zeros_like(x)
            for corner in tl.static_range(4):
                share_x, share_y = shares[corner % 2], shares[2 + corner // 2]
                place = first * D + offsets[corner][:, None] + channel
                mask = masks[corner][:, None] & column
                cell = tl.load(value + place, mask=mask, other=0.0).to(x.dtype)
                product = tl.sum(grad * cell, axis=1)
                sample += share_x * share_y * product
                in_x += share_y * product * (2 * (corner % 2) - 1)
                in_y += share_x * product * (2 * (corner // 2) - 1)
                # Relaxed: nothing is read back before the kernel ends, so no fence is needed.
                part = (share_x * share_y * weight)[:, None] * grad
                tl.atomic_add(grad_value + place, part, mask=mask, sem="relaxed")
            tl.store(grad_attention + point, sample.to(grad_attention.dtype.element_ty), mask=used)
            tl.store(grad_locations + 2 * point, in_x * weight * width, mask=used)
            tl.store(grad_locations + 2 * point + 1, in_y * weight * height, mask=used)
