"""Weights that are written are the ones that are read."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vis.checkpoint import read_weights, save_weights

KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def some_state() -> dict[str, torch.Tensor]:
    """Every type; views, turned, empty and single tensors, one tensor under two names."""
    base = torch.arange(35.0).reshape(5, 7)
    state = {str(kind): (torch.arange(15).reshape(3, 5) % 7).to(kind) for kind in KINDS}
    return {
        **state,
        "view": base[1:3],
        "turned": base.t(),
        "one": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "b": base,
    }


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_round_trip(suffix: str, tmp_path: Path) -> None:
    state = some_state()
    path = tmp_path / f"w{suffix}"
    for _ in range(2):
        save_weights(state, path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    found = read_weights(path).state
    assert set(found) == set(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    if suffix == ".safetensors":
        assert all(torch.equal(value, state[name]) for name, value in load_file(path).items())


def test_a_view_does_not_bring_its_storage(tmp_path: Path) -> None:
    big = torch.zeros(10**6)
    save_weights({"a": big[:10], "b": torch.nn.Parameter(torch.ones(3))}, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 5000
    assert read_weights(tmp_path / "w.pth").state["b"].requires_grad is False


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w.pkl: weights are written as .pth, .pt, .safetensors"):
        save_weights({}, tmp_path / "w.pkl")
    with pytest.raises(ValueError, match="safetensors holds tensors alone; optimizer need"):
        save_weights({}, tmp_path / "w.safetensors", optimizer={})
    with pytest.raises(ValueError, match="a is of type torch.complex64"):
        save_weights({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    import os

    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(3)}, path)
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="no space left to write .*w.safetensors.*intact") as caught:
        save_weights({"a": torch.zeros(3000)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert read_weights(path).state["a"].tolist() == [1, 1, 1]
