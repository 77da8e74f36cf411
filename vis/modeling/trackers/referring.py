"""The referring tracker (Zhang et al., DVIS, ICCV 2023, section 3.2; DVIS++, 2023, section 3.3).

Tracking as denoising: slots that heuristic matching has filled, with errors, are corrected by attention that is led by
what each object was in the frame before. Every frame has as many slots as the segmenter has queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from vis.config import declare
from vis.layers.attention import FFNLayer, SelfAttentionLayer
from vis.layers.linear import Linear
from vis.layers.mlp import MLP
from vis.layers.referring_attention import ReferringAttentionLayer
from vis.modeling.matchers.hungarian import linear_assignment
from vis.modeling.registry import TRACKER_REGISTRY
from vis.modeling.trackers.noise import Start, StartNoise, take
from vis.modeling.trackers.query_matching import cosine_similarity
from vis.structures import SegmenterClip, TrackerOutput

MATCHING = ("correct", "dvis_v1")
#: Released DVIS divides by the norm of a query and this; released MinVIS by the norm alone.
NORM_ADDED = 1e-6


@declare
def add_config(cfg: CfgNode) -> None:
    node = cfg.MODEL.TRACKER
    node.DECODER_LAYERS = 6
    # "dvis_v1": slots are filled by the inverse of the match, as the first release of DVIS did by mistake. For its
    # published weights alone, which were trained so.
    node.MATCHING = "correct"
    # What DVIS++ changed, each on its own: queries are taken and handed on without normalisation; ...
    node.RAW_EMBEDS = False
    # ... attention is led by a projection of the last frame's output, which the class head sees too; ...
    node.REFERENCE_PROJ = False
    # ... the tracker has a projection of the mask features of its own.
    node.MASK_FEATURE_PROJ = False
    # Noise on the slots of a training clip: "none", "rs" shuffle, "wa" weighted average, "cc" crop and concatenate; see
    # vis/modeling/trackers/noise.py. As in the denoising study of DVIS; DVIS++: wa, unmatched, permutation.
    node.NOISE_MODE = "rs"
    node.NOISE_RATIO = 0.5
    node.NOISE_BASE = "matched"
    node.NOISE_PARTNER = "iid"


@dataclass
class ReferringState:
    """Memory of B videos after a frame.

    Attributes:
        embeds: (B, Q, C), the segmenter's normalised queries in slot order, which the next frame is matched with.
        outputs: (B, Q, C), the last layer's queries, not normalised, which lead the next frame's attention.
    """

    embeds: Tensor
    outputs: Tensor


@TRACKER_REGISTRY.register()
class ReferringTracker(nn.Module):
    """Frame after frame: match, attend led by the frame before, predict. Parameter names are those of the release."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        mask_in_dim: int,
        mask_dim: int,
        num_heads: int,
        feedforward_dim: int,
        num_layers: int,
        dropout: float,
        matching: str,
        raw_embeds: bool,
        reference_proj: bool,
        mask_feature_proj: bool,
        noise: StartNoise,
    ) -> None:
        """Args: ``embed_dim`` C of the segmenter's queries; ``mask_in_dim`` channels of the mask features.

        Raises:
            ValueError: ``matching`` is unknown, or there is no layer.
        """
        super().__init__()
        if matching not in MATCHING:
            raise ValueError(f"MODEL.TRACKER.MATCHING is {matching!r}, expected one of {', '.join(MATCHING)}")
        if num_layers < 1:
            raise ValueError(f"MODEL.TRACKER.DECODER_LAYERS is {num_layers}, expected at least 1")
        self.matching, self.raw_embeds, self.noise = matching, raw_embeds, noise
        attention: dict[str, Any] = {"embed_dim": embed_dim, "num_heads": num_heads, "dropout": dropout}
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(**attention) for _ in range(num_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            ReferringAttentionLayer(**attention) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(embed_dim=embed_dim, hidden_dim=feedforward_dim, dropout=dropout) for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.class_embed = Linear(embed_dim * (2 if reference_proj else 1), num_classes + 1)
        self.mask_embed = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=mask_dim)
        self.ref_proj = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=embed_dim) if reference_proj else None
        self.mask_feature_proj = nn.Conv2d(mask_in_dim, mask_dim, 1) if mask_feature_proj else None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, former = cfg.MODEL.TRACKER, cfg.MODEL.MASK_FORMER
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "embed_dim": former.HIDDEN_DIM * (2 if former.REID_BRANCH else 1),
            "mask_in_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "num_heads": former.NHEADS,
            "feedforward_dim": former.DIM_FEEDFORWARD,
            "num_layers": node.DECODER_LAYERS,
            "dropout": former.DROPOUT,
            "matching": node.MATCHING,
            "raw_embeds": node.RAW_EMBEDS,
            "reference_proj": node.REFERENCE_PROJ,
            "mask_feature_proj": node.MASK_FEATURE_PROJ,
            "noise": StartNoise(
                mode=node.NOISE_MODE, ratio=node.NOISE_RATIO, base=node.NOISE_BASE, partner=node.NOISE_PARTNER
            ),
        }

    def forward(self, clip: SegmenterClip, state: ReferringState | None) -> tuple[TrackerOutput, ReferringState]:
        """Track T frames of B videos.

        Args:
            clip: the segmenter's predictions.
            state: what the call for the frames before returned; None opens the videos.

        Returns:
            Predictions (of every layer in training, of the last in eval mode), and the new state.

        Raises:
            ValueError: there is no frame, or ``raw_embeds`` are wanted and the clip has none.
        """
        embeds = self._queries(clip)
        if not embeds.shape[1]:
            raise ValueError("the tracker was given no frame")
        starts = self._starts(clip.pred_embeds, None if state is None else state.embeds)
        last = None if state is None else state.outputs
        frames, references = [], []
        for t, start in enumerate(starts):
            layers, reference = self._frame(start.apply(embeds[:, t]), last, embeds[:, t])
            last = layers[-1]
            frames.append(torch.stack(layers if self.training else layers[-1:]))  # (L, B, Q, C)
            references.append(reference)
        assert last is not None
        order = torch.stack([start.order for start in starts], dim=1).to(embeds.device)  # (B, T, Q)
        output = self._predict(torch.stack(frames, dim=2), torch.stack(references, dim=1), clip.mask_features, order)
        kept = take(clip.pred_embeds[:, -1], order[:, -1])
        return output, ReferringState(embeds=kept.detach(), outputs=last.detach())

    def frame_memory(self, clip: SegmenterClip) -> Tensor:
        """What the refiner looks at in each frame, (B, T, Q, C).

        DVIS: the frame's queries, in the segmenter's order, after a pass as the first frame of a video of its own;
        DVIS++: the segmenter's queries as they are.
        """
        embeds = self._queries(clip)
        if self.raw_embeds:
            return embeds
        flat = embeds.flatten(0, 1)  # (B*T, Q, C)
        layers, _ = self._frame(flat, None, flat)
        return self.decoder_norm(layers[-1]).unflatten(0, embeds.shape[:2])

    def _queries(self, clip: SegmenterClip) -> Tensor:
        if not self.raw_embeds:
            return clip.pred_embeds
        if clip.raw_embeds is None:
            raise ValueError("MODEL.TRACKER.RAW_EMBEDS is True, but the segmenter gives no queries without norm")
        return clip.raw_embeds

    @torch.no_grad()
    def _starts(self, embeds: Tensor, last: Tensor | None) -> list[Start]:
        """Where the slots of every frame start from.

        Matching needs the segmenter alone, so all of it is done before the first layer, after one transfer to the CPU.
        """
        opens = last is None
        before = embeds[:, :-1] if last is None else torch.cat([last[:, None], embeds[:, :-1]], dim=1)
        after = embeds[:, 1 if opens else 0 :]
        similarity = cosine_similarity(before, after, added=NORM_ADDED).cpu()  # (B, T or T-1, Q, Q)
        order = torch.arange(embeds.shape[2]).expand(len(embeds), -1)
        starts = [Start(order, order, order)] if opens else []
        for frame in similarity.unbind(1):
            # Rows are the frame before in the segmenter's order: brought into slot order.
            matched = torch.stack([self._match(1 - cost) for cost in take(frame, order)])
            start = self.noise.draw(matched, embeds.shape[3]) if self.training else Start(matched, matched, matched)
            order = start.order
            starts.append(start)
        return starts

    def _match(self, cost: Tensor) -> Tensor:
        """(Q, Q) costs of slots with queries -> (Q,) query of each slot."""
        _, index = linear_assignment(cost)
        return index if self.matching == "correct" else index.argsort()

    def _frame(self, x: Tensor, last: Tensor | None, memory: Tensor) -> tuple[list[Tensor], Tensor]:
        """One frame (B, Q, C) through all layers.

        Args:
            x: what slots start from; last: outputs of the frame before, None for the first; memory: all queries.

        Returns:
            The output of every layer, and what led the attention (of the first layer, where it changes).
        """
        leads, layers = None if last is None else self._reference(last), []
        reference = leads
        for attend, interact, feed in zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        ):
            query = self._reference(x) if leads is None else leads
            reference = query if reference is None else reference
            x = feed(interact(attend(x, query, memory)))
            layers.append(x)
        assert reference is not None
        return layers, reference

    def _reference(self, x: Tensor) -> Tensor:
        return x if self.ref_proj is None else self.ref_proj(x)

    def _predict(self, x: Tensor, references: Tensor, mask_features: Tensor, order: Tensor) -> TrackerOutput:
        """Outputs (L, B, T, Q, C) and references (B, T, Q, C) to predictions."""
        normed = self.decoder_norm(x)
        seen = normed if self.ref_proj is None else torch.cat([references.expand_as(normed), normed], dim=-1)
        if self.mask_feature_proj is not None:
            projected = self.mask_feature_proj(mask_features.flatten(0, 1))
            mask_features = projected.unflatten(0, mask_features.shape[:2])
        return TrackerOutput(
            pred_logits=self.class_embed(seen),
            mask_embeds=self.mask_embed(normed),
            mask_features=mask_features,
            pred_embeds=x[-1] if self.raw_embeds else normed[-1],
            references=None if self.ref_proj is None else references,
            order=order,
        )
