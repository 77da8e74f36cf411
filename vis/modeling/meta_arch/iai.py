"""IAI (Zhu et al., "Instance As Identity: A Generic Online Paradigm for Video Instance Segmentation", ECCV 2022).

An image model finds the instances of each frame and names, with a further head, which of N identities each one is, or
that it is new. It can, because the last features of its backbone are replaced by ones that know where every identity
was: an association module reads the identity maps of earlier frames. Without the id head, or without the association,
it is one of the paper's baselines (Table 4).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor, nn

from vis.config import declare
from vis.layers.item_streams import item_seed
from vis.modeling.criterions.iai import ClipIdentities, clip_identities, frame_targets, identity_maps
from vis.modeling.detectors.base import Detector, Pyramid, build_detector
from vis.modeling.detectors.masks import encode_found, original_masks
from vis.modeling.inference.growing import FrameSizes, GrowingModel, ResultRules, TrackedFrame
from vis.modeling.segmenter import FrameNormalizer, check_labels
from vis.modeling.trackers.association import Association, AssociationMemory, stored_frames
from vis.modeling.trackers.identified_frames import FrameIdentifier, FrameResult, VideoState
from vis.modeling.trackers.identity import IdentityTracker, exclusive
from vis.structures import ClipSample

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.IAI = node = type(cfg)()
    # Channels of the id head: objects, and as the last "new". An image has at most NUM_IDS - 1 objects.
    node.NUM_IDS = 20
    # The two parts of the method (paper, Table 4). Without the head, IoU of boxes and class link the objects.
    node.ID_HEAD = True
    node.ASSOCIATION = True
    # The association module.
    node.NUM_LAYERS = 1
    node.DIM = 256
    node.SELF_HEADS = 4
    node.ATTN_HEADS = 2
    node.FFN_DIM = 1024
    node.DROP_PATH = 0.1
    node.WINDOW_RADIUS = 7
    # Every which frame is remembered, beside those with new objects; how many at most, -1: all, as released.
    node.GLOBAL_INTERVAL = 3
    node.MAX_GLOBAL_FRAMES = 20
    # Parts of its block (paper, Table 5).
    node.SELF = True
    node.LOCAL = True
    node.GLOBAL = True
    node.CLS_PROJECTOR = True
    # The id head: hidden convolutions (CondInst), "focal" or "ce" (paper, Tables 8 and 7; Mask R-CNN: "ce"), weight of
    # its loss.
    node.ID_CONVS = 1
    node.ID_LOSS = "focal"
    node.ID_WEIGHT = 1.0
    # In training the objects of a clip have random identities, so that every channel is trained.
    node.ID_SHUFFLE = True
    # Frame by frame instead of all frames of a clip at once: the same numbers in several times the time. Only batch
    # norms in training mode (those of the mask branch) see other batches.
    node.SEQUENTIAL = False
    # Started from a detector of images, the model gives in the first step what that detector gives.
    node.WARM_START = True
    # Habits of the release that are not what the method describes.
    node.RELEASED = released = type(cfg)()
    released.OVERFLOW = False  # when identities run out, one is overwritten again and again; else new objects are left
    released.UNASSIGNED_NEW = False  # identities that nobody has yet count as "new" where the head names them
    released.TRAIN_MEMORY = False  # in training, frames with new objects are not remembered for that
    released.DROP_PATH = False  # for each token by itself instead of for each frame
    released.INIT = False  # gates and offsets begin at random instead of as identity, identities next to zero
    node.TEST = test = type(cfg)()
    # A detection is dropped when better ones leave less than this share of its mask.
    test.MIN_VISIBLE = 0.1
    # A track's class scores: "video", mean over all frames, or "mean", over those in which it is seen.
    test.SCORE_TYPE = "video"
    test.VIDEO_SCORE_THR = 0.05
    # Results of a video.
    test.MAX_NUM = 10
    # Without the id head: IoU with its last box that makes a detection an old object.
    test.MIN_IOU = 0.3


@META_ARCH_REGISTRY.register()
class IAI(GrowingModel):
    """Image model, association, and identities without parameters."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "MODEL": {"BACKBONE": {"FREEZE_AT": 2}, "MASK_FORMER": {"TEST": {"WINDOW_SIZE": 10}}},
        "INPUT": {"SAMPLING_FRAME_NUM": 5},
    }
    #: Trainings start from a backbone, from a detector of images, or from an IAI of other classes.
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "backbone": (),
        "condinst": ("association.", "image_model.proposal_generator.fcos_head.id_"),
        "mask_rcnn": ("association.", "image_model.roi_heads.id_"),
        "iai": (),
    }
    #: The recordings of the release are replayed by vis.engine.parity.iai; its names are those of this source.
    RECORDING: ClassVar[str] = "iai"

    @configurable
    def __init__(
        self,
        *,
        image_model: Detector,
        association: Association | None,
        tracker: IdentityTracker,
        num_classes: int,
        num_ids: int,
        id_weight: float,
        id_shuffle: bool,
        sequential: bool,
        new_is_stored: bool,
        warm_start: bool,
        min_visible: float,
        min_iou: float,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Args:
        num_ids: channels of the id head and, but for background, of the identity bank.
        new_is_stored: in training, too, a frame with a new object is remembered.
        seed: of the identities that training draws.
        options: of :class:`~vis.modeling.inference.growing.GrowingModel`.
        """
        super().__init__(**options)
        self.image_model, self.association, self.tracker = image_model, association, tracker
        self.num_classes, self.num_ids, self.id_weight = num_classes, num_ids, id_weight
        self.sequential, self.new_is_stored = sequential, new_is_stored
        self.identifier = FrameIdentifier(
            image_model=image_model,
            association=association,
            tracker=tracker,
            min_visible=min_visible,
            min_iou=min_iou,
        )
        self.id_shuffle, self.seed = id_shuffle, seed
        self._iteration, self._calls = 0, 0
        if warm_start and association is not None and association.cls_proj is not None:
            self.register_load_state_dict_post_hook(_warm_start)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, test = cfg.MODEL.IAI, cfg.MODEL.IAI.TEST
        image_model = build_detector(
            cfg,
            num_ids=node.NUM_IDS if node.ID_HEAD else 0,
            id_convs=node.ID_CONVS,
            id_loss=node.ID_LOSS,
        )
        if node.ID_HEAD and node.ID_LOSS not in image_model.ID_LOSSES:
            raise ValueError(
                f"MODEL.IAI.ID_LOSS is {node.ID_LOSS!r}; with detector {cfg.MODEL.DETECTOR.NAME} it is one of "
                f"{image_model.ID_LOSSES}"
            )
        if not 0 <= test.MIN_VISIBLE <= 1:
            raise ValueError(f"MODEL.IAI.TEST.MIN_VISIBLE is {test.MIN_VISIBLE}, expected a share of a mask, 0 to 1")
        association = None
        if node.ASSOCIATION:
            association = Association.from_node(node, channels=image_model.res5_channels)
        return {
            "image_model": image_model,
            "association": association,
            "tracker": IdentityTracker(
                num_ids=node.NUM_IDS,
                released_overflow=node.RELEASED.OVERFLOW,
                released_unassigned=node.RELEASED.UNASSIGNED_NEW,
            ),
            "normalizer": FrameNormalizer(
                pixel_mean=cfg.MODEL.PIXEL_MEAN,
                pixel_std=cfg.MODEL.PIXEL_STD,
                size_divisibility=image_model.size_divisibility,
            ),
            "rules": ResultRules(
                score_type=test.SCORE_TYPE, threshold=test.VIDEO_SCORE_THR, max_num=test.MAX_NUM, drop_noise=False
            ),
            "window_size": cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "num_ids": node.NUM_IDS,
            "id_weight": node.ID_WEIGHT,
            "id_shuffle": node.ID_SHUFFLE,
            "sequential": node.SEQUENTIAL,
            "new_is_stored": not node.RELEASED.TRAIN_MEMORY,
            "warm_start": node.WARM_START,
            "min_visible": test.MIN_VISIBLE,
            "min_iou": test.MIN_IOU,
            "seed": max(cfg.SEED, 0),
        }

    def set_iteration(self, iteration: int) -> None:
        """Called by the trainer before each step: its draws depend on the iteration and the process alone."""
        self._iteration, self._calls = iteration, 0

    def _draws(self, clips: int) -> list[torch.Generator | None]:
        """Of the identities of each clip of a batch: in a training by its place in the effective batch."""
        if not self.id_shuffle:
            return [None] * clips
        seeds = [seed for seed in (item_seed(b, clips) for b in range(clips)) if seed is not None]
        if seeds:
            return [torch.Generator().manual_seed(seed) for seed in seeds]
        number = (self.seed * 1_000_003 + self._iteration) * 1_000_003 + self._calls
        self._calls += 1
        return [torch.Generator().manual_seed((number * 4096 + comm.get_rank()) % 2**63)] * clips

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Losses of B clips of T frames: means over the frames.

        Raises:
            ValueError: clips of different lengths, or a class that the head does not have.
        """
        found = self.frame_losses(samples)
        losses = {name: torch.stack([frame[name] for frame in found]).mean() for name in found[0]}
        if "loss_id" in losses:
            losses["loss_id"] = self.id_weight * losses["loss_id"]
        return losses

    def frame_losses(self, samples: Sequence[ClipSample]) -> list[dict[str, Tensor]]:
        """Unweighted losses of each frame with ``MODEL.IAI.SEQUENTIAL``, else their means over the frames alone."""
        lengths = {len(sample["image"]) for sample in samples}
        if len(lengths) != 1:
            raise ValueError(f"clips of one batch must have one length (INPUT.SAMPLING_FRAME_NUM), found {lengths}")
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        padded = (int(images.shape[-2]), int(images.shape[-1]))
        draws = self._draws(len(samples))
        clips = [self._identities(*pair) for pair in zip(samples, draws, strict=True)]
        targets = [
            [frame_targets(frame, clip, t, padded, self.device) for t, frame in enumerate(sample["instances"])]
            for sample, clip in zip(samples, clips, strict=True)
        ]
        features = self.image_model.bottom_up(images)
        features = {name: x.unflatten(0, (len(samples), -1)) for name, x in features.items()}  # (B, T, C, h, w)
        labels = None
        if self.association is not None:
            maps = [
                identity_maps(sample["instances"], clip, self.num_ids, padded)
                for sample, clip in zip(samples, clips, strict=True)
            ]
            labels = torch.stack(maps).to(self.device)
        if self.sequential:
            return self._sequential(features, targets, labels, clips, padded)
        return [self._together(features, targets, labels, clips, padded)]

    def _identities(self, sample: ClipSample, generator: torch.Generator | None) -> ClipIdentities:
        for frame in sample["instances"]:
            check_labels(frame.gt_classes, self.num_classes)
        ids = torch.stack([frame.gt_ids for frame in sample["instances"]])  # (T, n)
        return clip_identities(ids, self.num_ids, generator)

    def _together(
        self,
        features: Mapping[str, Tensor],
        targets: list[list[Instances]],
        labels: Tensor | None,
        clips: Sequence[ClipIdentities],
        padded: tuple[int, int],
    ) -> dict[str, Tensor]:
        """All frames of all clips at once, losses normalised as if frame by frame."""
        length = len(targets[0])
        maps = {name: x.flatten(0, 1) for name, x in features.items()}
        if self.association is not None and labels is not None:
            interval = self.association.global_interval
            stored = [stored_frames(clip.new & self.new_is_stored, interval) for clip in clips]
            maps["res5"] = self.association(features["res5"], labels, torch.stack(stored)).flatten(0, 1)
        groups = torch.arange(length, device=self.device).repeat(len(clips))
        flat = [frame for clip in targets for frame in clip]
        return self.image_model.losses(self.image_model.top_down(maps), flat, padded, groups=groups)

    def _sequential(
        self,
        features: Mapping[str, Tensor],
        targets: list[list[Instances]],
        labels: Tensor | None,
        clips: Sequence[ClipIdentities],
        padded: tuple[int, int],
    ) -> list[dict[str, Tensor]]:
        """One frame of all clips after the other, as the release does."""
        memories = [AssociationMemory() for _ in clips]
        losses = []
        for t in range(len(targets[0])):
            maps = {name: x[:, t] for name, x in features.items()}
            if self.association is not None and labels is not None:
                read = [self.association.read(maps["res5"][b, None], memory) for b, memory in enumerate(memories)]
                maps["res5"] = torch.cat([replaced for replaced, _ in read])
                memories = [
                    self.association.write(
                        current, labels[b, t, None], memories[b], new=bool(clips[b].new[t]) and self.new_is_stored
                    )
                    for b, (_, current) in enumerate(read)
                ]
            pyramid = self.image_model.top_down(maps)
            step = torch.full((len(clips),), t, device=self.device)
            losses.append(self.image_model.losses(pyramid, [clip[t] for clip in targets], padded, groups=step))
        return losses

    def track(
        self, images: Tensor, sizes: FrameSizes, state: VideoState | None
    ) -> tuple[list[TrackedFrame], VideoState]:
        """See :class:`~vis.modeling.inference.growing.WindowStep`; ``state`` is that of the video."""
        state = VideoState() if state is None else state
        features = self.image_model.bottom_up(images)
        frames = []
        for t in range(len(images)):
            result, state = self.step({name: x[t, None] for name, x in features.items()}, sizes, state)
            frames.append(self.report(result, sizes))
        return frames, state

    def step(
        self,
        features: Pyramid,
        sizes: FrameSizes,
        state: VideoState,
        given: tuple[Tensor, bool] | None = None,
    ) -> tuple[FrameResult, VideoState]:
        """The next frame of a video: :meth:`~vis.modeling.trackers.identified_frames.FrameIdentifier.step`."""
        return self.identifier.step(features, sizes.input, sizes.padded, state, given)

    def report(self, result: FrameResult, sizes: FrameSizes) -> TrackedFrame:
        """Results of a frame. Of two detections with one id (released overflow) the later counts."""
        rows = {identity: row for row, identity in enumerate(result.identified.ids) if identity >= 0}
        taken = list(rows.values())
        masks = original_masks(result.probs[result.kept], input_size=sizes.input, output_size=sizes.output)
        coded = encode_found(exclusive(masks)[taken])
        hidden = [None if identity >= self.tracker.exported else rle for identity, rle in zip(rows, coded, strict=True)]
        return TrackedFrame(list(rows), result.found.class_probs[result.kept][taken], hidden)


def _warm_start(model: nn.Module, keys: Any) -> None:
    """After a detector of images was loaded: the new layers pass its features through.

    The projection of the features starts as the pyramid's layer for res5, which itself starts as the identity on these
    channels (and is zero on what the association gives).
    """
    assert isinstance(model, IAI)
    assert model.association is not None
    missing = set(keys.missing_keys)
    lateral = model.image_model.backbone.fpn_lateral5
    ours = {f"association.{name}" for name, _ in model.association.named_parameters()}
    if not ours <= missing or "image_model.backbone.fpn_lateral5.weight" in missing:
        return
    projection = model.association.cls_proj
    assert projection is not None
    width, start = lateral.weight.shape[0], lateral.weight.shape[1] - projection.weight.shape[0]
    if projection.weight.shape[0] < width:
        logger.warning("MODEL.IAI.WARM_START: %d channels do not hold the pyramid's %d", len(projection.weight), width)
        return
    with torch.no_grad():
        projection.weight[:width] = lateral.weight
        projection.bias[:width] = 0
        lateral.weight.zero_()
        lateral.weight[:, start : start + width, 0, 0] = torch.eye(width)
    logger.info("the association starts so that the image model's pyramid is what it was (MODEL.IAI.WARM_START)")
