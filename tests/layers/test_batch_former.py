"""Attention across a batch: by its formula, whatever the order of the batch, and gone at test time."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from vis.layers import batch_former
from vis.layers.batch_former import BatchFormer, BatchFormers, gather_pictures

N, C, HEADS, WIDTH = 3, 8, 2, 11
SHAPES = [(2, 3), (5, 4)]
S = 26


def former(**changes: object) -> BatchFormer:
    torch.manual_seed(0)
    options = {"embed_dim": C, "num_heads": HEADS, "feedforward_dim": WIDTH, "dropout": 0.0}
    return BatchFormer(**{**options, **changes})  # type: ignore[arg-type]


def formers(layers: tuple[int, ...] = (0,), position: str = "after", **changes: object) -> BatchFormers:
    torch.manual_seed(0)
    options = {"embed_dim": C, "num_heads": HEADS, "feedforward_dim": WIDTH, "dropout": 0.0}
    return BatchFormers(layers=layers, position=position, encoder_layers=3, **{**options, **changes})


def pictures(n: int = N) -> Tensor:
    return torch.randn(n, S, C, generator=torch.Generator().manual_seed(3))


def test_equals_a_standard_layer_over_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published module: nn.TransformerEncoderLayer that is given (N, S, C) as (sequence, batch, C)."""
    monkeypatch.setattr(batch_former, "_CHUNK", 7)
    ours, theirs = former(), nn.TransformerEncoderLayer(C, HEADS, WIDTH, dropout=0.0)
    state = ours.layers[0].state_dict()
    names = {"norm.": "norm1.", "ffn.norm.": "norm2.", "ffn.linear": "linear"}
    renamed = {}
    for name, value in state.items():
        old = next((old for old in sorted(names, key=len, reverse=True) if name.startswith(old)), "")
        renamed[name.replace(old, names[old], 1) if old else name] = value
    theirs.load_state_dict(renamed)
    torch.testing.assert_close(ours(pictures(), SHAPES), theirs(pictures()))


def test_size_that_is_published() -> None:
    model = BatchFormer(embed_dim=256, num_heads=4, feedforward_dim=256, dropout=0.5)
    assert sum(parameter.numel() for parameter in model.parameters()) == 395_776


def test_order_of_the_batch_does_not_matter_and_positions_do_not_mix() -> None:
    model, x = former(num_layers=2), pictures()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(x[order], SHAPES), model(x, SHAPES)[order])
    changed = x.clone()
    changed[1, 4] += 1
    moved = (model(changed, SHAPES) - model(x, SHAPES)).abs().sum(dim=2) > 1e-6
    assert moved[:, 4].all()  # every picture hears of it, at that position alone
    assert not moved[:, torch.arange(S) != 4].any()


def shift(by: float, x: Tensor) -> Tensor:
    return x * 2 + by


@pytest.mark.parametrize("position", ["after", "parallel", "before"])
def test_two_streams(position: str) -> None:
    model, x, layer = formers(position=position).train(), pictures(), partial(shift, 1.0)
    former = model["0"]
    second = {
        "after": former(layer(x), SHAPES),
        "parallel": former(x, SHAPES),
        "before": layer(former(x, SHAPES)),
    }[position]
    out = model.run(0, layer, x, SHAPES)
    torch.testing.assert_close(out[:N], layer(x), rtol=0, atol=0)
    torch.testing.assert_close(out[N:], second)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("position", ["after", "parallel", "before"])
def test_later_places_touch_the_second_stream_alone(position: str) -> None:
    model, x = formers((2, 0), position).train(), pictures()
    assert list(model) == ["0", "2"]
    assert not torch.equal(model["0"].layers[0].ffn.linear1.weight, model["2"].layers[0].ffn.linear1.weight)
    layers = [partial(shift, float(i)) for i in range(3)]
    plain, both = x, x
    for i, layer in enumerate(layers):
        plain, both = layer(plain), model.run(i, layer, both, SHAPES)
        assert len(both) == 2 * N
    torch.testing.assert_close(both[:N], plain, rtol=0, atol=0)
    assert not torch.allclose(both[N:], plain)


def test_nothing_at_test_time() -> None:
    model, x = formers((0, 1)).eval(), pictures()
    assert torch.equal(model.run(0, partial(shift, 1.0), x, SHAPES), shift(1.0, x))


def test_one_picture_is_left_alone_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = formers((0, 1)).train(), pictures(1).requires_grad_()
    with caplog.at_level("WARNING", logger="vis"):
        for _ in range(2):
            out = x
            for i in range(3):
                out = model.run(i, partial(shift, 1.0), out, SHAPES)
            assert torch.equal(out, shift(1.0, shift(1.0, shift(1.0, x))))
    assert [record.message[:30] for record in caplog.records] == ["BatchFormer: one picture per p"]
    out.sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters())  # there is one: parallel training waits


def test_dropout_in_training_only() -> None:
    model, x = former(dropout=0.5), pictures()
    assert not torch.equal(model(x, SHAPES), model(x, SHAPES))
    assert torch.equal(model.eval()(x, SHAPES), model(x, SHAPES))


@pytest.mark.parametrize(
    ("layers", "position", "key"),
    [((3,), "after", "LAYERS"), ((0, 0), "after", "LAYERS"), ((0,), "behind", "POSITION")],
)
def test_settings_are_checked(layers: tuple[int, ...], position: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"MODEL.BATCH_FORMER.{key} is"):
        formers(layers, position)


def _process(rank: int, port: int, check: Callable[[int], None]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


def _same_sizes(folder: str, rank: int) -> None:
    """Two processes of one and the same batch: what each finds and the gradients go to a file."""
    x = pictures(4)[2 * rank : 2 * rank + 2].requires_grad_()
    model = formers(across_gpus=True).train()
    out = model.run(0, partial(shift, 1.0), x, SHAPES)
    (out * (1 + torch.arange(out.numel()).view_as(out) % 5)).sum().backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.save((out.detach(), x.grad, grads), Path(folder) / f"{rank}.pt")


def _other_sizes(rank: int) -> None:
    shapes = [[(2, 3), (1, 2)], [(3, 2), (1, 1)]][rank]
    counts = [2, 1]
    values = [torch.arange(8.0), 100 + torch.arange(7.0)]  # of a position, for each process
    x = (values[rank][:, None] + 1000 * torch.arange(counts[rank]))[..., None].requires_grad_()
    others, there = gather_pictures(x, shapes)
    assert there is not None
    found = [sorted(row[mask, 0].tolist()) for row, mask in zip(others.detach(), there, strict=True)]
    both = [sorted([float(a), a + 1000.0, b + 100.0]) for a, b in ((0, 0), (1, 1), (3, 2), (4, 3), (6, 6))]
    alone = {0: {2: [2.0, 1002.0], 5: [5.0, 1005.0], 7: [7.0, 1007.0]}, 1: {4: [104.0], 5: [105.0]}}[rank]
    shared = dict(zip([0, 1, 3, 4, 6] if rank == 0 else [0, 1, 2, 3, 6], both, strict=True))
    assert found == [{**shared, **alone}[place] for place in range(len(found))]
    (others * there[..., None]).sum().backward()
    seen = torch.tensor([2.0 if place in shared else 1.0 for place in range(len(found))])
    assert torch.equal(x.grad[..., 0], seen[:, None].expand(-1, counts[rank]))


def _both(folder: str, rank: int) -> None:
    _same_sizes(folder, rank)
    _other_sizes(rank)


@pytest.mark.slow
def test_across_processes() -> None:
    """Half the batch in each process is the whole batch in one, gradients included; sizes may differ."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_process, args=(port, partial(_both, folder)), nprocs=2)  # type: ignore[attr-defined]
        parts = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    x, model = pictures(4).requires_grad_(), formers().train()
    out = model.run(0, partial(shift, 1.0), x, SHAPES)
    halves = [torch.cat([out[:2], out[4:6]]), torch.cat([out[2:4], out[6:]])]
    torch.stack([(half * (1 + torch.arange(half.numel()).view_as(half) % 5)).sum() for half in halves]).sum().backward()
    for half, (found, _, _) in zip(halves, parts, strict=True):
        torch.testing.assert_close(found, half.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in parts]), x.grad, rtol=1e-4, atol=1e-5)
    whole = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(parts[0][2] + parts[1][2], whole, rtol=1e-4, atol=1e-4)
