"""VITA (Heo et al., NeurIPS 2022): a module over the object queries of all frames names the objects of a video.

A Mask2Former finds objects frame by frame; its queries, not its pictures, go to the module, whose own queries are the
tracks of the video. All of it is trained together: losses of single frames, of whole tracklets, and of likeness.
A video is taken whole (released), or as overlapping windows whose tracklets are joined (the authors' report to the
YouTube-VIS 2022 challenge, Hwang et al., "Direct Association of Object Queries for Video Instance Segmentation").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from vis.config import declare
from vis.modeling.criterions.set_criterion import MaskTargets, SetCriterion
from vis.modeling.criterions.vita import VitaCriterion
from vis.modeling.heads.build import Heads, build_heads, mask_former_losses
from vis.modeling.inference import MaskStore, Tracks, VideoModel, class_probabilities
from vis.modeling.inference.session import VideoSession
from vis.modeling.inference.vita import QualitySession
from vis.modeling.matchers.hungarian import Pairs
from vis.modeling.segmenter import clip_targets
from vis.modeling.segmenter.counts import only_targets_count, seen_in_clip, seen_in_frames
from vis.modeling.segmenter.vita import SegmentedFrames, check_parts, segment_frames
from vis.modeling.trackers.clip_matching import ClipMatcher, ClipState, Tracklets
from vis.modeling.transformer_decoders.masked import predict_masks
from vis.modeling.transformer_decoders.vita import VitaModule
from vis.structures import ClipSample, ClipTargets

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.VITA = node = type(cfg)()
    # Released models have 6 and 3 layers; the report to the challenge says 3 and 6.
    node.ENC_LAYERS = 6
    node.DEC_LAYERS = 3
    # Frames that an encoder layer looks at together; 0: all of them.
    node.ENC_WINDOW_SIZE = 0
    # Windows are shifted by half in every other layer at test time; in training only with this (released: no).
    node.SHIFT_IN_TRAIN = False
    node.NUM_OBJECT_QUERIES = 100
    node.HIDDEN_DIM = 256
    node.NHEADS = 8
    node.DIM_FEEDFORWARD = 2048
    node.DROPOUT = 0.0
    node.PRE_NORM = False
    node.ENFORCE_INPUT_PROJ = True
    _add_training_config(node)
    _add_test_config(node)


def _add_training_config(node: CfgNode) -> None:
    # Layers of the frame decoder whose queries are trained on, each a video of its own.
    node.LAST_LAYER_NUM = 3
    node.DEEP_SUPERVISION = True
    node.NO_OBJECT_WEIGHT = 0.1
    # Class, mask and dice weights and the numbers of points are those of MODEL.MASK_FORMER. The similarity loss had a
    # misspelt name until November 2023, so its weight was not found and was 1.0 in effect: published weights are of
    # that, 1.0 repeats their training.
    node.SIM_WEIGHT = 0.5
    # Video queries are compared too, not only those of frames.
    node.SIM_USE_CLIP = True
    # Only vita_module is trained (about 10 AP less, by the authors).
    node.FREEZE_DETECTOR = False


def _add_test_config(node: CfgNode) -> None:
    node.TEST = type(node)()
    # False: the video as a whole. True: windows of CLIP_LENGTH frames every CLIP_STRIDE, joined.
    node.TEST.CLIP_MODE = False
    node.TEST.CLIP_LENGTH = 18
    node.TEST.CLIP_STRIDE = 3
    # How windows are joined: "ifc" by the IoU of masks, "masktrack" by MaskTrack R-CNN's score.
    node.TEST.MATCH = "ifc"
    # "ifc" joins nothing up to this IoU.
    node.TEST.MATCH_THR = 0.05
    # Stride in pixels of the masks that are compared.
    node.TEST.MATCH_STRIDE = 8
    # "ifc": an object that was out of sight is known again by a likeness of at least this (0..1); 0: it is a new one.
    node.TEST.REID_THR = 0.0
    # Queries of a window that may be objects: those more likely some class than none and the CAND_TOPK best, of at
    # least CAND_SCORE; CAND_MAX at most.
    node.TEST.CAND_TOPK = 20
    node.TEST.CAND_MAX = 50
    node.TEST.CAND_SCORE = 0.01


@META_ARCH_REGISTRY.register()
class VITA(VideoModel):
    """Segmenter, the module over its queries, a criterion of frames and one of tracklets."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"MODEL": {"MASK_FORMER": {"TEST": {"MASK_SCORE": True}}}}
    #: COCO pre-training starts from a backbone or an image model, a training on videos from a VITA of COCO or them too.
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vita": (),
        "image": ("vita_module.", "vita_criterion."),
        "segmenter": ("vita_module.", "vita_criterion."),
        "backbone": (),
    }
    #: See :func:`vis.modeling.heads.build.refuse_unused`.
    TAKES_HEADS: ClassVar[bool] = True
    TWO_STREAMS: ClassVar[bool] = True
    HEADS_IN_SCORES: ClassVar[bool] = False

    @configurable
    def __init__(
        self,
        *,
        vita_module: VitaModule,
        criterion: SetCriterion,
        vita_criterion: VitaCriterion,
        num_layers: int,
        freeze_detector: bool,
        clip_matcher: ClipMatcher | None,
        clip_length: int,
        clip_stride: int,
        match_reduction: float,
        heads: Heads | None = None,
        **options: Any,
    ) -> None:
        """Args:
        num_layers: of the frame decoder, whose queries are trained on.
        clip_matcher: joins windows of ``clip_length`` frames, one every ``clip_stride``; None: videos are taken whole.
        match_reduction: size of mask features over that of the masks it compares.
        heads: on the queries of single frames, for training.
        options: of :class:`~vis.modeling.inference.VideoModel`.
        """
        super().__init__(**options)
        check_parts(self.sem_seg_head, num_layers)
        if not 1 <= clip_stride <= clip_length:
            raise ValueError(
                f"MODEL.VITA.TEST.CLIP_STRIDE is {clip_stride}, expected 1 to CLIP_LENGTH ({clip_length}) frames"
            )
        if clip_matcher is not None and clip_stride == clip_length and clip_matcher.needs_overlap:
            logger.warning(
                "MODEL.VITA.TEST.CLIP_STRIDE is CLIP_LENGTH (%d frames): windows share no frame, so that no track goes "
                "on from one to the next. Lower CLIP_STRIDE",
                clip_length,
            )
        if match_reduction < 1:
            raise ValueError("MODEL.VITA.TEST.MATCH_STRIDE must be at least MODEL.SEM_SEG_HEAD.COMMON_STRIDE")
        self.heads = Heads([]) if heads is None else heads
        if len(self.heads) and freeze_detector:
            raise ValueError(
                "MODEL.HEADS train the frames' queries, which MODEL.VITA.FREEZE_DETECTOR leaves as they are"
            )
        self.criterion = criterion
        self.vita_module = vita_module
        self.vita_criterion = vita_criterion
        self.num_layers, self.freeze_detector = num_layers, freeze_detector
        self.clip_matcher, self.clip_length, self.clip_stride = clip_matcher, clip_length, clip_stride
        self.match_reduction = match_reduction
        if freeze_detector:
            for part in (self.backbone, self.sem_seg_head):
                part.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, mask_former = cfg.MODEL.VITA, cfg.MODEL.MASK_FORMER
        if node.LAST_LAYER_NUM > 1 and not mask_former.DEEP_SUPERVISION:
            raise ValueError("MODEL.VITA.LAST_LAYER_NUM above 1 needs MODEL.MASK_FORMER.DEEP_SUPERVISION True")
        return {
            **super().from_config(cfg),
            "vita_module": VitaModule(cfg),
            "criterion": SetCriterion(cfg),
            "heads": build_heads(cfg, embed_dim=mask_former.HIDDEN_DIM, feature_dim=cfg.MODEL.SEM_SEG_HEAD.MASK_DIM),
            "vita_criterion": VitaCriterion(cfg),
            "num_layers": node.LAST_LAYER_NUM,
            "freeze_detector": node.FREEZE_DETECTOR,
            "clip_matcher": ClipMatcher(cfg) if node.TEST.CLIP_MODE else None,
            "clip_length": node.TEST.CLIP_LENGTH,
            "clip_stride": node.TEST.CLIP_STRIDE,
            "match_reduction": node.TEST.MATCH_STRIDE / cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE,
        }

    def train(self, mode: bool = True) -> VITA:
        """As usual, but a frozen detector neither drops anything nor moves its statistics."""
        super().train(mode)
        if self.freeze_detector:
            for part in ("backbone", "sem_seg_head.pixel_decoder"):
                self.get_submodule(part).eval()
        return self

    def segment_frames(self, images: Tensor) -> SegmentedFrames:
        """Normalised frames (N, 3, H, W) -> predictions, queries (training: of the last L layers), the finest map."""
        layers = self.num_layers if self.training else 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_detector):
            return segment_frames(self.backbone, self.sem_seg_head, images, layers)

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses of a batch of clips: of frames (unless they are frozen), of tracklets, of likeness.

        With a second stream (``MODEL.BATCH_FORMER``) every clip counts twice, so that losses are means over both.

        Raises:
            ValueError: clips of different lengths, or a class that the head does not have.
        """
        lengths = {len(sample["image"]) for sample in samples}
        if len(lengths) != 1:
            raise ValueError(f"clips of one batch must have one length (INPUT.SAMPLING_FRAME_NUM), found {lengths}")
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        size = (int(images.shape[-2]), int(images.shape[-1]))
        targets = [
            clip_targets(sample, size=size, num_classes=self.criterion.num_classes, device=self.device)
            for sample in samples
        ]
        sizes = [(frame.shape[-2], frame.shape[-1]) for sample in samples for frame in sample["image"]]
        frames = self.segment_frames(images)
        streams = len(frames.finest) // len(images)
        targets, sizes = targets * streams, sizes * streams
        shape = (len(targets), lengths.pop())
        frame_targets = [frame for target in targets for frame in _visible(target)]
        losses: dict[str, Tensor] = {}
        if self.freeze_detector:
            matches = self._matches(frames, frame_targets)
        else:
            losses, matches = self.criterion.losses_and_matches(frames.output, frame_targets)
        pairs, masks = [layers[-1] for layers in matches], [target.masks for target in frame_targets]
        losses |= mask_former_losses(self.heads, frames.output, pairs, masks, sizes)
        video = self.vita_module(frames.frame_queries.unflatten(1, shape))
        features = self.vita_module.mask_features(frames.finest).unflatten(0, shape)
        return losses | self.vita_criterion(video, features, targets, matches)

    def target_counts(self, samples: Sequence[ClipSample]) -> dict[str, float] | None:
        """See :mod:`vis.modeling.segmenter.counts`: tracklets once for each layer of the frame decoder that is used."""
        if not only_targets_count(self):
            return None
        of_clips: dict[str, float] = {"vita.masks": self.num_layers * sum(map(seen_in_clip, samples))}
        return of_clips if self.freeze_detector else of_clips | {"masks": seen_in_frames(samples)}

    def _matches(self, frames: SegmentedFrames, targets: Sequence[MaskTargets]) -> list[list[Pairs]]:
        """Frame -> layer -> pairs, of the last L layers: the similarity loss asks for them."""
        layers = [*frames.output["aux_outputs"], frames.output][-self.num_layers :]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        embeds = torch.stack([layer["mask_embeds"] for layer in layers])
        features = frames.output["mask_features"]
        return self.criterion.matches(logits, embeds, features, targets)

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (T, 3, H, W) of a video -> queries (T, F, C) and what mask embeddings multiply, (T, Cm, h, w)."""
        frames = self.segment_frames(images)
        return frames.frame_queries[-1], self.vita_module.mask_features(frames.finest)

    def open_tracks(self) -> Tracks:
        """Tracks that are known after the last frame, or window by window."""
        return WholeVideoTracks(self) if self.clip_matcher is None else ClipTracks(self, self.clip_matcher)

    def open_video(self, height: int, width: int, *, video_id: int | None = None) -> VideoSession:
        """Start a video whose results are wanted at ``height`` x ``width``."""
        return (QualitySession if self.mask_score else VideoSession)(
            self.open_tracks(),
            normalizer=self.normalizer,
            window_size=self.window_size,
            max_num=self.max_num,
            mask_score=False,
            output_size=(height, width),
            video_id=video_id,
        )

    @torch.no_grad()
    def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
        """Intermediate arrays of a short video under the names of the recordings that parity is checked with."""
        images = self.normalizer(list(sample["image"]))
        arrays = {f"backbone.{name}": feature for name, feature in self.backbone(images).items()}
        queries, features = self.detect(images)
        tokens = self.vita_module.encode(queries[None, None])
        video = self.vita_module.decode(tokens)
        embeds = video.mask_embeds[-1]
        masks = predict_masks(embeds[0].expand(len(features), -1, -1), features)
        return {
            **arrays,
            "vita.pred_logits": video.pred_logits[-1],
            "vita.pred_mask_embed": embeds,
            "vita.pred_fq_embed": self.vita_module.sim_embed_frame(tokens),
            "vita.pred_cq_embed": video.clip_embeds,
            "pred_cls": video.pred_logits[-1, 0, 0],
            "pred_masks": masks.transpose(0, 1),
        }


def _visible(target: ClipTargets) -> list[MaskTargets]:
    """The instances that are in a frame, for each frame of a clip."""
    return [
        MaskTargets(target.labels[seen], target.masks[seen, t]) for t, seen in enumerate((target.ids != -1).unbind(1))
    ]


class WholeVideoTracks:
    """A video that is taken whole: queries of all frames are kept, mask features stored, masks made at the end.

    What grows with the video in working memory is F*C numbers a frame (0.1 MB for 100 queries of 256 channels), about
    five times that while the module runs.
    """

    def __init__(self, model: VITA) -> None:
        self._model = model
        self._queries: list[Tensor] = []  # of each pass (T, F, C)
        self._features = MaskStore(what="mask features")
        self._mask_embeds: Tensor | None = None  # (Q, Cm)

    def __len__(self) -> int:
        return len(self._features)

    def take(self, images: Tensor) -> None:
        """Detect objects in the next frames (T, 3, H, W)."""
        queries, features = self._model.detect(images)
        self._queries.append(queries)
        for frame in features:
            self._features.append(frame)

    def probabilities(self) -> Tensor:
        """Run the module on the whole video: (Q, K)."""
        video = self._model.vita_module(torch.cat(self._queries)[None, None])
        self._mask_embeds = video.mask_embeds[-1, 0, 0]
        return class_probabilities(video.pred_logits[-1, 0, 0])

    def masks(self, frame: int, queries: list[int]) -> Tensor:
        """Mask logits (len(queries), h, w)."""
        assert self._mask_embeds is not None
        embeds = self._mask_embeds[queries]
        return predict_masks(embeds[None], self._features.read(frame).to(embeds)[None])[0]

    def close(self) -> None:
        """Delete the stored features."""
        self._features.close()


class ClipTracks:
    """A video in overlapping windows: each frame is detected once, every window is joined to the tracks so far.

    Windows start at 0, S, 2S, ...; the last one ends with the video. Held are the queries and the reduced features of
    the frames that a window may still ask for, CLIP_LENGTH + CLIP_STRIDE and what one pass brings. What grows with the
    video in working memory is, per window, one mask embedding for each track in it: at most CAND_MAX * Cm numbers every
    S frames (17 kB a frame for 50 of 256 channels and S = 3). A video that fits one window is that of
    :class:`WholeVideoTracks`.
    """

    def __init__(self, model: VITA, matcher: ClipMatcher) -> None:
        self._model, self._matcher = model, matcher
        self._state = ClipState()
        self._features = MaskStore(what="mask features")
        self._queries: list[Tensor] = []  # (F, C) of the frames from `_first` on
        self._reduced: list[Tensor] = []  # (Cm, P) of the same
        self._first = 0
        self._next = 0  # where the next window starts

    def __len__(self) -> int:
        return len(self._features)

    def take(self, images: Tensor) -> None:
        """Detect objects in the next frames (T, 3, H, W), and join the windows that are complete."""
        queries, features = self._model.detect(images)
        size = [max(round(side / self._model.match_reduction), 1) for side in features.shape[-2:]]
        reduced = F.interpolate(features, size=size, mode="bilinear", align_corners=False).flatten(2)
        self._queries += queries.unbind()
        self._reduced += reduced.unbind()
        for frame in features:
            self._features.append(frame)
        # A window is run when a frame after it is there: the last one of a video may have to start earlier.
        while len(self) > self._next + self._model.clip_length:
            self._join(self._next, self._next + self._model.clip_length)
            done, self._next = self._next + 1, self._next + self._model.clip_stride
            del self._queries[: done - self._first], self._reduced[: done - self._first]
            self._first = done

    def _join(self, start: int, end: int, *, every_query: bool = False) -> None:
        frames = slice(start - self._first, end - self._first)
        video = self._model.vita_module(torch.stack(self._queries[frames])[None, None])
        found = Tracklets(
            video.pred_logits[-1, 0, 0].float().softmax(dim=-1),
            video.mask_embeds[-1, 0, 0].float(),
            video.clip_embeds[0, 0].float(),
        )
        found = found if every_query else self._matcher.candidates(found)
        self._matcher.join(self._state, found, start, end, torch.stack(self._reduced[frames]).float())

    def probabilities(self) -> Tensor:
        """Join the last window; (N, K), of every track the mean over its windows."""
        start = max(0, len(self) - self._model.clip_length)
        self._join(start, len(self), every_query=not len(self._state.windows))
        return self._state.class_probabilities()

    def masks(self, frame: int, queries: list[int]) -> Tensor:
        """Mask logits (len(queries), h, w); negative where a track is in no window of the frame."""
        embeds, there = self._state.mask_embeds(frame, queries)
        logits = predict_masks(embeds[None], self._features.read(frame).to(embeds)[None])[0]
        return torch.where(there[:, None, None], logits, -1.0)

    def close(self) -> None:
        """Delete the stored features."""
        self._features.close()
