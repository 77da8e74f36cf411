"""One frame of IAI after another (Zhu et al., "Instance As Identity", ECCV 2022): find, identify, remember."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vis.modeling.detectors.base import Detector, FrameDetections, Pyramid
from vis.modeling.trackers.association import Association, AssociationMemory, CurrentFrame
from vis.modeling.trackers.identity import (
    Identified,
    IdentityState,
    IdentityTracker,
    identity_map,
    overlap_scores,
    remember_boxes,
    visible_parts,
)

#: Weights of the best class and of the best id in the rank of a detection: in a video's first frame, and later.
RANK_FIRST, RANK_LATER = (1.0, 0.5), (0.5, 1.0)
_RANK_WITHOUT_IDS = (1.0, 0.0)


@dataclass(frozen=True)
class VideoState:
    """One video under way."""

    memory: AssociationMemory = field(default_factory=AssociationMemory)
    identities: IdentityState = field(default_factory=IdentityState)


@dataclass(frozen=True)
class FrameResult:
    """All that is found in a frame, for results and for comparisons.

    Attributes:
        replaced: features in place of res5; current: what was written to memory, None without association.
        pyramid: of the image model.
        found: detections; probs: their masks (n, H, W) at the padded size.
        kept: (k,) rows of ``found`` that left enough of their masks; identified: of those, in that order.
        labels: (H, W) uint8 map of identities of this frame.
    """

    replaced: Tensor
    current: CurrentFrame | None
    pyramid: Pyramid
    found: FrameDetections
    probs: Tensor
    kept: Tensor
    identified: Identified
    labels: Tensor


class FrameIdentifier:
    """Runs the halves of an image model with the association between them; the modules belong to the method."""

    def __init__(
        self,
        *,
        image_model: Detector,
        association: Association | None,
        tracker: IdentityTracker,
        min_visible: float,
        min_iou: float,
    ) -> None:
        """Args:
        association: None: frames are seen alone.
        min_visible: see :func:`~.identity.visible_parts`.
        min_iou: of an image model without an id head, see :func:`~.identity.overlap_scores`.
        """
        self.image_model, self.association, self.tracker = image_model, association, tracker
        self.min_visible, self.min_iou = min_visible, min_iou

    def step(
        self,
        features: Pyramid,
        input_size: tuple[int, int],
        padded_size: tuple[int, int],
        state: VideoState,
        given: tuple[Tensor, bool] | None = None,
    ) -> tuple[FrameResult, VideoState]:
        """The next frame of a video.

        Args:
            features: of the backbone, (1, C, h, w).
            input_size, padded_size: (height, width).
            given: what to remember in place of what is found: a map of identities (H, W), and whether one is new.
        """
        current, replaced = None, features["res5"]
        if self.association is not None:
            replaced, current = self.association.read(replaced, state.memory)
        pyramid = self.image_model.top_down({**features, "res5": replaced})
        weights = RANK_FIRST if state.identities.length == 0 else RANK_LATER
        if not self.image_model.num_ids:
            weights = _RANK_WITHOUT_IDS
        found = self.image_model.detect(pyramid, input_size, weights=weights)
        probs = self.image_model.mask_probs(found, pyramid, padded_size)
        kept, visible = visible_parts(probs > 0.5, self.min_visible)
        identified, identities = self._identify(found.take(kept), state.identities)
        labels = identity_map(visible[kept], identified.ids, self.tracker.num_ids)
        memory = state.memory
        if self.association is not None and current is not None:
            written, new = (labels, identified.new) if given is None else given
            memory = self.association.write(current, written[None], memory, new=new)
        result = FrameResult(replaced, current, pyramid, found, probs, kept, identified, labels)
        return result, VideoState(memory, identities)

    def _identify(self, found: FrameDetections, state: IdentityState) -> tuple[Identified, IdentityState]:
        if found.id_probs is not None:
            return self.tracker.step(found.id_probs, state)
        classes = found.class_probs.argmax(dim=1)
        scores = overlap_scores(found.boxes, classes, state, num_ids=self.tracker.num_ids, threshold=self.min_iou)
        identified, after = self.tracker.step(scores, state)
        return identified, remember_boxes(found.boxes, classes, identified.ids, after)
