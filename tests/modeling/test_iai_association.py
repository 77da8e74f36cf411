"""Identity bank, memory and its schedule, and clips as a whole against frames one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.modeling.trackers.association import (
    NO_CHANNEL,
    Association,
    AssociationMemory,
    IdentityBank,
    stored_frames,
)

NUM_IDS, DIM, CHANNELS = 5, 8, 40
HEIGHT, WIDTH = 96, 64  # 3 x 2 tokens


def association(**changes: Any) -> Association:
    torch.manual_seed(5)
    options: dict[str, Any] = {
        "channels": CHANNELS,
        "num_ids": NUM_IDS,
        "dim": DIM,
        "num_layers": 1,
        "global_interval": 3,
        "max_global_frames": -1,
        "self_heads": 2,
        "attn_heads": 2,
        "ffn_dim": 32,
        "window_radius": 1,
        "released_init": True,
        **changes,
    }
    return Association(**options).double()


def maps(seed: int, *shape: int) -> Tensor:
    """Blocks of identities and background."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, NUM_IDS + 1, (*shape, HEIGHT // 16, WIDTH // 16), generator=generator)
    return small.repeat_interleave(16, dim=-1).repeat_interleave(16, dim=-2).to(torch.uint8)


def one_hot_convolution(bank: IdentityBank, labels: Tensor) -> Tensor:
    known = labels != NO_CHANNEL
    one_hot = F.one_hot(labels.long() * known, bank.num_ids + 1) * known[..., None]
    out = F.conv2d(one_hot.permute(0, 3, 1, 2).to(bank.weight.dtype), bank.weight, bank.bias, stride=32, padding=16)
    return out.flatten(2).transpose(1, 2)


def test_bank_is_a_convolution_of_the_one_hot_map() -> None:
    bank = IdentityBank(num_ids=NUM_IDS, dim=DIM).double()
    assert bank.weight.shape == (DIM, NUM_IDS + 1, 33, 33)
    labels = maps(1, 3)
    labels[0, :40] = NO_CHANNEL
    labels[1] = 2
    labels[2][labels[2] > 2] = NUM_IDS
    torch.testing.assert_close(bank(labels), one_hot_convolution(bank, labels), rtol=1e-9, atol=1e-9)
    nothing = torch.full_like(labels, NO_CHANNEL)
    torch.testing.assert_close(bank(nothing), bank.nothing(3, 6))
    with pytest.raises(ValueError, match="multiples of 32"):
        bank(labels[:, :, :50])


def test_bank_does_not_care_which_channel_an_identity_has() -> None:
    bank, labels = IdentityBank(num_ids=NUM_IDS, dim=DIM).double(), maps(2, 2)
    before = bank(labels)
    order = torch.tensor([3, 0, 4, 1, 2, NUM_IDS])
    with torch.no_grad():
        bank.weight[:, order] = bank.weight.clone()
    torch.testing.assert_close(bank(order.to(torch.uint8)[labels.long()]), before)


def frames_one_by_one(
    module: Association, res5: Tensor, labels: Tensor, new: list[bool]
) -> tuple[Tensor, AssociationMemory, list[int]]:
    """One clip (T, C, h, w); what is read, the last memory, and how many frames were stored after each."""
    memory, outputs, counts = AssociationMemory(), [], []
    for t in range(len(res5)):
        replaced, current = module.read(res5[t, None], memory)
        memory = module.write(current, labels[t, None], memory, new=new[t])
        outputs.append(replaced)
        counts.append(len(memory.stored))
    return torch.cat(outputs), memory, counts


def steps(counts: list[int]) -> list[int]:
    return [t for t, (before, count) in enumerate(zip([0, *counts], counts, strict=False)) if count > before]


def test_frames_are_stored_by_the_interval_and_with_new_objects() -> None:
    module = association()
    res5, labels = torch.randn(13, CHANNELS, 3, 2, dtype=torch.float64), maps(3, 13)
    with torch.no_grad():
        _, memory, counts = frames_one_by_one(module, res5, labels, [False] * 13)
        assert steps(counts) == [0, 2, 5, 8, 11]
        assert (memory.step, memory.last) == (13, 12)
        new = [t in (0, 4) for t in range(13)]
        assert steps(frames_one_by_one(module, res5, labels, new)[2]) == [0, 2, 4, 7, 10]
        assert steps(frames_one_by_one(association(global_interval=5), res5, labels, [False] * 13)[2]) == [0, 4, 9]
    for flags in ([False] * 13, new):
        stored = stored_frames(torch.tensor(flags), 3)
        wanted = [0, 2, 5, 8, 11] if not any(flags) else [0, 2, 4, 7, 10]
        for t in range(1, 13):
            assert stored[t].nonzero()[:, 0].tolist() == [s for s in wanted if s < t]


def test_memory_is_bounded_and_keeps_the_first_frame_and_new_objects() -> None:
    res5, labels = torch.randn(30, CHANNELS, 3, 2, dtype=torch.float64), maps(4, 30)
    new = [t in (0, 4, 10) for t in range(30)]
    with torch.no_grad():
        _, memory, counts = frames_one_by_one(association(max_global_frames=4), res5, labels, new)
    assert max(counts) == 4
    assert [frame.kept for frame in memory.stored] == [True, True, True, False]
    with torch.no_grad():
        _, memory, _ = frames_one_by_one(association(max_global_frames=3), res5, labels, [True] * 30)
        assert len(memory.stored) == 3
        assert memory.stored[-1] is memory.before
        _, memory, counts = frames_one_by_one(association(max_global_frames=1), res5, labels, new)
        assert set(counts) == {1}
    first = association().read(res5[0, None], AssociationMemory())[1]
    assert torch.equal(memory.stored[0].layers[0].keys, first.looked[0].keys)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"use_local": False}, {"class_projector": False}], ids=str)
def test_clips_as_a_whole_equal_frames_one_by_one(options: dict[str, Any]) -> None:
    module = association(**options)
    res5 = torch.randn(2, 6, CHANNELS, 3, 2, dtype=torch.float64)
    labels = maps(5, 2, 6)
    news = [[True, False, False, True, False, False], [True, True, False, False, False, False]]
    weight = torch.randn_like(res5)

    def gradients(out: Tensor) -> list[Tensor]:
        module.zero_grad()
        (out * weight).sum().backward()
        return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in module.parameters()]

    single = torch.stack([frames_one_by_one(module, *args)[0] for args in zip(res5, labels, news, strict=True)])
    stored = torch.stack([stored_frames(torch.tensor(new), 3) for new in news])
    whole = module(res5, labels, stored)
    assert whole.shape == res5.shape
    torch.testing.assert_close(whole, single, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(gradients(whole), gradients(single), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_what_replaces_the_features() -> None:
    module = association().eval()
    res5, labels = torch.randn(1, CHANNELS, 3, 2, dtype=torch.float64), maps(6, 1)
    with torch.no_grad():
        first, current = module.read(res5, AssociationMemory())
        memory = module.write(current, labels, AssociationMemory(), new=True)
        second, _ = module.read(res5, memory)
        other = module.write(current, maps(7, 1), AssociationMemory(), new=True)
        third, _ = module.read(res5, other)
    torch.testing.assert_close(first[:, :DIM], module.enc_proj(res5))
    torch.testing.assert_close(first[:, 2 * DIM :], module.cls_proj(res5))
    # the same picture, but now with identities, and with others
    assert not torch.allclose(first[:, DIM : 2 * DIM], second[:, DIM : 2 * DIM])
    assert not torch.allclose(second[:, DIM : 2 * DIM], third[:, DIM : 2 * DIM])
    assert torch.equal(first[:, :DIM], second[:, :DIM])
    with torch.no_grad():
        without = association(class_projector=False).read(res5, AssociationMemory())[0]
    assert without.shape == first.shape
    assert not without[:, 2 * DIM :].any()


def test_options_that_cannot_be() -> None:
    for changes, match in (
        ({"num_layers": 4}, "do not fit"),
        ({"global_interval": 0}, "GLOBAL_INTERVAL"),
        ({"max_global_frames": 0}, "MAX_GLOBAL_FRAMES"),
        ({"use_local": False, "use_global": False}, "ASSOCIATION False"),
    ):
        with pytest.raises(ValueError, match=match):
            association(**changes)
