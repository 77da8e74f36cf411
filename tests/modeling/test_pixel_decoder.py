from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor

from vis.layers.position_encoding import sine_position_encoding
from vis.modeling.pixel_decoders import MSDeformAttnPixelDecoder, msdeformattn
from vis.modeling.pixel_decoders.msdeformattn import EncoderLayer, cell_centres

SHAPES = {f"res{i + 2}": ShapeSpec(channels=5 + 3 * i, stride=4 * 2**i) for i in range(4)}
C, MASK = 16, 11


def decoder(**changes: Any) -> MSDeformAttnPixelDecoder:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "input_shape": SHAPES,
        "transformer_in_features": ["res3", "res4", "res5"],
        "conv_dim": C,
        "mask_dim": MASK,
        "norm": "GN",
        "common_stride": 4,
        "num_encoder_layers": 2,
        "encoder_checkpoint": False,
        "num_heads": 2,
        "num_points": 3,
        "feedforward_dim": 13,
        "dropout": 0.0,
    }
    return MSDeformAttnPixelDecoder(**{**values, **changes})


def features(height: int, width: int, n: int = 2) -> dict[str, Tensor]:
    """Backbone features of a picture of any size: sizes are rounded up, as convolutions do."""
    torch.manual_seed(1)
    return {
        name: torch.randn(n, shape.channels, -(-height // shape.stride), -(-width // shape.stride))
        for name, shape in SHAPES.items()
    }


def test_recomputing_the_encoder_changes_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = msdeformattn.EncoderLayer.forward
    monkeypatch.setattr(msdeformattn.EncoderLayer, "forward", lambda self, *a: calls.append(0) or forward(self, *a))
    results = []
    for encoder_checkpoint in (False, True):
        model = decoder(encoder_checkpoint=encoder_checkpoint).train()
        inputs = {name: x.requires_grad_() for name, x in features(64, 96).items()}
        mask_features, memory = model(inputs)
        (mask_features.square().sum() + memory[0].square().sum()).backward()
        results.append([mask_features, *(x.grad for x in inputs.values()), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert len(calls) == 2 + 2 * 2  # two layers; with the key each runs once more in the backward pass


@pytest.mark.parametrize(("height", "width"), [(64, 96), (71, 45), (33, 130)])
def test_sizes(height: int, width: int) -> None:
    inputs = features(height, width)
    mask_features, memory = decoder()(inputs)
    assert mask_features.shape == (2, MASK, *inputs["res2"].shape[-2:])
    assert [x.shape for x in memory] == [(2, C, *inputs[name].shape[-2:]) for name in ("res5", "res4", "res3")]


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        (["res4", "res5"], ["res2", "res3"]),
        (["res5", "res3", "res4"], ["res2"]),
        (["res2", "res5"], []),
        (["res5"], ["res2", "res3", "res4"]),
    ],
)
def test_choices_of_levels(chosen: list[str], steps: list[str]) -> None:
    """Levels count from coarse to fine whatever the order of the list; what is finer than them goes through the FPN."""
    inputs = features(64, 96)
    model = decoder(transformer_in_features=chosen)
    mask_features, memory = model(inputs)
    assert model.fpn_in_features == steps
    assert [x.shape[-2:] for x in memory] == [inputs[name].shape[-2:] for name in sorted(chosen, reverse=True)]
    assert mask_features.shape[-2:] == inputs["res2"].shape[-2:]
    for i, name in enumerate(steps, start=1):
        assert model.get_submodule(f"adapter_{i}").weight.shape == (C, SHAPES[name].channels, 1, 1)
    for name, value in inputs.items():
        changed = model({**inputs, name: value + torch.randn_like(value)})[0]
        assert (not torch.allclose(changed, mask_features)) == (name in [*chosen, *steps])


def test_coarser_mask_features() -> None:
    inputs = features(64, 96)
    mask_features, _ = decoder(common_stride=8)(inputs)
    assert mask_features.shape[-2:] == inputs["res3"].shape[-2:]


def test_choices_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\['res6'\].*res2"):
        decoder(transformer_in_features=["res4", "res6"])
    without_res2 = {name: shape for name, shape in SHAPES.items() if name != "res2"}
    with pytest.raises(ValueError, match="COMMON_STRIDE is 4"):
        decoder(input_shape=without_res2)
    with pytest.raises(ValueError, match="COMMON_STRIDE is 16"):
        decoder(common_stride=16)


def test_names_of_the_parameters() -> None:
    names = {name.rsplit(".", 1)[0] for name in decoder(num_encoder_layers=1).state_dict()}
    layer = "transformer.encoder.layers.0"
    attention = {
        f"{layer}.self_attn.{x}" for x in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    }
    assert names == attention | {f"{layer}.{x}" for x in ("norm1", "norm2", "linear1", "linear2")} | {
        *(f"input_proj.{i}.{j}" for i in range(3) for j in range(2)),
        *("transformer", "adapter_1", "adapter_1.norm", "layer_1", "layer_1.norm", "mask_features"),
    }


def naive_layer(layer: EncoderLayer, x: Tensor, pos: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Query with the position, value without; reference points at the cell centres; post-norm."""
    starts = [0]
    for h, w in shapes[:-1]:
        starts.append(starts[-1] + h * w)
    centres = [((j + 0.5) / w, (i + 0.5) / h) for h, w in shapes for i in range(h) for j in range(w)]
    reference = torch.tensor(centres)[None, :, None].expand(x.shape[0], -1, len(shapes), -1)
    y = layer.norm1(x + layer.self_attn(x + pos, reference, x, shapes, starts))
    return layer.norm2(y + layer.linear2(F.relu(layer.linear1(y))))


def test_whole_decoder_by_its_definition() -> None:
    model = decoder().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    inputs = features(45, 71)
    names = ["res5", "res4", "res3"]
    maps = [projection(inputs[name]) for projection, name in zip(model.input_proj, names, strict=True)]
    shapes = [(x.shape[2], x.shape[3]) for x in maps]
    x = torch.cat([y.flatten(2).transpose(1, 2) for y in maps], dim=1)
    pos = torch.cat(
        [
            sine_position_encoding(h, w, C, x.device).flatten(2).transpose(1, 2) + model.transformer.level_embed[i]
            for i, (h, w) in enumerate(shapes)
        ],
        dim=1,
    )
    for layer in model.transformer.encoder.layers:
        x = naive_layer(layer, x, pos, shapes)
    memory = [
        y.transpose(1, 2).reshape(2, C, h, w)
        for y, (h, w) in zip(x.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
    ]
    up = F.interpolate(memory[-1], size=inputs["res2"].shape[-2:], mode="bilinear", align_corners=False)
    fine = F.relu(model.layer_1.norm(F.conv2d(up + model.adapter_1(inputs["res2"]), model.layer_1.weight, padding=1)))
    expected = F.conv2d(fine, model.mask_features.weight, model.mask_features.bias)
    mask_features, found = model(inputs)
    torch.testing.assert_close(found, memory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask_features, expected, rtol=1e-4, atol=1e-4)
    assert model.adapter_1.bias is None
    assert model.layer_1.bias is None
    assert model.adapter_1.activation is None


def test_position_moves_the_query_only() -> None:
    """With offsets and weights that do not depend on the query, positions and levels change nothing."""
    model = decoder().eval()
    inputs = features(64, 96)
    fixed, _ = model(inputs)
    with torch.no_grad():
        model.transformer.level_embed.add_(5.0)
    torch.testing.assert_close(model(inputs)[0], fixed)  # their weights are zero in the beginning
    for layer in model.transformer.encoder.layers:
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight)
    moved, _ = model(inputs)
    with torch.no_grad():
        model.transformer.level_embed[1].neg_()
    assert not torch.allclose(model(inputs)[0], moved)


def test_cell_centres() -> None:
    points = cell_centres(((1, 2), (2, 1)), torch.device("cpu"))
    assert points.shape == (1, 4, 1, 2)
    assert points[0, :, 0].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_float32_under_autocast() -> None:
    model = decoder().eval()
    inputs = features(64, 96)
    expected, _ = model(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, memory = model(inputs)
    assert found.dtype == memory[0].dtype == torch.float32
    assert torch.equal(found, expected)


def test_group_norm_groups() -> None:
    assert decoder(conv_dim=256, num_heads=8).input_proj[0][1].num_groups == 32  # as released
    assert decoder().input_proj[0][1].num_groups == 2
