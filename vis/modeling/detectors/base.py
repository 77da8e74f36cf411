"""What a detector of single frames is, and how one is built by name (``MODEL.DETECTOR.NAME``).

A detector is cut in two so that a method can work between the halves: :meth:`Detector.bottom_up` is the backbone,
:meth:`Detector.top_down` makes the pyramid, and "res5" may have been replaced by a map of the same shape in between
(IAI: association with earlier frames). A meta-architecture holds it as ``image_model``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor, nn

from vis.config import declare
from vis.modeling.registry import DETECTOR_REGISTRY, lookup

Pyramid = Mapping[str, Tensor]
"""Feature maps (N, C, h, w) by name: res2..res5 of a backbone, or p2/p3..p6/p7."""


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.DETECTOR = node = CfgNode()
    # CondInst or MaskRCNN.
    node.NAME = "CondInst"
    # Detections of a frame: the best class and, with an id head, the best id must be above these.
    node.CLS_THR = 0.1
    node.ID_THR = 0.1
    # IoU of boxes above which the worse detection goes, whatever its class.
    node.NMS = 0.5
    # Candidates of each level of the pyramid before, detections of a frame after NMS.
    node.NMS_PRE = 200
    node.TOPK = 10
    # Batch norms of the backbone keep the statistics that they were loaded with; their weight and bias are trained.
    # False is for backbones without pre-training.
    node.NORM_EVAL = True


@dataclass
class FrameDetections:
    """n detections of one frame, the best rank first, after class-agnostic NMS and truncation.

    Attributes:
        boxes: (n, 4) x0, y0, x1, y1 in pixels of the network's input.
        scores: (n,) what they are ranked by.
        class_probs: (n, K); of CondInst times the centerness, of Mask R-CNN the softmax without background.
        id_probs: (n, N) or None; embeds: (n, C) or None.
        mask_inputs: what the detector makes masks of, n rows each.
        candidates: locations (or proposals) that were above both thresholds.
    """

    boxes: Tensor
    scores: Tensor
    class_probs: Tensor
    id_probs: Tensor | None
    embeds: Tensor | None
    mask_inputs: dict[str, Tensor]
    candidates: int

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, index: Tensor) -> FrameDetections:
        """The rows that ``index``, int64 or bool, names."""
        return FrameDetections(
            boxes=self.boxes[index],
            scores=self.scores[index],
            class_probs=self.class_probs[index],
            id_probs=None if self.id_probs is None else self.id_probs[index],
            embeds=None if self.embeds is None else self.embeds[index],
            mask_inputs={name: rows[index] for name, rows in self.mask_inputs.items()},
            candidates=self.candidates,
        )


@dataclass
class Positives:
    """The m predictions of N frames that losses count as instances, for losses that a method adds to the detector's.

    Attributes:
        frames: (m,) int64, which of the N frames; instances: (m,) int64, which of that frame's targets.
        embeds: (m, C), or None without an embedding head.
    """

    frames: Tensor
    instances: Tensor
    embeds: Tensor | None


class Detector(nn.Module):
    """A detector of the instances of single frames, with masks.

    Attributes:
        num_classes: K.
        num_ids: channels of the id head, 0 without one.
        ID_LOSSES: what the id head can be trained with.
        res5_channels: of the map that may be replaced between the halves.
        size_divisibility: frames are padded to a multiple of it.
    """

    ID_LOSSES: ClassVar[tuple[str, ...]] = ("focal", "ce")
    num_classes: int
    num_ids: int
    res5_channels: int
    size_divisibility: int = 32

    def bottom_up(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised and padded frames (N, 3, H, W) -> the backbone's maps, res2 or res3 to res5."""
        raise NotImplementedError

    def top_down(self, features: Pyramid) -> dict[str, Tensor]:
        """Maps of the backbone, "res5" possibly replaced by one of the same shape -> the pyramid."""
        raise NotImplementedError

    def losses(
        self,
        pyramid: Pyramid,
        targets: Sequence[Instances],
        padded_size: tuple[int, int],
        *,
        groups: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted losses of N frames: CondInst's are ``loss_cls``, ``loss_bbox``, ``loss_centerness`` and
        ``loss_mask``, those of Mask R-CNN ``loss_rpn_cls``, ``loss_rpn_loc``, ``loss_cls``, ``loss_box_reg`` and
        ``loss_mask``; with an id head both have ``loss_id``.

        Args:
            targets: of each frame ``gt_boxes``, ``gt_classes``, ``gt_masks`` (BitMasks at the padded size) and, with
                an id head, ``gt_head_ids`` (n,) int64, the id that the head is to name. Absent instances are left out.
            padded_size: (H, W).
            groups: (N,) int64, frames with the same number are normalised together (IAI: the time step of a clip), and
                a loss is the mean over the groups. None: all frames are group 0. Several calls in one forward pass
                need other numbers each, by which counts over a spread batch are told apart.
        """
        return self.losses_and_positives(pyramid, targets, padded_size, groups=groups)[0]

    def losses_and_positives(
        self,
        pyramid: Pyramid,
        targets: Sequence[Instances],
        padded_size: tuple[int, int],
        *,
        groups: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Positives]:
        """:meth:`losses`, and which predictions were counted as which instance."""
        raise NotImplementedError

    def target_counts(
        self, targets: Sequence[Instances], padded_size: tuple[int, int], *, groups: Tensor | None = None
    ) -> dict[str, Tensor] | None:
        """What losses of these frames are divided by, by the names of :mod:`vis.layers.effective_batch`, where it
        follows from the targets alone; None where it does not. Arguments as :meth:`losses` takes them."""
        return None

    def detect(
        self,
        pyramid: Pyramid,
        image_size: tuple[int, int],
        *,
        weights: tuple[float, float] = (1.0, 0.0),
        scale: tuple[float, float] | None = None,
    ) -> FrameDetections:
        """The detections of one frame (N is 1).

        Args:
            image_size: (H, W) without padding; boxes are clipped to it.
            weights: of the best class score and of the best id score in the rank.
            scale: (x, y), network input per original pixel: NMS is done in original pixels, as a release does.
        """
        raise NotImplementedError

    def mask_probs(self, found: FrameDetections, pyramid: Pyramid, padded_size: tuple[int, int]) -> Tensor:
        """Foreground probabilities (n, H, W) of detections of one frame, at the padded size of the input."""
        raise NotImplementedError


def build_detector(
    cfg: CfgNode, *, num_ids: int = 0, id_convs: int = 1, id_loss: str = "focal", embed_dim: int = 0
) -> Detector:
    """The detector that ``MODEL.DETECTOR.NAME`` names, with initial weights.

    Args:
        num_ids: channels of the id head, 0: none.
        id_convs: hidden convolutions of CondInst's id head.
        id_loss: "focal" or "ce".
        embed_dim: channels of the embedding head, 0: none.

    Raises:
        ValueError: the name is not known.
    """
    detector = lookup(DETECTOR_REGISTRY, cfg.MODEL.DETECTOR.NAME, "MODEL.DETECTOR.NAME")
    return detector(cfg, num_ids=num_ids, id_convs=id_convs, id_loss=id_loss, embed_dim=embed_dim)
