"""A detector of single frames by itself: trained on images, or on the frames of clips one by one.

The methods that link detections over time start from what this gives. At test time every detection of a frame is a
track of its own; on images that is instance segmentation as usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor

from vis.modeling.detectors import Detector, build_detector
from vis.modeling.detectors.masks import encode_found, original_masks
from vis.modeling.detectors.targets import detector_targets
from vis.modeling.inference.growing import FrameSizes, GrowingModel, ResultRules, TrackedFrame
from vis.modeling.segmenter import FrameNormalizer
from vis.structures import ClipSample


@META_ARCH_REGISTRY.register()
class ImageDetector(GrowingModel):
    """The detector that ``MODEL.DETECTOR.NAME`` names."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"INPUT": {"SAMPLING_FRAME_NUM": 1}}
    #: Trainings start from a backbone, or from the same detector of other classes.
    WEIGHT_STAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {"backbone": (), "condinst": (), "mask_rcnn": ()}

    @configurable
    def __init__(self, *, image_model: Detector, **options: Any) -> None:
        """Args: ``options`` of :class:`~vis.modeling.inference.growing.GrowingModel`."""
        super().__init__(rules=ResultRules(classes="best", drop_noise=False), **options)
        self.image_model = image_model

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        image_model = build_detector(cfg)
        return {
            "image_model": image_model,
            "normalizer": FrameNormalizer(
                pixel_mean=cfg.MODEL.PIXEL_MEAN,
                pixel_std=cfg.MODEL.PIXEL_STD,
                size_divisibility=image_model.size_divisibility,
            ),
            "window_size": cfg.MODEL.MASK_FORMER.TEST.WINDOW_SIZE,
        }

    def losses(self, samples: Sequence[ClipSample]) -> dict[str, Tensor]:
        """Losses of all frames of the clips, as images.

        Raises:
            ValueError: a class that the head does not have.
        """
        images = self.normalizer([frame for sample in samples for frame in sample["image"]])
        size = (int(images.shape[-2]), int(images.shape[-1]))
        targets = self._targets(samples, size)
        pyramid = self.image_model.top_down(self.image_model.bottom_up(images))
        return self.image_model.losses(pyramid, targets, size)

    def target_counts(self, samples: Sequence[ClipSample]) -> dict[str, Tensor] | None:
        """What :meth:`losses` divides by where it follows from the targets: see :mod:`vis.layers.effective_batch`."""
        size = self.normalizer.padded_size([frame.shape[-2:] for sample in samples for frame in sample["image"]])
        return self.image_model.target_counts(self._targets(samples, size), size)

    def _targets(self, samples: Sequence[ClipSample], size: tuple[int, int]) -> list[Instances]:
        """Of every frame, with masks at the padded size."""
        num_classes = self.image_model.num_classes
        return [
            target
            for sample in samples
            for target in detector_targets(sample, padded_size=size, num_classes=num_classes, device=self.device)
        ]

    def track(self, images: Tensor, sizes: FrameSizes, state: int | None) -> tuple[list[TrackedFrame], int]:
        """Detections of frames (T, 3, H, W); ``state`` is how many there were before."""
        count = state or 0
        whole = self.image_model.top_down(self.image_model.bottom_up(images))
        frames = []
        for i in range(len(images)):
            pyramid = {name: level[i : i + 1] for name, level in whole.items()}
            found = self.image_model.detect(pyramid, sizes.input)
            probs = self.image_model.mask_probs(found, pyramid, sizes.padded)
            masks = original_masks(probs, input_size=sizes.input, output_size=sizes.output)
            ids = range(count, count + len(found))
            frames.append(TrackedFrame(ids, found.class_probs, encode_found(masks)))
            count += len(found)
        return frames, count
