"""What the meta-architectures with a per-frame segmenter have in common: input, output, windows, sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from vis.modeling.inference.session import Session, Tracks, VideoSession, run_video
from vis.modeling.segmenter import Segmenter, build_segmenter, refuse_segmenter_cache
from vis.modeling.transformer_decoders.masked import DecoderOutput
from vis.structures import ClipSample, VideoPrediction


class VideoModel(nn.Module):
    """A segmenter of single frames. A method adds its other parts, :meth:`losses` and :meth:`open_tracks`."""

    #: Parts that a training leaves as they are.
    FROZEN: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, segmenter: Segmenter, window_size: int, max_num: int, mask_score: bool) -> None:
        """Args:
        window_size: frames per pass at test time.
        max_num: results per video.
        mask_score: class scores are multiplied by the mean probability inside the mask.
        """
        super().__init__()
        if window_size < 1:
            raise ValueError(f"MODEL.MASK_FORMER.TEST.WINDOW_SIZE is {window_size}, expected at least 1 frame")
        self.backbone, self.sem_seg_head, self.normalizer = segmenter
        self.window_size, self.max_num, self.mask_score = window_size, max_num, mask_score

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        if "sem_seg_head" not in cls.FROZEN:
            refuse_segmenter_cache(cfg)
        test = cfg.MODEL.MASK_FORMER.TEST
        return {
            "segmenter": build_segmenter(cfg),
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
        """Weighted losses of a batch of clips."""
        raise NotImplementedError

    def open_tracks(self) -> Tracks:
        """A video of which no frame has been seen."""
        raise NotImplementedError

    def predict(self, sample: ClipSample) -> VideoPrediction:
        """One video, read a window at a time.

        Raises:
            ValueError: the sample asks for the tracks of the one before to go on, which a session does.
        """
        return run_video(self.open_video, sample, self.window_size)

    def open_video(self, height: int, width: int, *, video_id: int | None = None) -> Session:
        """Start a video whose results are wanted at ``height`` x ``width``.

        A long video may be taken in parts, whose tracks have the same ids: :meth:`~.session.Session.cut`.
        """
        return VideoSession(
            self.open_tracks(),
            normalizer=self.normalizer,
            window_size=self.window_size,
            max_num=self.max_num,
            mask_score=self.mask_score,
            output_size=(height, width),
            video_id=video_id,
        )
