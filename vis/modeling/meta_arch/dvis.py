"""DVIS (Zhang et al., ICCV 2023) and DVIS++ (2023): segment, track, refine, each trained on the frozen ones before it.

Online: a frozen segmenter of single frames and the referring tracker. Offline: both frozen, and the temporal refiner,
which sees all frames of a video at once. What DVIS++ changed are options of the parts, not other models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from vis.modeling.criterions.clip_criterion import RefinerCriterion, TrackerCriterion
from vis.modeling.inference import MaskStore, OnlineTracks, TrackedFrames, VideoModel, class_probabilities
from vis.modeling.refiners import TemporalRefiner
from vis.modeling.registry import REFINER_REGISTRY, TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import SegmenterCache, as_clips, build_segmenter_cache, cached_segment, clip_targets
from vis.modeling.segmenter.counts import seen_in_clip
from vis.modeling.trackers import ReferringState, ReferringTracker
from vis.modeling.transformer_decoders.masked import predict_masks
from vis.structures import ClipSample, ClipTargets, RefinerOutput, SegmenterClip, TrackerOutput

# Recordings of the released models hold the first window of this many frames.
_RECORDED_WINDOW = 3


class _DVIS(VideoModel):
    """What online and offline share: a frozen segmenter, the tracker, and the phase of the training."""

    #: Parts that are not trained: no gradients, and evaluation mode also while the rest is in training mode.
    FROZEN: ClassVar[tuple[str, ...]] = ("backbone", "sem_seg_head")

    def __init__(
        self,
        *,
        criterion: nn.Module,
        tracker: ReferringTracker,
        num_classes: int,
        max_iter: int,
        segmenter_cache: SegmenterCache | None = None,
        **options: Any,
    ) -> None:
        """Args: ``max_iter`` iterations of a training; ``options`` of :class:`~vis.modeling.inference.VideoModel`."""
        super().__init__(**options)
        if not hasattr(tracker, "frame_memory"):
            raise ValueError(
                f"MODEL.TRACKER.NAME is {type(tracker).__name__!r}, DVIS needs a tracker of the queries of a frozen "
                "segmenter, such as 'ReferringTracker'"
            )
        self.criterion = criterion
        self.tracker = tracker
        self.num_classes, self.max_iter = num_classes, max_iter
        self.segmenter_cache = segmenter_cache
        self._iteration = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            **super().from_config(cfg),
            "tracker": lookup(TRACKER_REGISTRY, cfg.MODEL.TRACKER.NAME, "MODEL.TRACKER.NAME")(cfg),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "segmenter_cache": build_segmenter_cache(cfg),
        }

    def _freeze(self) -> None:
        for name in self.FROZEN:
            getattr(self, name).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> _DVIS:
        """As usual, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in self.FROZEN:
            getattr(self, name).eval()
        return self

    def set_iteration(self, iteration: int) -> None:
        """Called by the trainer before each step, so that a resumed training goes on in the phase it was in."""
        self._iteration = iteration

    @property
    def guided(self) -> bool:
        """First half of a training: the stage before says which query is whose (DVIS, section 3.4)."""
        return 2 * self._iteration < self.max_iter

    @torch.no_grad()
    def segment_clips(self, images: Tensor, num_videos: int) -> SegmenterClip:
        """Frames of ``num_videos`` videos, video after video, (B*T, 3, H, W) -> the frozen segmenter's predictions."""
        modules = (self.backbone, self.sem_seg_head)
        return as_clips(cached_segment(self.segmenter_cache, images, modules, self.segment), num_videos)

    def prepare(self, samples: Sequence[ClipSample]) -> tuple[SegmenterClip, list[ClipTargets]]:
        """A training batch: what the segmenter says of it, and the targets.

        Raises:
            ValueError: clips of different lengths, or a class that the head does not have.
        """
        lengths = {len(sample["image"]) for sample in samples}
        if len(lengths) != 1:
            raise ValueError(f"clips of one batch must have one length (INPUT.SAMPLING_FRAME_NUM), found {lengths}")
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        size = (int(images.shape[-2]), int(images.shape[-1]))
        targets = [
            clip_targets(sample, size=size, num_classes=self.num_classes, device=self.device) for sample in samples
        ]
        return self.segment_clips(images, len(samples)), targets

    def _step(self, images: Tensor, state: ReferringState | None) -> tuple[TrackedFrames, ReferringState]:
        tracked, state = self.tracker(self.segment_clips(images, 1), state)
        return TrackedFrames(tracked.pred_logits[-1, 0], tracked.mask_embeds[-1, 0], tracked.mask_features[0]), state

    def _recorded_first_window(self, images: Tensor) -> dict[str, Tensor]:
        """``backbone.*`` and ``tracker.*`` of the first window, in the layout of the release."""
        features = self.backbone(images[:_RECORDED_WINDOW])
        tracked, _ = self.tracker(as_clips(self.sem_seg_head(features), 1), None)
        arrays = {f"backbone.{name}": feature for name, feature in features.items()}
        arrays |= _released("tracker", tracked.pred_logits[-1], tracked.mask_embeds[-1], tracked.mask_features)
        arrays["tracker.pred_embds"] = tracked.pred_embeds.permute(0, 3, 1, 2)
        if tracked.references is not None:
            arrays["tracker.pred_references"] = tracked.references.permute(0, 3, 1, 2)
        return arrays


def _released(part: str, logits: Tensor, mask_embeds: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
    """Logits (1, T, Q, K+1) and masks (1, Q, T, h, w)."""
    masks = predict_masks(mask_embeds[0], mask_features[0]).transpose(0, 1)
    return {f"{part}.pred_logits": logits, f"{part}.pred_masks": masks[None]}


@META_ARCH_REGISTRY.register()
class DVISOnline(_DVIS):
    """A frozen segmenter and the referring tracker; the result of a frame depends on earlier frames alone."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"MODEL": {"TRACKER": {"NAME": "ReferringTracker"}}}
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "segmenter": ("tracker.",),
        "ctvis": ("tracker.",),
        "dvis_online": (),
        "dvisplus_online": (),
    }

    @configurable
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "criterion": TrackerCriterion(cfg)}

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses of a batch of clips, any number of videos.

        Raises:
            ValueError: clips of different lengths, or a class that the head does not have.
        """
        clip, targets = self.prepare(samples)
        tracked, _ = self.tracker(clip, None)
        return self.criterion(tracked, clip, targets, guided=self.guided)

    def target_counts(self, samples: Sequence[ClipSample]) -> dict[str, list[float]]:
        """See :mod:`vis.modeling.segmenter.counts`: of each video its instances in every frame."""
        return {"clip.masks": [float(seen_in_clip(sample) * len(sample["image"])) for sample in samples]}

    def open_tracks(self) -> OnlineTracks:
        """Tracks that are final as frames come."""
        return OnlineTracks(self._step)

    @torch.no_grad()
    def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
        """Intermediate arrays of a short video under the names of the recordings that parity is checked with."""
        images = self.normalizer(list(sample["image"]))
        tracked, _ = self._step(images, None)
        masks = predict_masks(tracked.mask_embeds, tracked.mask_features)
        return {
            **self._recorded_first_window(images),
            "pred_cls": tracked.pred_logits.mean(dim=0),
            "pred_masks": masks.transpose(0, 1),
        }


@META_ARCH_REGISTRY.register()
class DVISOffline(_DVIS):
    """Segmenter and tracker frozen, and a refiner that looks at the tracks of the whole video."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "MODEL": {"TRACKER": {"NAME": "ReferringTracker"}, "REFINER": {"NAME": "TemporalRefiner"}}
    }
    FROZEN: ClassVar[tuple[str, ...]] = ("backbone", "sem_seg_head", "tracker")
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dvis_online": ("refiner.",),
        "dvisplus_online": ("refiner.",),
        "dvis_offline": (),
        "dvisplus_offline": (),
    }

    @configurable
    def __init__(self, *, refiner: TemporalRefiner, **options: Any) -> None:
        super().__init__(**options)
        self.refiner = refiner
        self._freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            **super().from_config(cfg),
            "criterion": RefinerCriterion(cfg),
            "refiner": lookup(REFINER_REGISTRY, cfg.MODEL.REFINER.NAME, "MODEL.REFINER.NAME")(cfg),
        }

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses of a batch of clips, any number of videos.

        Raises:
            ValueError: clips of different lengths, or a class that the head does not have.
        """
        clip, targets = self.prepare(samples)
        with torch.no_grad():
            tracked, _ = self.tracker(clip, None)
            memory = self.tracker.frame_memory(clip)
        refined = self.refiner(tracked.pred_embeds, memory)
        # Released: the refiner multiplies the segmenter's features, also where the tracker projects them for itself.
        refined.mask_features = clip.mask_features
        return self.criterion(refined, tracked, targets, guided=self.guided)

    def target_counts(self, samples: Sequence[ClipSample]) -> dict[str, list[float]]:
        """See :mod:`vis.modeling.segmenter.counts`: of each video its instances."""
        return {"clip.masks": [float(seen_in_clip(sample)) for sample in samples]}

    def track(
        self, images: Tensor, state: ReferringState | None
    ) -> tuple[SegmenterClip, TrackerOutput, Tensor, ReferringState]:
        """A window (T, 3, H, W): the segmenter's and the tracker's predictions, the frame memory, the new state."""
        clip = self.segment_clips(images, 1)
        tracked, state = self.tracker(clip, state)
        return clip, tracked, self.tracker.frame_memory(clip), state

    def open_tracks(self) -> OfflineTracks:
        """Tracks that are refined after the last frame."""
        return OfflineTracks(self)

    @torch.no_grad()
    def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
        """Intermediate arrays of a short video under the names of the recordings that parity is checked with."""
        images = self.normalizer(list(sample["image"]))
        clip, tracked, memory, _ = self.track(images, None)
        refined = self.refiner(tracked.pred_embeds, memory)
        logits = refined.pred_logits[-1]  # (1, Q, K+1)
        repeated = logits[:, None].expand(-1, len(images), -1, -1)
        arrays = self._recorded_first_window(images)
        arrays |= _released("refiner", repeated, refined.mask_embeds[-1], clip.mask_features)
        arrays["refiner.pred_embds"] = refined.pred_embeds.permute(0, 3, 1, 2)
        return {**arrays, "pred_cls": logits[0], "pred_masks": arrays["refiner.pred_masks"][0]}


class OfflineTracks:
    """A video of DVIS offline: queries of all frames are kept, mask features are stored, masks are made at the end.

    What grows with the video in working memory is 2*Q*C numbers a frame (0.2 MB for 100 queries of 256 channels), and
    about twice as much while the refiner works at the end. Mask features are in a temporary file.
    """

    def __init__(self, model: DVISOffline) -> None:
        self._model = model
        self._state: ReferringState | None = None
        self._embeds: list[Tensor] = []  # of each window (T, Q, C), the tracker's
        self._memory: list[Tensor] = []  # of each window (T, Q, C), what the refiner looks at
        self._logits: Tensor | None = None  # (Q, K+1), the tracker's, sum over the frames
        self._features = MaskStore(what="mask features")
        self._refined: RefinerOutput | None = None

    def __len__(self) -> int:
        return len(self._features)

    def take(self, images: Tensor) -> None:
        """Segment and track the next frames (T, 3, H, W)."""
        clip, tracked, memory, self._state = self._model.track(images, self._state)
        logits = tracked.pred_logits[-1, 0].float().sum(dim=0)
        self._logits = logits if self._logits is None else self._logits + logits
        self._embeds.append(tracked.pred_embeds[0])
        self._memory.append(memory[0])
        for features in clip.mask_features[0]:
            self._features.append(features)

    def probabilities(self) -> Tensor:
        """Refine; then (Q, K), the larger of the refiner's probability and that of the tracker's mean logits."""
        assert self._logits is not None
        embeds = torch.cat(self._embeds)
        self._embeds = []  # what the refiner takes is not held twice while it works
        memory = torch.cat(self._memory)
        self._memory = []
        refined = self._model.refiner(embeds[None], memory[None])
        self._refined = refined
        of_tracker = class_probabilities(self._logits / len(self))
        return torch.maximum(class_probabilities(refined.pred_logits[-1, 0]), of_tracker)

    def masks(self, frame: int, queries: list[int]) -> Tensor:
        """Mask logits (len(queries), h, w)."""
        assert self._refined is not None
        embeds = self._refined.mask_embeds[-1, 0, frame, queries]
        return predict_masks(embeds[None], self._features.read(frame).to(embeds)[None])[0]

    def continued(self) -> OfflineTracks:
        """The tracker goes on, the refiner starts anew: :class:`~vis.modeling.inference.session.ContinuedTracks`."""
        tracks = OfflineTracks(self._model)
        tracks._state = self._state
        return tracks

    def close(self) -> None:
        """Delete the stored features."""
        self._features.close()
