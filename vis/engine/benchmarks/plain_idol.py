"""IDOL's inference the released way, with the parameters of ours, and weights under which an untrained IDOL tracks.

Released, section by section: every query of every frame gets a mask and an embedding, by grouped convolutions over
features that are repeated, with coordinates, for each query. The masks of all queries and frames are kept until the
video has been seen. Then frames are gone through: threshold, box NMS, mask NMS pair by pair, the memory bank. A track's
masks are resized to the input as a whole, cut, brought to the original size and encoded. The network, box NMS and the
memory bank are the same code on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.layers.dynamic_conv import aligned_bilinear, split_parameters
from vis.modeling.heads.dynamic_mask import WIDTHS
from vis.modeling.inference.detections import select_queries
from vis.modeling.inference.growing import GrowingTracks
from vis.modeling.inference.session import windows
from vis.modeling.meta_arch.idol import IDOL
from vis.modeling.trackers.memory_bank import FrameDetections
from vis.structures import RLE, ClipSample, VideoPrediction
from vis.structures.rle import decode, encode_masks

_STRIDE = 8
# Of an embedding with itself: enough for a softmax over tens of tracks to settle.
_PRODUCT = 60.0


class PlainIDOL(IDOL):
    """A video in the released way; training and sessions are as ever."""

    def predict(self, sample: ClipSample) -> VideoPrediction:
        """As in the base class."""
        frames: list[dict[str, Tensor]] = []
        padded = (0, 0)
        for window in windows(sample["image"], self.window_size):
            images = self.normalizer(window)
            padded = (int(images.shape[-2]), int(images.shape[-1]))
            frames += self._every_query(images, _size(window[0]))
        tracks, kept = GrowingTracks(self.rules), dict[int, dict[int, Tensor]]()
        state = None
        for t, frame in enumerate(frames):
            chosen = select_queries(
                frame["probabilities"], frame["boxes"], threshold=self.select_threshold, iou=self.box_iou
            )
            chosen = chosen[pairwise_mask_nms(frame["masks"][chosen.cpu()], self.mask_iou)]
            probabilities = frame["probabilities"][chosen]
            ids, state = self.tracker(FrameDetections(probabilities.amax(dim=1), frame["embeds"][chosen]), state)
            rows = [row for row, track in enumerate(ids) if track >= 0]
            tracks.add([ids[row] for row in rows], probabilities[rows], [None] * len(rows))
            for row in rows:
                kept.setdefault(ids[row], {})[t] = frame["masks"][int(chosen[row])]
        scores, labels, ids_of_results = tracks.results()
        size = (sample["height"], sample["width"])
        coded = {
            track: _whole_track(kept[track], len(frames), padded, _size(sample["image"][0]), size)
            for track in ids_of_results.unique().tolist()
        }
        masks = [coded[track] for track in ids_of_results.tolist()]
        return VideoPrediction(scores, labels, ids_of_results, masks, *size, len(frames), sample.get("video_id"))

    def _every_query(self, images: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """For each frame what all Q queries say; masks (Q, H/4, W/4) are on the CPU, as released."""
        found = self.detr(images, [size] * len(images))
        features = self.detr.mask_features(found.maps)
        last = found.layers[-1]
        probabilities = self.detr.detr.class_logits(last, -1).sigmoid()
        embeds = self.detr.embeds(last.queries)
        scale = last.points.new_tensor([size[1], size[0]])
        return [
            {
                "probabilities": probabilities[i],
                "boxes": last.boxes[i],
                "embeds": embeds[i],
                "masks": grouped_masks(
                    features[i], self.detr.controller(last.queries[i]), last.points[i] * scale
                ).cpu(),
            }
            for i in range(len(images))
        ]


def grouped_masks(features: Tensor, parameters: Tensor, points: Tensor) -> Tensor:
    """As :func:`~vis.modeling.heads.dynamic_mask.dynamic_masks`, as one grouped convolution for each layer."""
    height, width = features.shape[-2:]
    count = len(parameters)
    y, x = (torch.arange(n, device=features.device) * _STRIDE + _STRIDE // 2 for n in (height, width))
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy")).to(points)  # (2, h, w)
    relative = points[:, :, None, None] - centres
    out = torch.cat([relative, features.expand(count, -1, -1, -1)], dim=1).reshape(1, -1, height, width)
    weights, biases = split_parameters(parameters, WIDTHS)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = F.conv2d(out, weight.flatten(0, 1)[..., None, None], bias.flatten(), groups=count)
        out = F.relu(out) if i + 1 < len(weights) else out
    return aligned_bilinear(out.view(count, 1, height, width), 2)[:, 0]


def pairwise_mask_nms(logits: Tensor, iou: float) -> Tensor:
    """As :func:`~vis.modeling.inference.detections.mask_nms`, one pair at a time."""
    masks = logits.sigmoid() > 0.5
    kept: list[int] = []
    for row in range(len(masks)):
        overlap = (float(((masks[row] & masks[k]).sum() + 1e-6) / ((masks[row] | masks[k]).sum() + 1e-6)) for k in kept)
        if all(value <= iou for value in overlap):
            kept.append(row)
    return torch.tensor(kept, dtype=torch.int64)


def _whole_track(
    logits: dict[int, Tensor], length: int, padded: tuple[int, int], inside: tuple[int, int], size: tuple[int, int]
) -> list[RLE | None]:
    """RLEs of all frames of a track whose mask logits (h, w) at stride 4 are given where it is seen."""
    seen = sorted(logits)
    full = F.interpolate(
        torch.stack([logits[t] for t in seen])[None], size=padded, mode="bilinear", align_corners=False
    )
    full = F.interpolate(full.sigmoid()[..., : inside[0], : inside[1]], size=size, mode="nearest")[0] > 0.5
    coded = dict(zip(seen, encode_masks(full.transpose(1, 2).contiguous()), strict=True))
    return [coded.get(t) for t in range(length)]


@torch.no_grad()
def enliven(model: IDOL, frame: Tensor, *, detections: int = 20) -> None:
    """Give an untrained model scores and embeddings by which it finds and tracks as much as a trained one in a crowd.

    With initial weights every score is 0.01 and nothing is a detection, and embeddings are too short and too alike to
    link anything. The last class layer is scaled so that queries and classes differ, and shifted so that in ``frame``
    (3, H, W) so many queries have a class above 0.3; embeddings are moved to a mean of zero and made longer.
    """
    last = model.detr(model.normalizer([frame]), [_size(frame)]).layers[-1]
    classes: Any = model.detr.detr.class_embed[-1]
    classes.bias.zero_()
    classes.weight.mul_(2.0 / float(model.detr.detr.class_logits(last, -1).std()))
    best = model.detr.detr.class_logits(last, -1)[0].amax(dim=1).sort(descending=True).values
    classes.bias.fill_(float(torch.logit(torch.tensor(0.3)) - best[min(detections, len(best)) - 1]))
    embed: Any = model.detr.reid_embed_head.layers[-1]
    embeds = model.detr.embeds(last.queries)[0]
    embed.bias.sub_(embeds.mean(dim=0))
    longer = _PRODUCT**0.5 / float((embeds - embeds.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    embed.weight.mul_(longer)
    embed.bias.mul_(longer)


def disagreement(ours: VideoPrediction, other: VideoPrediction) -> dict[str, Any]:
    """How far two results of one video are apart: whether they are the same tracks, scores, share of other pixels."""

    def named(result: VideoPrediction) -> dict[tuple[int, int], tuple[float, Sequence[RLE | None]]]:
        keys = zip(result.track_ids.tolist(), result.labels.tolist(), strict=True)
        return dict(zip(keys, zip(result.scores.tolist(), result.masks, strict=True), strict=True))

    a, b = named(ours), named(other)
    both = sorted(set(a) & set(b))
    pixels = filled = 0
    for track in {key[0]: key for key in both}.values():  # classes of one track share its masks
        for one, two in zip(a[track][1], b[track][1], strict=True):
            first, second = (None if rle is None else decode(rle) for rle in (one, two))
            if first is not None or second is not None:
                blank = (first if first is not None else second) & False  # type: ignore[operator]
                first, second = (blank if x is None else x for x in (first, second))
                pixels += int((first != second).sum())
                filled += int((first | second).sum())
    return {
        "results": [len(a), len(b)],
        "in_both": len(both),
        "scores_apart": max((abs(a[key][0] - b[key][0]) for key in both), default=0.0),
        "pixels_apart": pixels,
        "pixels": filled,
    }


def _size(picture: Tensor) -> tuple[int, int]:
    return int(picture.shape[-2]), int(picture.shape[-1])
