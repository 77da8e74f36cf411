"""VITA's module and losses the straightforward way, with the parameters of ours.

The video is padded to whole windows, rolled in shifted layers, and a float mask for every window and head keeps apart
what does not belong together. Every layer of the module's decoder predicts the masks of all video queries in all
frames; each layer, clip and copy of the queries is matched on its own. Likeness is measured between all pairs of a
batch and what belongs to different clips is masked out afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vis.engine.benchmarks.plain_losses import Points, draw_points, match_dense, sample_dense
from vis.layers.attention import SelfAttentionLayer
from vis.layers.effective_batch import effective_mean
from vis.layers.points import sample_points
from vis.modeling.criterions.mask_criterion import attached_zero
from vis.modeling.criterions.vita import VitaCriterion
from vis.modeling.losses.masks import dice_loss, sigmoid_ce_loss
from vis.modeling.matchers.hungarian import Pairs
from vis.modeling.transformer_decoders.vita import VitaModule, VitaOutput
from vis.structures import ClipTargets


class PlainVitaModule(VitaModule):
    """Windows by padding, rolling and masks."""

    def encode(self, frame_queries: Tensor) -> Tensor:
        """As in the base class."""
        x = self.input_proj_dec(frame_queries).flatten(0, 1)  # (L*B, T, F, C)
        frames, window = x.shape[1], self.window_size or x.shape[1]
        padded = math.ceil(frames / window) * window
        x = F.pad(x, (0, 0, 0, 0, 0, padded - frames))
        shift = math.ceil(window / 2) if self.window_size and (self.shift_in_training or not self.training) else 0
        for i, (attention, ffn) in enumerate(zip(self.enc_self_attn, self.enc_ffn, strict=True)):
            by = shift if i % 2 else 0
            bias = self._bias(x, frames, window, by)
            groups = x.roll(by, dims=1).unflatten(1, (-1, window)).flatten(2, 3).flatten(0, 1)
            x = ffn(_attend(cast(SelfAttentionLayer, attention), groups, bias)).view(x.shape).roll(-by, dims=1)
        return x[:, :frames].unflatten(0, frame_queries.shape[:2])

    def _bias(self, x: Tensor, frames: int, window: int, shift: int) -> Tensor:
        """-1000 for what is padding or another part of the video, (L*B*windows, M, W*F, W*F)."""
        time = torch.arange(x.shape[1], device=x.device).roll(shift).view(-1, window)
        rolled = time >= x.shape[1] - shift
        apart = (rolled[:, :, None] != rolled[:, None]) | (time >= frames)[:, None]  # (windows, W, W)
        bias = apart.to(x).mul(-1000.0).repeat_interleave(x.shape[2], 1).repeat_interleave(x.shape[2], 2)
        heads = cast(SelfAttentionLayer, self.enc_self_attn[0]).self_attn.num_heads
        return bias[:, None].repeat(len(x), heads, 1, 1)


def _attend(layer: SelfAttentionLayer, x: Tensor, bias: Tensor) -> Tensor:
    """The layer with a mask, which ours has no need of."""
    y = layer.norm(x) if layer.pre_norm else x
    out = x + layer.dropout(layer.self_attn(y, y, y, bias))
    return out if layer.pre_norm else layer.norm(out)


class PlainVitaCriterion(VitaCriterion):
    """Losses of tracklets from dense masks, decoder layer by decoder layer."""

    def forward(
        self,
        video: VitaOutput,
        features: Tensor,
        targets: Sequence[ClipTargets],
        frame_matches: Sequence[Sequence[Pairs]],
    ) -> dict[str, Tensor]:
        """As in the base class."""
        depth, copies, _, queries = video.pred_logits.shape[:4]
        masks = [torch.einsum("lbqc,btchw->lbqthw", embeds, features) for embeds in video.mask_embeds]
        rows = [depth * copies * min(len(target.labels), queries) * features.shape[1] for target in targets]
        points = draw_points(self, rows, features.device)
        count = copies * sum(len(target.labels) for target in targets)
        num_masks = effective_mean("vita.masks", count, features.device)
        ce, mask, dice = [], [], []
        matches: list[list[Pairs]] = []  # of the layer at hand, copy -> clip -> pairs
        for d in range(depth):
            matches = [
                [
                    self._match_clip(video.pred_logits[d, c, b], masks[d][c, b], target, points[b])
                    for b, target in enumerate(targets)
                ]
                for c in range(copies)
            ]
            labels = [target.labels for target in targets] * copies
            flat = [[pairs] for of_copy in matches for pairs in of_copy]
            ce += self.class_losses(video.pred_logits[d].flatten(0, 1)[None], labels, flat)
            predicted, wanted = self._sample_clips(masks[d], targets, matches, points, d)
            mask.append(sigmoid_ce_loss(predicted, wanted, num_masks))
            dice.append(dice_loss(predicted, wanted, num_masks))
        named = self.weighted(ce, mask, dice)
        losses = {name.replace("loss_", "loss_vita_", 1): loss for name, loss in named.items()}
        losses["loss_vita_sim"] = self.sim_weight * self._all_pairs(video, targets, frame_matches, matches)
        return losses

    @torch.no_grad()
    def _match_clip(self, logits: Tensor, masks: Tensor, target: ClipTargets, points: Points) -> Pairs:
        """Of one clip and copy: masks (Q, T, h, w), every frame of them read at the same points."""
        if not len(target.labels):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        predicted, wanted = (
            sample_points(x.flatten(0, 1)[:, None].float(), points.matching.expand(x.shape[:2].numel(), -1, -1)).view(
                len(x), -1
            )
            for x in (masks, target.masks)
        )
        return match_dense(self, logits, predicted, target.labels, wanted)

    def _sample_clips(
        self,
        masks: Tensor,
        targets: Sequence[ClipTargets],
        matches: Sequence[Sequence[Pairs]],
        points: Sequence[Points],
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Predictions and ground truth of a layer's tracklets, (instances, T*P) each; masks (L, B, Q, T, h, w)."""
        chosen, wanted, candidates, fresh = [], [], [], []
        for c, of_copy in enumerate(matches):
            for b, (queries, instances) in enumerate(of_copy):
                count = len(queries) * masks.shape[3]
                first = (layer * len(matches) + c) * count
                chosen.append(masks[c, b, queries.to(masks.device)].flatten(0, 1))
                wanted.append(targets[b].masks[instances.to(masks.device)].flatten(0, 1).float())
                candidates.append(points[b].candidates[first : first + count])
                fresh.append(points[b].fresh[first : first + count])
        together = torch.cat(chosen)
        if not len(together):
            return together.flatten(1) + attached_zero(masks), together.flatten(1)
        predicted, truth = sample_dense(self, together, torch.cat(wanted), torch.cat(candidates), torch.cat(fresh))
        length = masks.shape[3] * self.num_points
        return predicted.reshape(-1, length), truth.reshape(-1, length)

    def _all_pairs(
        self,
        video: VitaOutput,
        targets: Sequence[ClipTargets],
        frame_matches: Sequence[Sequence[Pairs]],
        matches: Sequence[Sequence[Pairs]],
    ) -> Tensor:
        """One matrix for the whole batch; ``matches`` are those of the last layer."""
        assert video.frame_embeds is not None
        copies, _, num_frames = video.frame_embeds.shape[:3]
        embeds, owners, groups = [], [], []
        for b, target in enumerate(targets):
            for c in range(copies):
                found = [
                    (video.frame_embeds[c, b, t], target.ids[target.ids[:, t] != -1, t], pairs[c - copies])
                    for t, pairs in enumerate(frame_matches[b * num_frames : (b + 1) * num_frames])
                ]
                if self.sim_use_clip:
                    found.append((video.clip_embeds[c, b], target.ids.amax(dim=1), matches[c][b]))
                for queries, ids, (rows, instances) in found:
                    embeds.append(queries[rows.to(queries.device)])
                    owners.append(ids[instances.to(ids.device)])
                    groups.append(torch.full_like(owners[-1], b * copies + c))
        every, owner, group = torch.cat(embeds).float(), torch.cat(owners), torch.cat(groups)
        if not len(every):
            return attached_zero(video.frame_embeds, video.clip_embeds)
        same = (owner[:, None] == owner).to(every)
        counts = (group[:, None] == group).to(every)
        return (F.binary_cross_entropy_with_logits(every @ every.T, same, reduction="none") * counts).sum() / (
            counts.sum() + 1e-6
        )
