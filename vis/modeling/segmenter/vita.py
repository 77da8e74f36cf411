"""What VITA takes from the per-frame segmenter besides its predictions: queries of the last layers, the finest map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vis.modeling.transformer_decoders.masked import DecoderOutput


class SegmentedFrames(NamedTuple):
    """N frames: predictions, queries (L, N, Q, C) after the norm, the map (N, C, h, w) mask features are made from."""

    output: DecoderOutput
    frame_queries: Tensor
    finest: Tensor


def check_parts(head: nn.Module, num_layers: int) -> None:
    """Raises:
    ValueError: the head has no such queries or map, or fewer than ``num_layers`` layers.
    """
    found = {"sem_seg_head.pixel_decoder": "mask_features", "sem_seg_head.predictor": "decoder_norm"}
    for part, name in found.items():
        owner = getattr(head, part.rpartition(".")[2], None)
        if not isinstance(getattr(owner, name, None), nn.Module):
            raise ValueError(
                f"VITA needs a Mask2Former head: {part} ({type(owner).__name__}) has no {name}. "
                "Set MODEL.SEM_SEG_HEAD.NAME MaskFormerHead and its decoders"
            )
    there = len(head.predictor.transformer_ffn_layers)  # type: ignore[union-attr, arg-type]
    if not 1 <= num_layers <= there:
        raise ValueError(f"MODEL.VITA.LAST_LAYER_NUM is {num_layers}; the frame decoder has {there} layers")


def segment_frames(backbone: nn.Module, head: nn.Module, images: Tensor, num_layers: int) -> SegmentedFrames:
    """Normalised frames (N, 3, H, W) -> predictions, queries of the last ``num_layers`` layers, the finest map.

    The head's parts are listened to while it runs, so that it is the one that the other methods use.
    """
    features = backbone(images)
    with _calls(head.pixel_decoder.mask_features) as maps, _calls(head.predictor.decoder_norm) as queries:  # type: ignore[union-attr, arg-type]
        output = head(features)
    return SegmentedFrames(output, torch.stack([normed for _, normed in queries[-num_layers:]]), maps[0][0])


@contextmanager
def _calls(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of every call of a module while the context is open."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    try:
        yield calls
    finally:
        handle.remove()
