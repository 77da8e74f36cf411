"""detectron2's heads of Mask R-CNN (He et al., ICCV 2017) with a branch for identities and one for embeddings.

The identity branch is IAI's on Mask R-CNN (Zhu et al., "Instance As Identity", ECCV 2022, section 3.3 and table 6):
parallel to classes, boxes and masks, shaped nearly as the class head, a softmax over N identities and background. That
its hidden layer is its own is a reading of "parallel"; ``MODEL.MASK_RCNN.ID_HEAD.SHARED_FC`` lets it read the hidden
features of the class head instead. The embedding branch is MaskTrack R-CNN's.

Losses are computed here rather than by detectron2, with a weight for every region: a group of frames (a time step of
the clips) is then normalised by itself, whatever else is in the batch. With one group they equal detectron2's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from vis.modeling.detectors.base import Positives, Pyramid
from vis.modeling.heads.track_embedding import TrackHead


class IdentityHead(nn.Module):
    """Logits of N identities and background, the last."""

    def __init__(self, *, in_features: int, hidden_dim: int, num_ids: int, shared: bool) -> None:
        """Args:
        in_features: of a pooled box; hidden_dim: of the hidden layer, which with ``shared`` is that of the class head.
        """
        super().__init__()
        self.num_ids = num_ids
        self.fc = None if shared else nn.Linear(in_features, hidden_dim)
        self.predictor = nn.Linear(hidden_dim, num_ids + 1)
        if self.fc is not None:
            nn.init.kaiming_uniform_(self.fc.weight, a=1)
            nn.init.zeros_(self.fc.bias)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, pooled: Tensor, hidden: Tensor) -> Tensor:
        """Pooled features (R, C, h, w) and hidden ones of the class head (R, D) -> (R, N+1)."""
        return self.predictor(hidden if self.fc is None else F.relu(self.fc(pooled.flatten(1))))


@dataclass
class Regions:
    """The R sampled regions of a batch.

    Attributes:
        boxes: (R, 4); labels: (R,) int64, K for background; frames: (R,) int64.
        instances: (R,) int64, of its frame; matched: (R, 4) box of that instance. Both are anything for background.
        ids: (R,) int64 identities to name, N for background; None without an identity head.
        positive: (R,) bool, of an instance; P is their number.
        weights: (R,) share in a loss of all regions; positive_weights: (P,) in a loss of the positive ones.
    """

    boxes: Tensor
    labels: Tensor
    frames: Tensor
    instances: Tensor
    matched: Tensor
    ids: Tensor | None
    positive: Tensor
    weights: Tensor
    positive_weights: Tensor


class VideoROIHeads(StandardROIHeads):
    """Names of parameters are detectron2's, beside ``id_head`` and ``track_head``."""

    id_head: IdentityHead | None
    track_head: TrackHead | None

    @configurable
    def __init__(self, *, id_head: IdentityHead | None = None, track_head: TrackHead | None = None, **kwargs: Any):
        """Args: the first two are None where there is no such branch; the others are detectron2's."""
        super().__init__(**kwargs)
        if not self.mask_on or self.keypoint_on:
            raise ValueError("detector MaskRCNN predicts masks and no keypoints: MODEL.MASK_ON True, KEYPOINT_ON False")
        self.id_head, self.track_head = id_head, track_head

    @classmethod
    def from_config(  # type: ignore[override]
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], *, num_ids: int = 0, embed_dim: int = 0
    ) -> dict[str, Any]:
        node = cfg.MODEL.MASK_RCNN
        _refuse_other_losses(cfg)
        args = super().from_config(cfg, input_shape)
        side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        pooled = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels * side * side
        if num_ids:
            shared = node.ID_HEAD.SHARED_FC
            hidden = args["box_head"].output_shape.channels if shared else node.ID_HEAD.FC_DIM
            args["id_head"] = IdentityHead(in_features=pooled, hidden_dim=hidden, num_ids=num_ids, shared=shared)
        if embed_dim:
            args["track_head"] = TrackHead(
                in_features=pooled,
                hidden_dim=node.TRACK_HEAD.FC_DIM,
                embed_dim=embed_dim,
                last_relu=node.TRACK_HEAD.LAST_RELU,
            )
        return args

    def region_losses(
        self,
        features: Pyramid,
        proposals: list[Instances],
        targets: Sequence[Instances],
        groups: Tensor | None,
    ) -> tuple[dict[str, Tensor], Positives]:
        """Losses of sampled proposals (drawn with torch's global random state), and the positive ones."""
        regions = self._sample(proposals, targets, groups)
        lists = list(torch.split(regions.boxes, _counts(regions.frames, len(targets))))
        pooled = self.pool_boxes(features, lists)
        hidden = self.box_head(pooled)
        logits, deltas = self.box_predictor(hidden)
        cross_entropy = F.cross_entropy(logits.float(), regions.labels, reduction="none")
        losses = {
            "loss_cls": (cross_entropy * regions.weights).sum(),
            "loss_box_reg": self._box_loss(deltas.float(), regions),
            "loss_mask": self._mask_loss(features, targets, regions),
        }
        if self.id_head is not None:
            assert regions.ids is not None
            of_ids = F.cross_entropy(self.id_head(pooled, hidden).float(), regions.ids, reduction="none")
            losses["loss_id"] = (of_ids * regions.weights).sum()
        embeds = None if self.track_head is None else self.track_head(pooled[regions.positive])
        return losses, Positives(regions.frames[regions.positive], regions.instances[regions.positive], embeds)

    @torch.no_grad()
    def _sample(self, proposals: list[Instances], targets: Sequence[Instances], groups: Tensor | None) -> Regions:
        # Without masks, which detectron2 would copy for every region.
        light = []
        for target in targets:
            index = torch.arange(len(target), device=target.gt_classes.device)
            names = ("gt_boxes", "gt_classes", *(("gt_head_ids",) if self.id_head is not None else ()))
            fields = {name: target.get(name) for name in names}
            light.append(Instances(target.image_size, gt_index=index, **fields))
        sampled = self.label_and_sample_proposals(proposals, light)
        boxes = torch.cat([x.proposal_boxes.tensor for x in sampled])
        labels = torch.cat([x.gt_classes for x in sampled])
        counts = torch.tensor([len(x) for x in sampled], device=boxes.device)
        frames = torch.arange(len(sampled), device=boxes.device).repeat_interleave(counts)
        # A frame without instances has no such fields.
        instances = torch.cat([x.gt_index if x.has("gt_index") else torch.zeros_like(x.gt_classes) for x in sampled])
        matched = torch.cat([(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes).tensor for x in sampled])
        positive = labels < self.num_classes
        ids = None
        if self.id_head is not None:
            none = self.id_head.num_ids
            ids = torch.cat(
                [x.gt_head_ids if x.has("gt_head_ids") else torch.zeros_like(x.gt_classes) for x in sampled]
            )
            ids = torch.where(positive, ids, none)
        group = torch.zeros(len(sampled), dtype=torch.int64) if groups is None else groups
        of_region = group.to(boxes.device)[frames]
        return Regions(
            *(boxes, labels, frames, instances, matched, ids, positive),
            weights=_shares(of_region, group),
            positive_weights=_shares(of_region[positive], group),
        )

    def _box_loss(self, deltas: Tensor, regions: Regions) -> Tensor:
        """L1 of the positive regions' boxes, divided by the number of all regions, as detectron2 does."""
        predictor, positive = self.box_predictor, regions.positive
        deltas = deltas[positive]
        if deltas.shape[1] > 4:
            rows = torch.arange(len(deltas), device=deltas.device)
            deltas = deltas.unflatten(1, (-1, 4))[rows, regions.labels[positive]]
        wanted = predictor.box2box_transform.get_deltas(regions.boxes[positive], regions.matched[positive])
        distances = smooth_l1_loss(deltas, wanted, predictor.smooth_l1_beta, reduction="none").sum(dim=1)
        return (distances * regions.weights[positive]).sum()

    def _mask_loss(self, features: Pyramid, targets: Sequence[Instances], regions: Regions) -> Tensor:
        """Cross entropy of the masks of the positive regions, mean over a mask's cells, then over the regions."""
        boxes, frames = regions.boxes[regions.positive], regions.frames[regions.positive]
        logits = self._mask_logits(features, boxes, frames, regions.labels[regions.positive], len(targets))
        first = torch.tensor([len(target) for target in targets], device=boxes.device).cumsum(0).roll(1)
        first[0] = 0
        with torch.no_grad():
            masks = torch.cat([target.gt_masks.tensor for target in targets]).to(boxes.device)[:, None].float()
            rows = first[frames] + regions.instances[regions.positive]
            crops = ROIAlign(logits.shape[-2:], 1.0, 0, aligned=True)(masks, torch.cat([rows[:, None], boxes], dim=1))
            wanted = (crops[:, 0] >= 0.5).float()
        errors = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").flatten(1).mean(dim=1)
        return (errors * regions.positive_weights).sum()

    def _mask_logits(self, features: Pyramid, boxes: Tensor, frames: Tensor, labels: Tensor, num_frames: int) -> Tensor:
        """(n, M, M) of the masks of the given classes; boxes are in the order of frames."""
        lists = [Boxes(x) for x in torch.split(boxes, _counts(frames, num_frames))]
        maps = self.mask_head.layers(self.mask_pooler(_float(features, self.mask_in_features), lists))
        if maps.shape[1] == 1:
            return maps[:, 0]
        return maps[torch.arange(len(labels), device=labels.device), labels]

    def predict(self, features: Pyramid, proposals: Boxes) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of R proposals of one frame: class probabilities (R, K), boxes (R, K, 4), id probabilities (R, N) or None."""
        pooled = self.pool_boxes(features, [proposals.tensor])
        hidden = self.box_head(pooled)
        logits, deltas = self.box_predictor(hidden)
        probabilities = logits.float().softmax(dim=-1)[:, :-1]
        boxes = self.box_predictor.box2box_transform.apply_deltas(deltas.float(), proposals.tensor)
        boxes = boxes.unflatten(1, (-1, 4)).expand(-1, self.num_classes, -1)
        ids = None if self.id_head is None else self.id_head(pooled, hidden).float().softmax(dim=-1)[:, :-1]
        return probabilities, boxes, ids

    def embeds(self, features: Pyramid, boxes: Sequence[Tensor]) -> Tensor:
        """Embeddings (sum of n_i, C) of boxes (n_i, 4) of each frame."""
        assert self.track_head is not None, "the detector was built without an embedding head"
        return self.track_head(self.pool_boxes(features, boxes))

    def pool_boxes(self, features: Pyramid, boxes: Sequence[Tensor]) -> Tensor:
        """What classes, boxes, identities and embeddings read: (sum of n_i, C, h, w) float32 of boxes (n_i, 4)."""
        pooled: Tensor = self.box_pooler(_float(features, self.box_in_features), [Boxes(x) for x in boxes])
        return pooled

    def mask_crops(self, features: Pyramid, boxes: Tensor, labels: Tensor) -> Tensor:
        """Foreground probabilities (n, M, M) inside of boxes (n, 4) of one frame, for classes (n,)."""
        return self._mask_logits(features, boxes, torch.zeros_like(labels), labels, 1).float().sigmoid()


def _float(features: Pyramid, names: Sequence[str]) -> list[Tensor]:
    """Levels in float32: detectron2's pooling rounds boxes to the format of the features, bfloat16 to 8 pixels."""
    return [features[name].float() for name in names]


def _counts(frames: Tensor, num_frames: int) -> list[int]:
    counts: list[int] = torch.bincount(frames, minlength=num_frames).tolist()
    return counts


def _shares(of_region: Tensor, groups: Tensor) -> Tensor:
    """(R,): 1 over the number of groups, over the number of regions of the region's group."""
    counts = torch.bincount(of_region, minlength=int(groups.max()) + 1 if len(groups) else 1)
    return 1.0 / (len(groups.unique()) * counts[of_region])


def _refuse_other_losses(cfg: CfgNode) -> None:
    box = cfg.MODEL.ROI_BOX_HEAD
    if box.USE_SIGMOID_CE or box.USE_FED_LOSS or box.BBOX_REG_LOSS_TYPE != "smooth_l1" or box.TRAIN_ON_PRED_BOXES:
        raise ValueError(
            "detector MaskRCNN has a softmax over classes and smooth L1 on boxes: under MODEL.ROI_BOX_HEAD leave "
            "USE_SIGMOID_CE, USE_FED_LOSS and TRAIN_ON_PRED_BOXES False and BBOX_REG_LOSS_TYPE smooth_l1"
        )
