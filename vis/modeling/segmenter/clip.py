"""Predictions of single frames, grouped into clips."""

from __future__ import annotations

from vis.modeling.transformer_decoders.masked import DecoderOutput
from vis.structures import SegmenterClip


def as_clips(outputs: DecoderOutput, num_videos: int) -> SegmenterClip:
    """Predictions of N = B*T frames, video after video, as those of ``num_videos`` videos of T frames each.

    Raises:
        ValueError: N is no multiple of ``num_videos``.
    """
    frames = len(outputs["pred_logits"])
    if num_videos < 1 or frames % num_videos:
        raise ValueError(f"{frames} frames cannot be {num_videos} clips of one length (INPUT.SAMPLING_FRAME_NUM)")
    shape = (num_videos, frames // num_videos)
    raw = outputs.get("raw_embeds")
    return SegmenterClip(
        pred_logits=outputs["pred_logits"].unflatten(0, shape),
        pred_embeds=outputs["pred_embeds"].unflatten(0, shape),
        raw_embeds=None if raw is None else raw.unflatten(0, shape),
        mask_embeds=outputs["mask_embeds"].unflatten(0, shape),
        mask_features=outputs["mask_features"].unflatten(0, shape),
    )
