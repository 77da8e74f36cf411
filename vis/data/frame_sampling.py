"""Which frames of a video make a training clip.

Follows the rules of Mask2Former-VIS, MinVIS and DVIS, with two slips of the released code mended: the last window of a
video is drawn too, and the frames of a video that is shorter than the clip stay in the order of time. Clips in steps
are IAI's, which starts a video that is too short over again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vis.config import CfgNode, declare

__all__ = ["FrameSampler", "build_frame_sampler"]


@declare
def add_config(cfg: CfgNode) -> None:
    """Keys of the frame sampling."""
    # Frames of a training clip.
    cfg.INPUT.SAMPLING_FRAME_NUM = 1
    # The other frames lie at most this far from the reference frame; 2 * RANGE + 1 == NUM asks for a contiguous window.
    cfg.INPUT.SAMPLING_FRAME_RANGE = 10
    # ... and at least this far.
    cfg.INPUT.SAMPLING_INTERVAL = 1
    # Above 0 (IAI: 3): from a random first frame on in steps of 1 to STEP_MAX frames, forward in time; a video shorter
    # than the clip is repeated from its beginning. FRAME_RANGE and INTERVAL are not used.
    cfg.INPUT.SAMPLING_STEP_MAX = 0
    # Only frames with an object that can be trained on and is a pixel wide and high at least (IAI, MaskTrack R-CNN).
    cfg.INPUT.SAMPLING_ANNOTATED_ONLY = False
    # Random order instead of the order of time.
    cfg.INPUT.SAMPLING_FRAME_SHUFFLE = False
    # Only this share of each video's frames, evenly spread, is ever used (annotation-efficient training of MinVIS).
    cfg.INPUT.SAMPLING_FRAME_RATIO = 1.0
    # Time runs backwards in half of the clips.
    cfg.INPUT.REVERSE_AGU = False


@dataclass(frozen=True, kw_only=True)
class FrameSampler:
    """Draws the frames of a clip. The fields are the keys above."""

    num_frames: int
    frame_range: int = 10
    interval: int = 1
    step_max: int = 0
    shuffle: bool = False
    ratio: float = 1.0
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"INPUT.SAMPLING_FRAME_NUM is {self.num_frames}; a clip has at least 1 frame.")
        if self.frame_range < 0 or self.interval < 1:
            raise ValueError(
                f"INPUT.SAMPLING_FRAME_RANGE ({self.frame_range}) must be at least 0 and INPUT.SAMPLING_INTERVAL "
                f"({self.interval}) at least 1."
            )
        if self.step_max < 0:
            raise ValueError(f"INPUT.SAMPLING_STEP_MAX is {self.step_max}, expected 0 (off) or more frames.")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"INPUT.SAMPLING_FRAME_RATIO is {self.ratio}, expected a share in (0, 1].")

    def __call__(self, length: int, rng: np.random.Generator) -> list[int]:
        """``num_frames`` indices into a video of ``length`` frames, in the order of time (or shuffled, or reversed).

        A video that is repeated (``step_max``) is in the order of time within each of its turns.
        """
        usable = self.usable_frames(length)
        picks = self._steps(len(usable), rng) if self.step_max else np.sort(self._positions(len(usable), rng))
        if self.shuffle:
            picks = rng.permutation(picks)
        if self.reverse and rng.random() < 0.5:
            picks = picks[::-1]
        return [int(usable[pick]) for pick in picks]

    def usable_frames(self, length: int) -> np.ndarray:
        """Indices that may be drawn: all, or an evenly spread share; the middle frame where that is one frame."""
        if self.ratio >= 1:
            return np.arange(length)
        count = max(1, round(self.ratio * length))
        if count == 1:
            return np.array([length // 2])
        return np.linspace(0, length, count, endpoint=False).astype(np.int64)

    def _steps(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """IAI: each step is uniform in what ``step_max`` and the frames that are to come leave."""
        if length < self.num_frames:
            return np.arange(self.num_frames) % length
        picks = [int(rng.integers(length - self.num_frames + 1))]
        for remaining in range(self.num_frames - 1, 0, -1):
            largest = min(self.step_max, length - picks[-1] - remaining)
            picks.append(picks[-1] + int(rng.integers(1, largest + 1)))
        return np.array(picks)

    def _positions(self, length: int, rng: np.random.Generator) -> np.ndarray:
        count = self.num_frames
        if count == 2 * self.frame_range + 1:
            if length < count:
                return np.concatenate([np.arange(length), rng.integers(length, size=count - length)])
            start = int(rng.integers(length - count + 1))
            return np.arange(start, start + count)
        reference = int(rng.integers(length))
        if count == 1:
            return np.array([reference])
        near = np.arange(max(0, reference - self.frame_range), min(length, reference + self.frame_range + 1))
        others = near[np.abs(near - reference) >= self.interval]
        if len(others) == 0:
            return np.full(count, reference)
        drawn = rng.permutation(others)[: count - 1]
        # Fewer frames than asked for: each at least once, the rest are repeats.
        repeats = rng.choice(others, size=count - 1 - len(drawn))
        return np.concatenate([[reference], drawn, repeats])


def build_frame_sampler(cfg: CfgNode) -> FrameSampler:
    """The sampler that ``cfg.INPUT`` describes."""
    return FrameSampler(
        num_frames=cfg.INPUT.SAMPLING_FRAME_NUM,
        frame_range=cfg.INPUT.SAMPLING_FRAME_RANGE,
        interval=cfg.INPUT.SAMPLING_INTERVAL,
        step_max=cfg.INPUT.SAMPLING_STEP_MAX,
        shuffle=cfg.INPUT.SAMPLING_FRAME_SHUFFLE,
        ratio=cfg.INPUT.SAMPLING_FRAME_RATIO,
        reverse=cfg.INPUT.REVERSE_AGU,
    )
