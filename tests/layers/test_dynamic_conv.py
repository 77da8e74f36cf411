"""Dynamic convolutions against grouped convolutions, and the upsampling against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vis.layers.dynamic_conv import aligned_bilinear, dynamic_convs, num_parameters, relative_axes, split_parameters

WIDTHS = (10, 8, 8, 1)
N, H, W = 5, 6, 9


def test_number_and_order_of_parameters() -> None:
    """80 + 64 + 8 weights, then 8 + 8 + 1 biases, weights by output channel."""
    assert num_parameters(WIDTHS) == 169
    weights, biases = split_parameters(torch.arange(169.0)[None], WIDTHS)
    assert [tuple(x.shape) for x in weights] == [(1, 8, 10), (1, 8, 8), (1, 1, 8)]
    assert weights[0][0, 1].tolist() == list(range(10, 20))
    assert weights[1][0, 0, 0] == 80
    assert weights[2][0, 0].tolist() == list(range(144, 152))
    assert [x[0, 0].item() for x in biases] == [152, 160, 168]
    with pytest.raises(ValueError, match="need 169 parameters, found 170"):
        split_parameters(torch.zeros(2, 170), WIDTHS)


def grouped(features: Tensor, parameters: Tensor, points: Tensor) -> Tensor:
    """As usually written: features and coordinates repeated for every instance, one grouped convolution a layer."""
    y, x = torch.meshgrid(torch.arange(H) * 8.0 + 4, torch.arange(W) * 8.0 + 4, indexing="ij")
    inputs = [torch.cat([torch.stack([px - x, py - y]), features]) for px, py in points.tolist()]
    out = torch.cat(inputs)[None]
    weights, biases = split_parameters(parameters, WIDTHS)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = F.conv2d(out, weight.flatten(0, 1)[..., None, None], bias.flatten(), groups=N)
        out = F.relu(out) if i < 2 else out
    return out[0][:, None]


def test_equals_a_grouped_convolution() -> None:
    torch.manual_seed(0)
    features, parameters = torch.rand(8, H, W), torch.randn(N, 169)
    points = torch.rand(N, 2) * torch.tensor([8.0 * W, 8.0 * H])
    x, y = relative_axes(points, H, W, stride=8)
    found = dynamic_convs(features, parameters, x, y, WIDTHS)
    expected = grouped(features, parameters, points)
    assert found.shape == (N, 1, H, W)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert dynamic_convs(features, parameters[:0], x[:0], y[:0], WIDTHS).shape == (0, 1, H, W)


def test_gradients() -> None:
    torch.manual_seed(0)
    features = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = torch.randn(2, num_parameters((3, 2, 1)), dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def run(features: Tensor, parameters: Tensor, points: Tensor) -> Tensor:
        return dynamic_convs(features, parameters, *relative_axes(points, 3, 4, 2), (3, 2, 1))

    assert torch.autograd.gradcheck(run, (features, parameters, points))


def test_aligned_bilinear() -> None:
    """2 x 2 to 4 x 4: old cells keep their values at odd places, before them lies the edge, between them the mean."""
    maps = torch.tensor([[[[0.0, 4.0], [8.0, 20.0]]]])
    expected = [[0, 0, 2, 4], [0, 0, 2, 4], [4, 4, 8, 12], [8, 8, 14, 20]]
    assert aligned_bilinear(maps, 2)[0, 0].tolist() == expected
    assert aligned_bilinear(torch.zeros(3, 2, 5, 7), 4).shape == (3, 2, 20, 28)
