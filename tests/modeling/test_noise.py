"""Noise on the tracker's start: how often, what it does to slots, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vis.modeling.trackers.noise import Start, StartNoise

B, Q, C = 3, 11, 8
DRAWS = 400


def noise(mode: str, ratio: float = 1.0, base: str = "matched", partner: str = "iid") -> StartNoise:
    return StartNoise(mode=mode, ratio=ratio, base=base, partner=partner)


def orders() -> Tensor:
    return torch.stack([torch.randperm(Q) for _ in range(B)])


def embeds() -> Tensor:
    """(B, Q, C) that tell where every channel of a slot comes from: b + q/100 in each."""
    torch.manual_seed(2)
    return (torch.arange(B)[:, None, None] + torch.arange(Q)[:, None] / 100).expand(B, Q, C).contiguous()


def source(start: Tensor, video: int) -> Tensor:
    """Which query each channel comes from."""
    return ((start[video] - video) * 100).round().long()


@pytest.mark.parametrize("mode", ["rs", "wa", "cc"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_how_often(mode: str, ratio: float) -> None:
    """Each video draws for itself; a video without noise keeps its match whole."""
    x, part, noisy = embeds(), noise(mode, ratio), []
    for _ in range(DRAWS):
        order = orders()
        start = part.draw(order, C)
        clean = start.apply(x) == x.gather(1, order[..., None].expand(-1, -1, C))
        noisy.append(~clean.flatten(1).all(dim=1))
        for b in range(B):
            assert noisy[-1][b] or torch.equal(start.order[b], order[b])
    rate = torch.stack(noisy).float().mean(dim=0)
    # With cc or wa and iid partners nothing changes only if every slot drew itself: never here.
    assert (rate - ratio).abs().max() < 0.08
    if 0 < ratio < 1:
        together = torch.stack(noisy).all(dim=1).float().mean()
        assert abs(float(together) - ratio**B) < 0.05


def test_none_is_the_match() -> None:
    order, x = orders(), embeds()
    start = noise("none").draw(order, C)
    assert torch.equal(start.order, order)
    assert torch.equal(start.apply(x), x.gather(1, order[..., None].expand(-1, -1, C)))


@pytest.mark.parametrize("base", ["matched", "unmatched"])
def test_shuffle_is_one_permutation(base: str) -> None:
    """The queries themselves, each once, and the order says which."""
    x, seen = embeds(), torch.zeros(Q, Q)
    for _ in range(DRAWS):
        start = noise("rs", base=base).draw(orders(), C)
        assert start.order.sort(dim=1).values.tolist() == [list(range(Q))] * B
        assert torch.equal(start.apply(x), x.gather(1, start.order[..., None].expand(-1, -1, C)))
        seen[torch.arange(Q), start.order[1]] += 1
    assert float((seen / DRAWS - 1 / Q).abs().max()) < 0.07  # uniform


@pytest.mark.parametrize("base", ["matched", "unmatched"])
@pytest.mark.parametrize("partner", ["iid", "permutation"])
def test_weighted_average(base: str, partner: str) -> None:
    x, weights, repeated = torch.randn(B, Q, C), [], False
    for _ in range(DRAWS // 4):
        order = orders()
        start = noise("wa", base=base, partner=partner).draw(order, C)
        own = order if base == "matched" else torch.arange(Q).expand(B, -1)
        assert torch.equal(start.first, own)
        share = start.share
        assert share is not None
        assert share.shape == (B, Q, 1)
        for b in range(B):
            for q in range(Q):
                a = float(share[b, q])
                expected = a * x[b, own[b, q]] + (1 - a) * x[b, start.partner[b, q]]
                torch.testing.assert_close(start.apply(x)[b, q], expected)
                assert start.order[b, q] == (own[b, q] if a >= 0.5 else start.partner[b, q])
            repeated |= len(start.partner[b].unique()) < Q
        weights.append(share)
    drawn = torch.cat(weights).flatten()
    assert abs(float(drawn.mean()) - 0.5) < 0.02
    assert abs(float((drawn < 0.25).float().mean()) - 0.25) < 0.03
    assert repeated == (partner == "iid")


@pytest.mark.parametrize("base", ["matched", "unmatched"])
def test_crop_and_concatenate(base: str) -> None:
    x, cuts = embeds(), []
    for _ in range(DRAWS // 4):
        order = orders()
        start = noise("cc", base=base).draw(order, C)
        mixed = start.apply(x)
        for b in range(B):
            came = source(mixed, b)
            own = order[b] if base == "matched" else torch.arange(Q)
            for q in range(Q):
                assert start.share is not None
                cut = int(start.share[b, q].sum())
                cuts.append(cut)
                assert came[q, :cut].tolist() == [int(own[q])] * cut
                assert came[q, cut:].tolist() == [int(start.partner[b, q])] * (C - cut)
                assert start.order[b, q] == (own[q] if cut >= C / 2 else start.partner[b, q])
    share = torch.bincount(torch.tensor(cuts), minlength=C + 1) / len(cuts)
    assert share[C] == 0  # k < C: some of the partner is always in it
    assert float((share[:C] - 1 / C).abs().max()) < 0.02


def test_draws_follow_the_seed_and_leave_inputs_alone() -> None:
    order, x = orders(), embeds()
    copy, part = order.clone(), noise("cc", 0.5)
    torch.manual_seed(5)
    first = part.draw(order, C).apply(x)
    torch.manual_seed(5)
    assert torch.equal(part.draw(order, C).apply(x), first)
    assert torch.equal(order, copy)
    assert torch.equal(x, embeds())


def test_half_precision_and_gradient() -> None:
    order = orders()
    x = torch.randn(B, Q, C, dtype=torch.bfloat16, requires_grad=True)
    start = noise("wa").draw(order, C).apply(x)
    assert start.dtype == torch.bfloat16
    start.sum().backward()
    assert x.grad is not None
    assert isinstance(Start(order, order, order).apply(x), Tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "hard"}, "NOISE_MODE is 'hard', expected one of none, wa, cc, rs"),
        ({"base": "sorted"}, "NOISE_BASE is 'sorted'"),
        ({"partner": "self"}, "NOISE_PARTNER is 'self'"),
        ({"ratio": 1.5}, "NOISE_RATIO is 1.5"),
    ],
)
def test_wrong_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StartNoise(**{"mode": "rs", "ratio": 0.5, "base": "matched", "partner": "iid", **changes})
