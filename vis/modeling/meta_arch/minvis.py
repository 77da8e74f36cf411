"""MinVIS (Huang, Yu, Anandkumar, NeurIPS 2022): an image segmenter on single frames, tracked by its own queries.

Training is per frame: every frame of a clip is an image of its own. At test time the queries of consecutive frames are
matched by their embeddings, class logits are averaged over the video, and the best (query, class) pairs are reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from vis.modeling.criterions.set_criterion import MaskTargets, SetCriterion
from vis.modeling.inference import MaskStore, MaskWriter, select_tracks
from vis.modeling.registry import TRACKER_REGISTRY, lookup
from vis.modeling.segmenter import Segmenter, build_segmenter
from vis.modeling.segmenter.frames import pad_masks
from vis.modeling.transformer_decoders.masked import DecoderOutput, predict_masks
from vis.structures import ClipSample, VideoPrediction


@META_ARCH_REGISTRY.register()
class MinVIS(nn.Module):
    """Segmenter, criterion and a tracker without parameters."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"MODEL": {"TRACKER": {"NAME": "QueryMatchingTracker"}}}

    @configurable
    def __init__(
        self,
        *,
        segmenter: Segmenter,
        criterion: SetCriterion,
        tracker: nn.Module,
        window_size: int,
        max_num: int,
        mask_score: bool,
    ) -> None:
        """Args: ``window_size`` frames per pass at test time; ``max_num`` results per video."""
        super().__init__()
        if window_size < 1:
            raise ValueError(f"MODEL.MASK_FORMER.TEST.WINDOW_SIZE is {window_size}, expected at least 1 frame")
        self.backbone, self.sem_seg_head, self.normalizer = segmenter
        self.criterion = criterion
        self.tracker = tracker
        self.window_size, self.max_num, self.mask_score = window_size, max_num, mask_score

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        test = cfg.MODEL.MASK_FORMER.TEST
        return {
            "segmenter": build_segmenter(cfg),
            "criterion": SetCriterion(cfg),
            "tracker": lookup(TRACKER_REGISTRY, cfg.MODEL.TRACKER.NAME, "MODEL.TRACKER.NAME")(cfg),
            "window_size": test.WINDOW_SIZE,
            "max_num": test.MAX_NUM,
            "mask_score": test.MASK_SCORE,
        }

    @property
    def device(self) -> torch.device:
        return self.normalizer.device

    def forward(self, samples: Sequence[ClipSample]) -> dict[str, Tensor] | list[VideoPrediction]:
        """Clips -> ``{loss_*}`` in training; videos -> one :class:`VideoPrediction` each in eval mode."""
        return self.losses(samples) if self.training else [self.predict(sample) for sample in samples]

    def segment(self, images: Tensor) -> DecoderOutput:
        """Normalised, padded frames (N, 3, H, W) -> predictions of each frame on its own."""
        return self.sem_seg_head(self.backbone(images))

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Weighted losses; every frame is an image, an instance that is absent in a frame is no target there.

        Raises:
            ValueError: a class that the head does not have.
        """
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        size = (int(images.shape[-2]), int(images.shape[-1]))
        targets = []
        for instances in (frame for sample in samples for frame in sample["instances"]):
            present = instances.gt_ids != -1
            labels = instances.gt_classes[present]
            self._check_labels(labels)
            masks = pad_masks(instances.gt_masks.tensor[present], size)
            targets.append(MaskTargets(labels.to(self.device), masks.to(self.device)))
        return self.criterion(self.segment(images), targets)

    def _check_labels(self, labels: Tensor) -> None:
        """A label that the head does not have is a user's mistake; on a GPU it would end the process without a word."""
        num_classes = self.criterion.num_classes
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"the data has instances of class {int(wrong[0])} (counted from 0), but MODEL.SEM_SEG_HEAD.NUM_CLASSES "
                f"is {num_classes}; leave it out to follow the data set"
            )

    def predict(self, sample: ClipSample) -> VideoPrediction:
        """One video, read a window at a time."""
        session = self.open_video(sample["height"], sample["width"], video_id=sample.get("video_id"))
        for window in windows(sample["image"], self.window_size):
            session.push(window)
        return session.close()

    def open_video(self, height: int, width: int, *, video_id: int | None = None) -> MinVISSession:
        """Start a video whose results are wanted at ``height`` x ``width``."""
        return MinVISSession(self, height, width, video_id)

    @torch.no_grad()
    def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
        """Intermediate arrays of a short video under the names of the recordings that parity is checked with."""
        images = self.normalizer(list(sample["image"]))
        features = self.backbone(images)
        tracked, _ = self.tracker(self.sem_seg_head(features), None)
        masks = predict_masks(tracked["mask_embeds"], tracked["mask_features"])
        return {
            **{f"backbone.{name}": feature for name, feature in features.items()},
            "pred_cls": tracked["pred_logits"].mean(dim=0),
            "pred_masks": masks.transpose(0, 1),
        }


def windows(frames: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Consecutive lists of up to ``size`` frames; reads ``frames`` once, in order."""
    window: list[Tensor] = []
    for frame in frames:
        window.append(frame)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


class MinVISSession:
    """One video under way: push frames in order, then close. Sessions of several videos may be open at once."""

    def __init__(self, model: MinVIS, height: int, width: int, video_id: int | None) -> None:
        self._model = model
        self._output_size, self._video_id = (height, width), video_id
        self._state: Any = None
        self._logits: Tensor | None = None  # (Q, K+1), sum over the frames
        self._store = MaskStore()
        self._input_size: tuple[int, int] | None = None
        self._closed = False

    @torch.no_grad()
    def push(self, frames: Sequence[Tensor]) -> None:
        """Take the next frames, each (3, H, W), RGB 0..255; all frames of a video have one size.

        Raises:
            ValueError: a frame has another size than the first (none is taken then), or the session is closed.
        """
        self._check_open()
        model = self._model
        for frame in frames:
            size = (int(frame.shape[-2]), int(frame.shape[-1]))
            self._input_size = self._input_size or size
            if size != self._input_size:
                raise ValueError(f"a frame is {size}, the first of the video was {self._input_size} (height, width)")
        for window in windows(frames, model.window_size):
            tracked, self._state = model.tracker(model.segment(model.normalizer(window)), self._state)
            logits = tracked["pred_logits"].float().sum(dim=0)
            self._logits = logits if self._logits is None else self._logits + logits
            for embeds, features in zip(tracked["mask_embeds"], tracked["mask_features"], strict=True):
                self._store.append(predict_masks(embeds[None], features[None])[0])

    @torch.no_grad()
    def close(self) -> VideoPrediction:
        """The result; the session is over.

        Raises:
            ValueError: no frame was pushed, or the session is closed.
        """
        self._check_open()
        if self._logits is None or self._input_size is None:
            raise ValueError("the video has no frame: push at least one before close")
        model, length = self._model, len(self._store)
        probabilities = (self._logits / length).softmax(dim=-1)[:, :-1]
        scores, labels, queries = (x.cpu() for x in select_tracks(probabilities, model.max_num))
        kept, row = torch.unique(queries, return_inverse=True)
        writer = MaskWriter(
            num_queries=len(kept),
            padded_size=model.normalizer.padded_size([self._input_size]),
            input_size=self._input_size,
            output_size=self._output_size,
            device=model.device,
            with_mask_score=model.mask_score,
        )
        self._closed = True
        with self._store:
            for frame in range(length):
                writer.add(self._store.read(frame, kept.tolist()))
        if model.mask_score:
            scores = scores * writer.mask_scores()[row]
        masks = [writer.tracks[i] for i in row.tolist()]
        return VideoPrediction(scores, labels, queries, masks, *self._output_size, length, self._video_id)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the video is closed: open another with open_video")
