"""The Triton kernels, compiled through Triton's own launcher for GPUs that need not be there.

Not collected by itself: Triton is given a driver that only names an architecture, and keeps what it compiled for it, so
`test_ms_deform_attn_triton.py` runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vis.layers.ms_deform_attn import triton_kernels, triton_source

KERNELS = {False: triton_source.forward_kernel, True: triton_source.backward_kernel}


class NamedDriver:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture(params=[80, 90])
def capability(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NamedDriver(request.param))
    yield request.param
    for kernel in KERNELS.values():
        kernel.device_caches.clear()


def compiled(
    backward: bool,
    dtype: torch.dtype,
    channels: int,
    levels: list[tuple[int, int]],
    rows: int = 77,
    queries: int = 9,
    heads: int = 3,
    shift: int = 0,
) -> Any:
    """What Triton would launch. ``shift``: elements by which the tensors miss an address divisible by 16."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = [dtype, dtype, wide, dtype, wide, wide, dtype] if backward else [dtype, wide, dtype, dtype]
    tensors = [torch.zeros(64, dtype=dtype)[shift:] for dtype in dtypes]
    sizes = (rows, queries, heads, 5, *(size for h, w in levels for size in (h, w, 0)))
    options = triton_kernels.launch_options(
        backward=backward,
        itemsize=dtype.itemsize,
        channels=channels,
        levels=len(levels),
        points=2,
        image_size=rows * heads * channels,
    )
    return KERNELS[backward].warmup(*tensors, tuple(map(triton_source.encoded, sizes)), grid=(1,), **options)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 32), (torch.float32, 64)])
def test_rows_are_read_and_added_in_wide_pieces(capability: int, dtype: torch.dtype, channels: int) -> None:
    """16 bytes at a time; four floats with one atomic on sm_90; no barrier between the lanes of the one warp there."""
    levels = [(2, 3)]
    forward = compiled(False, dtype, channels, levels).asm["ptx"]
    backward = compiled(True, dtype, channels, levels).asm["ptx"]
    assert "ld.global.v4.b32" in forward
    assert "bar.sync" not in forward
    assert ("relaxed.add.v4.f32" in backward) == (capability == 90)
    assert "bar.sync" not in backward or capability == 80
    assert "acq_rel" not in backward


@pytest.mark.parametrize("capability", [80], indirect=True)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float64, 30), (torch.float16, 1), (torch.float32, 300)])
def test_any_channels_and_float64(capability: int, dtype: torch.dtype, channels: int, backward: bool) -> None:
    assert compiled(backward, dtype, channels, [(2, 3)]).asm["cubin"]


@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize("backward", [False, True])
def test_new_sizes_compile_nothing(capability: int, backward: bool) -> None:
    """Sizes 1 and multiples of 16 as well, which Triton specialises where it may. Misaligned tensors do compile."""
    first = compiled(backward, torch.float32, 4, [(16, 32), (8, 16)], rows=640, queries=640, heads=8)
    for levels, sizes in [([(45, 80), (1, 1)], (4520, 300, 8)), ([(1, 1), (1, 16)], (17, 1, 1))]:
        assert compiled(backward, torch.float32, 4, levels, *sizes) is first
    assert compiled(backward, torch.float32, 4, [(2, 2), (2, 2)], shift=1) is not first
