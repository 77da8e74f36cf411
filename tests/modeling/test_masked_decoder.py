from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vis.layers.position_encoding import sine_position_encoding
from vis.modeling.transformer_decoders import MultiScaleMaskedTransformerDecoder
from vis.modeling.transformer_decoders.masked import attention_mask, predict_masks

N, Q, K, C, MASK, IN = 2, 5, 4, 12, 7, 10
SIZES, FINE = [(2, 3), (4, 6), (7, 11)], (14, 22)


def decoder(**changes: Any) -> MultiScaleMaskedTransformerDecoder:
    values: dict[str, Any] = {
        "in_channels": C,
        "num_classes": K,
        "hidden_dim": C,
        "num_queries": Q,
        "num_heads": 3,
        "feedforward_dim": 17,
        "num_layers": 4,
        "num_levels": 3,
        "mask_dim": MASK,
        "dropout": 0.0,
        "pre_norm": False,
        "enforce_input_proj": False,
        "deep_supervision": True,
    }
    model = MultiScaleMaskedTransformerDecoder(**{**values, **changes})
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def inputs(channels: int = C) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(1)
    return [torch.randn(N, channels, *size) for size in SIZES], torch.randn(N, MASK, *FINE)


def forbidden_by_resizing_masks(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, Q, L): the masks of all queries at full size, resized, cut at a probability of a half; empty rows opened."""
    small = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).flatten(2)
    forbidden = small.sigmoid() < 0.5
    forbidden[forbidden.all(dim=-1)] = False
    return forbidden


def test_attention_mask_equals_resized_masks() -> None:
    embeds, features = torch.randn(N, Q, MASK), torch.randn(N, MASK, *FINE)
    for size in SIZES:
        small = F.interpolate(features, size=size, mode="bilinear", align_corners=False).flatten(2)
        allowed = attention_mask(embeds, small)
        assert allowed.shape == (N, 1, Q, size[0] * size[1])
        expected = ~forbidden_by_resizing_masks(predict_masks(embeds, features), size)
        assert torch.equal(allowed[:, 0], expected)
        assert 0.2 < float(allowed.float().mean()) < 0.8


def test_a_forbidden_row_is_opened() -> None:
    features = torch.tensor([[[1.0, 2.0, 3.0]]])  # (1, 1, 3)
    embeds = torch.tensor([[[-1.0], [1.0], [0.0]]])
    assert attention_mask(embeds, features)[0, 0].tolist() == [[True] * 3] * 3
    features = torch.tensor([[[-1.0, 2.0, 0.0]]])
    expected = [[True, False, True], [False, True, True], [True, True, True]]  # a logit of 0 is inside
    assert attention_mask(embeds, features)[0, 0].tolist() == expected


def test_attention_mask_has_no_gradient() -> None:
    embeds = torch.randn(N, Q, MASK, requires_grad=True)
    assert not attention_mask(embeds, torch.randn(N, MASK, 6)).requires_grad


def torch_attention(ours: nn.Module) -> nn.MultiheadAttention:
    other = nn.MultiheadAttention(C, 3, batch_first=True).eval()
    other.load_state_dict(ours.state_dict())
    return other


def naive(model: MultiScaleMaskedTransformerDecoder, memory: list[Tensor], mask_features: Tensor) -> list[Any]:
    """Logits, dense masks and normed queries of every layer: masks at full size, torch's own attention, post-norm."""
    x, pos = model.query_feat.weight.expand(N, -1, -1), model.query_embed.weight
    found = []

    def predict() -> Tensor:
        normed = model.decoder_norm(x)
        masks = torch.einsum("nqc,nchw->nqhw", model.mask_embed(normed), mask_features)
        found.append((model.class_embed(normed), masks, normed))
        return masks

    masks = predict()
    for i in range(len(model.transformer_ffn_layers)):
        level = i % 3
        size = SIZES[level]
        source = memory[level].flatten(2).transpose(1, 2) + model.level_embed.weight[level]
        keys = source + sine_position_encoding(*size, C, x.device).flatten(2).transpose(1, 2)
        forbidden = forbidden_by_resizing_masks(masks, size).repeat_interleave(3, dim=0)
        cross = model.transformer_cross_attention_layers[i]
        x = cross.norm(x + torch_attention(cross.multihead_attn)(x + pos, keys, source, attn_mask=forbidden)[0])
        own = model.transformer_self_attention_layers[i]
        x = own.norm(x + torch_attention(own.self_attn)(x + pos, x + pos, x)[0])
        feed = model.transformer_ffn_layers[i]
        x = feed.norm(x + feed.linear2(F.relu(feed.linear1(x))))
        masks = predict()
    return found


def test_equals_the_dense_computation() -> None:
    model = decoder().train()
    memory, mask_features = inputs()
    expected = naive(model, memory, mask_features)
    found = model(memory, mask_features)
    layers = [*found["aux_outputs"], found]
    assert len(layers) == len(expected) == 5
    for layer, (logits, masks, _) in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer["pred_logits"], logits, rtol=1e-3, atol=1e-4)
        dense = predict_masks(layer["mask_embeds"], mask_features)
        torch.testing.assert_close(dense, masks, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["pred_embeds"], expected[-1][2], rtol=1e-3, atol=1e-4)
    assert found["pred_logits"].shape == (N, Q, K + 1)
    assert found["mask_features"] is mask_features


def test_aux_outputs_only_in_training() -> None:
    memory, mask_features = inputs()
    model = decoder()
    assert model(memory, mask_features)["aux_outputs"] == []
    assert len(model.train()(memory, mask_features)["aux_outputs"]) == 4
    assert decoder(deep_supervision=False).train()(memory, mask_features)["aux_outputs"] == []


def test_frames_do_not_see_one_another() -> None:
    model = decoder()
    memory, mask_features = inputs()
    both = model(memory, mask_features)
    alone = model([x[1:] for x in memory], mask_features[1:])
    torch.testing.assert_close(both["pred_embeds"][1:], alone["pred_embeds"], rtol=1e-4, atol=1e-4)


def test_pre_norm_keeps_the_sum() -> None:
    """With pre-norm and layers whose outputs are zero, the queries come out as they went in."""
    model = decoder(pre_norm=True)
    for name, parameter in model.named_parameters():
        if ".out_proj." in name or ".linear2." in name:
            nn.init.zeros_(parameter)
    memory, mask_features = inputs()
    expected = model.decoder_norm(model.query_feat.weight).expand(N, -1, -1)
    torch.testing.assert_close(model(memory, mask_features)["pred_embeds"], expected)


def test_input_projection_only_where_it_is_needed() -> None:
    assert not [name for name in decoder().state_dict() if name.startswith("input_proj")]
    for model, channels in ((decoder(in_channels=IN), IN), (decoder(enforce_input_proj=True), C)):
        names = [name for name in model.state_dict() if name.startswith("input_proj")]
        assert names == [f"input_proj.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
        memory, mask_features = inputs(channels)
        assert model(memory, mask_features)["pred_embeds"].shape == (N, Q, C)


def test_wrong_number_of_levels() -> None:
    memory, mask_features = inputs()
    with pytest.raises(ValueError, match="zip"):
        decoder(num_levels=2)(memory, mask_features)


@pytest.mark.parametrize(("dec_layers", "layers"), [(2, 1), (10, 9)])
def test_dec_layers_counts_the_first_prediction(tiny_cfg: Any, dec_layers: int, layers: int) -> None:
    cfg = tiny_cfg({"MODEL.MASK_FORMER.DEC_LAYERS": dec_layers})
    model = MultiScaleMaskedTransformerDecoder(cfg, 32)
    assert len(model.transformer_ffn_layers) == layers


def test_too_few_layers(tiny_cfg: Any) -> None:
    with pytest.raises(ValueError, match="DEC_LAYERS is 1; it needs at least 2"):
        MultiScaleMaskedTransformerDecoder(tiny_cfg({"MODEL.MASK_FORMER.DEC_LAYERS": 1}), 32)


@torch.no_grad()
def test_reid_branch_adds_embeddings_and_changes_nothing_else() -> None:
    plain, model = decoder(), decoder(reid_branch=True)
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added == {f"reid_embed.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    model.load_state_dict(plain.state_dict(), strict=False)
    memory, mask_features = inputs()
    expected, found = plain(memory, mask_features), model(memory, mask_features)
    assert "reid_embeds" not in expected
    for name in ("pred_logits", "mask_embeds"):
        assert torch.equal(found[name], expected[name])  # type: ignore[literal-required]
    reid = found["reid_embeds"]
    torch.testing.assert_close(reid, model.reid_embed(expected["pred_embeds"]))  # type: ignore[misc]
    assert torch.equal(found["pred_embeds"], torch.cat([expected["pred_embeds"], reid], dim=-1))
    assert torch.equal(found["raw_embeds"], torch.cat([expected["raw_embeds"], reid], dim=-1))
    torch.testing.assert_close(expected["pred_embeds"], plain.decoder_norm(expected["raw_embeds"]))
