"""Our model beside the released architecture in plain PyTorch: the same weights, the same frames, in the same run.

:func:`plain` turns a model into what the released code computes without its own kernels, and back:

* deformable attention by ``grid_sample``, level by level (in the pixel decoder and in the ViT adapter);
* the masks of masked attention from predictions at full size (a quarter of the frame), after every layer and once
  before, resized to the memory level and repeated for every head;
* attention as ``softmax(QK^T / sqrt(d)) V`` with the matrix in memory, in decoder, trackers, Swin and ViT;
* linear layers and 1x1 convolutions of torch, frames in torch's usual layout instead of channels last.

The rest (convolutions, tracking, encoding of masks, windows) is the same code on both sides, so ratios of the whole are
those of a released system with our post-processing. Of IDOL the post-processing is the released one too
(:mod:`~vis.engine.benchmarks.plain_idol`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.swin import WindowAttention
from timm.models.vision_transformer import Attention  # timm.layers has it in new versions only
from torch import Tensor, nn

from vis.layers.attention import MultiheadAttention
from vis.layers.linear import Linear, PointwiseConv2d
from vis.layers.ms_deform_attn import op, reference
from vis.modeling.backbones.swin import FusedWindowAttention
from vis.modeling.segmenter import FrameNormalizer
from vis.modeling.transformer_decoders.masked import DecoderOutput, LayerPrediction, MultiScaleMaskedTransformerDecoder


class PlainAttention(MultiheadAttention):
    """Scores of all heads as one matrix in memory, masked, softmax, product."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """As in the base class; ``allowed`` may have one mask for each head, (B, M, Lq, Lk), or be added to scores."""
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (
            F.linear(x, *projection).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, projection in zip((query, key, value), projections, strict=True)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, M, Lq, Lk)
        if allowed is not None and allowed.is_floating_point():
            scores = scores + allowed
        elif allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class DensePrediction(LayerPrediction):
    """Of one layer, with mask logits (N, Q, h, w) of every query."""

    pred_masks: Tensor


class PlainDecoder(MultiScaleMaskedTransformerDecoder):
    """Predicts classes and full-size masks before the first and after every layer; in training it keeps them all."""

    def forward(self, memory: Sequence[Tensor], mask_features: Tensor) -> DecoderOutput:
        """As in the base class; in training every prediction is a :class:`DensePrediction` too."""
        levels, positions = self._prepare(memory)
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in memory]
        query_pos = self.query_embed.weight
        x = self.query_feat.weight.expand(mask_features.shape[0], -1, -1)
        output, allowed = self._predict(x, mask_features, sizes[0])
        earlier: list[LayerPrediction] = []
        layers = (
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
        )
        for i, (look, exchange, feed_forward) in enumerate(zip(*layers, strict=True)):
            level, following = i % self.num_levels, sizes[(i + 1) % self.num_levels]
            if self.training and self.deep_supervision:
                kept = {name: output[name] for name in DensePrediction.__annotations__}  # type: ignore[literal-required]
                earlier.append(cast(DensePrediction, kept))
            x = look(x, levels[level], query_pos=query_pos, memory_pos=positions[level], allowed=allowed)
            x = feed_forward(exchange(x, query_pos))
            output, allowed = self._predict(x, mask_features, following)
        output["aux_outputs"] = earlier
        return output

    def _predict(self, x: Tensor, features: Tensor, size: tuple[int, int]) -> tuple[DecoderOutput, Tensor]:
        """Predictions of the queries, and where they may look at a level of ``size``: (N, M, Q, h*w)."""
        normed = self.decoder_norm(x)
        embeds = self.mask_embed(normed)
        masks = torch.einsum("nqc,nchw->nqhw", embeds, features)
        resized = F.interpolate(masks, size=size, mode="bilinear", align_corners=False).flatten(2)
        forbidden = (resized.sigmoid() < 0.5)[:, None].repeat(1, self.num_heads, 1, 1)
        forbidden[forbidden.sum(dim=-1) == forbidden.shape[-1]] = False
        output = DecoderOutput(
            pred_logits=self.class_embed(normed), pred_embeds=normed, raw_embeds=x, mask_embeds=embeds, aux_outputs=[]
        )
        output["mask_features"] = features
        if self.training:
            output["pred_masks"] = masks  # type: ignore[typeddict-unknown-key]
        if self.reid_embed is not None:
            output["reid_embeds"] = self.reid_embed(normed)
            for name, own in (("pred_embeds", normed), ("raw_embeds", x)):
                output[name] = torch.cat([own, output["reid_embeds"]], dim=-1)  # type: ignore[literal-required]
        return output, ~forbidden


class PlainFrames(FrameNormalizer):
    """Frames in torch's usual layout."""

    def forward(self, frames: Sequence[Tensor]) -> Tensor:
        """As in the base class."""
        return super().forward(frames).contiguous()


#: Our class -> the plain one with the same parameters.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    Linear: nn.Linear,
    PointwiseConv2d: Conv2d,
    MultiheadAttention: PlainAttention,
    MultiScaleMaskedTransformerDecoder: PlainDecoder,
    FrameNormalizer: PlainFrames,
    FusedWindowAttention: WindowAttention,
}


@contextmanager
def plain(model: nn.Module, also: Mapping[type[nn.Module], type[nn.Module]] | None = None) -> Iterator[None]:
    """While the body runs, ``model`` computes as the released code does (see the head of this file).

    Args:
        also: more classes, and those that take their place.
    """
    instead = {**_PLAIN, **(also or {})}
    swapped = [(module, type(module)) for module in model.modules() if type(module) in instead]
    fused = [(module, module.fused_attn) for module in model.modules() if isinstance(module, Attention)]
    backends = dict(op.RUN)
    try:
        for module, ours in swapped:
            module.__class__ = instead[ours]
        for attention, _ in fused:
            attention.fused_attn = False  # type: ignore[misc]  # final for scripting only
        op.RUN.update(dict.fromkeys(backends, reference.by_grid_sample))
        yield
    finally:
        for module, ours in swapped:
            module.__class__ = ours
        for attention, before in fused:
            attention.fused_attn = before  # type: ignore[misc]
        op.RUN.update(backends)
