"""The linear layer equals torch's, whatever way it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from vis.layers import linear as linear_module
from vis.layers.linear import Linear, PointwiseConv2d, linear, speed_up_pointwise, torch_products

C, D = 12, 7


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize("shape", [(96, C), (2, 57, C), (113, C), (3, 5, 7, C), (5, C), (0, C), (2, 0, C), (C,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_torch(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(D, C, requires_grad=True)
    bias = torch.randn(D, requires_grad=True) if with_bias else None
    inputs = [x, weight] if bias is None else [x, weight, bias]
    found, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_contiguous() -> None:
    x, weight = torch.randn(2, C, 75).transpose(1, 2), torch.randn(D, C)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torch_exactly(dtype: torch.dtype) -> None:
    x, weight = torch.randn(200, C, dtype=dtype), torch.randn(D, C, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_stays_in_charge() -> None:
    layer, x = Linear(C, D), torch.randn(200, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_the_detour_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear_module.F, "linear", None)
    assert Linear(C, D)(torch.randn(96, C)).shape == (96, D)
    with pytest.raises(TypeError):
        Linear(C, D)(torch.randn(95, C))


def test_torch_products_are_torch_exactly() -> None:
    layer, x = Linear(C, D), torch.randn(200, C)
    with torch_products():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch_products():
            pass
        assert not linear_module._detour
    assert linear_module._detour


def test_names_are_those_of_torch() -> None:
    layer = Linear(C, D)
    nn.Linear(C, D).load_state_dict(layer.state_dict())


def parts() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        Conv2d(C, D, 1, bias=False, norm=nn.GroupNorm(1, D), activation=F.relu),
        Conv2d(D, 5, 3, padding=1),
        Conv2d(5, 4, 1, stride=2),
        Conv2d(4, 6, 1, groups=2),
        nn.Conv2d(6, C, 1),
        Conv2d(C, C, 1, padding=1),
        Conv2d(C, D, 1),
    )


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolutions_keep_their_results(memory_format: torch.memory_format) -> None:
    plain, fast = parts(), parts()
    speed_up_pointwise(fast)
    changed = [i for i, layer in enumerate(fast) if type(layer) is PointwiseConv2d]
    assert changed == [0, 6]  # neither strided, grouped nor padded ones, nor other 3x3 kernels
    assert list(plain.state_dict()) == list(fast.state_dict())
    x = torch.randn(2, C, 13, 17).to(memory_format=memory_format)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    for one, other in ((fast[0](x), plain[0](x)), (fast[6](x), plain[6](x))):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    wanted = gradients(plain(x), list(plain.parameters()))
    torch.testing.assert_close(gradients(fast(x), list(fast.parameters())), wanted, rtol=1e-3, atol=1e-4)
