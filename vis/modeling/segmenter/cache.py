"""Predictions of a frozen segmenter on disk: training another tracker on the same frames skips the segmenter.

An entry belongs to the pixels it was made of, normalised and padded, to the segmenter's weights and settings and to the
arithmetic (mixed precision or not). So a frame that was augmented otherwise, or weights that changed, are another entry
and never a wrong one. Augmentation makes nearly every frame a new one: it is refused, since it would fill the disk.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from vis.config import declare
from vis.modeling.transformer_decoders.masked import DecoderOutput

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
_STORED = ("pred_logits", "pred_embeds", "raw_embeds", "mask_embeds", "mask_features")
# What decides the segmenter's output beside its weights.
_SETTINGS = ("BACKBONE", "RESNETS", "SWIN", "VIT_ADAPTER", "SEM_SEG_HEAD", "MASK_FORMER")


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.SEGMENTER_CACHE = node = type(cfg)()
    # Keep the predictions of a frozen segmenter, in training and evaluation, in DIR, which several runs may share.
    node.ENABLED = False
    node.DIR = ""
    # "float16" takes half the space (8 MB for a frame of 384 x 640) and rounds; "float32" is exact.
    node.DTYPE = "float16"
    # Nothing is added once the folder holds so much; what is there is still used.
    node.MAX_GB = 100.0


class SegmenterCache:
    """A folder with one file per frame; processes may share it."""

    def __init__(self, *, folder: Path, dtype: torch.dtype, max_bytes: float, settings: str = "") -> None:
        """Args: ``settings`` of the segmenter, part of what an entry belongs to."""
        self.folder, self.dtype, self.max_bytes, self.settings = folder, dtype, max_bytes, settings
        folder.mkdir(parents=True, exist_ok=True)
        self._bytes = float(sum(path.stat().st_size for path in folder.glob("*.pt")))
        self._weights: tuple[tuple[int, ...], str] | None = None
        logger.info("segmenter cache: %.1f GB in %s", self._bytes / 1e9, folder)

    def segment(
        self, images: Tensor, modules: Sequence[nn.Module], compute: Callable[[Tensor], DecoderOutput]
    ) -> DecoderOutput:
        """What ``compute(images)`` gives, from disk where it is there.

        Args:
            images: (N, 3, H, W), normalised and padded.
            modules: the segmenter's parts, all frozen.
            compute: the segmenter; it is given the frames that are not in the cache.

        Raises:
            ValueError: the segmenter is trained, or a file is damaged.
            OSError: the disk is full.
        """
        if any(parameter.requires_grad for module in modules for parameter in module.parameters()):
            raise ValueError("MODEL.SEGMENTER_CACHE is for a frozen segmenter, and this one is trained; switch it off")
        identity = self._identity(modules, images.device)
        paths = [self.folder / f"{_digest(identity.encode(), _bytes_of(image))}.pt" for image in images]
        entries = [self._read(path, images.device) for path in paths]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        if missing:
            made = compute(images if len(missing) == len(entries) else images[missing])
            for row, i in enumerate(missing):
                # As it will be read: the first pass over the data trains on the same numbers as the later ones.
                entries[i] = {name: _rounded(made[name][row], self.dtype) for name in _STORED if name in made}  # type: ignore[literal-required]
                self._write(paths[i], entries[i] or {})
        found = [entry for entry in entries if entry is not None]
        output: dict[str, Any] = {name: torch.stack([entry[name] for entry in found]) for name in found[0]}
        return {**output, "aux_outputs": []}  # type: ignore[typeddict-item]

    def _identity(self, modules: Sequence[nn.Module], device: torch.device) -> str:
        """Settings, weights and arithmetic; weights are read again only after they were written to."""
        states = [state for module in modules for state in module.state_dict().items()]
        versions = tuple(tensor._version for _, tensor in states)
        if self._weights is None or self._weights[0] != versions:
            self._weights = versions, _digest(*(part for name, tensor in states for part in _named(name, tensor)))
        mixed = torch.is_autocast_enabled(device.type)
        arithmetic = str(torch.get_autocast_dtype(device.type)) if mixed else "float32"
        return f"{self.settings} {self._weights[1]} {arithmetic} {self.dtype}"

    def _read(self, path: Path, device: torch.device) -> dict[str, Tensor] | None:
        if not path.exists():
            return None
        try:
            entry = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path} of the segmenter cache is damaged ({error}); delete it") from error
        return {name: tensor.float() for name, tensor in entry.items()}

    def _write(self, path: Path, entry: dict[str, Tensor]) -> None:
        if self._bytes >= self.max_bytes:
            return
        # Not the writer of checkpoints: an entry that is lost is made again, so nothing waits for the disk.
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            torch.save({name: tensor.to("cpu", self.dtype) for name, tensor in entry.items()}, temporary)
            size = temporary.stat().st_size
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            temporary.unlink(missing_ok=True)
            raise OSError(
                errno.ENOSPC,
                f"{path} cannot be written ({error}); free some space or lower MODEL.SEGMENTER_CACHE.MAX_GB",
            ) from error
        self._bytes += size
        if self._bytes >= self.max_bytes:
            logger.warning("segmenter cache: %s is full (MODEL.SEGMENTER_CACHE.MAX_GB); no more is added", self.folder)


def cached_segment(
    cache: SegmenterCache | None,
    images: Tensor,
    modules: Sequence[nn.Module],
    compute: Callable[[Tensor], DecoderOutput],
) -> DecoderOutput:
    """``compute(images)``, through the cache where there is one; see :meth:`SegmenterCache.segment`."""
    return compute(images) if cache is None else cache.segment(images, modules, compute)


def build_segmenter_cache(cfg: CfgNode) -> SegmenterCache | None:
    """The cache that ``MODEL.SEGMENTER_CACHE`` asks for, None where it is off.

    Raises:
        ValueError: a key has no usable value, or frames are augmented.
    """
    node = cfg.MODEL.SEGMENTER_CACHE
    if not node.ENABLED:
        return None
    if not node.DIR:
        raise ValueError("MODEL.SEGMENTER_CACHE.ENABLED needs a folder: set MODEL.SEGMENTER_CACHE.DIR")
    if node.DTYPE not in DTYPES:
        raise ValueError(f"MODEL.SEGMENTER_CACHE.DTYPE is {node.DTYPE!r}, expected one of {', '.join(DTYPES)}")
    augmented = _augmentations(cfg.INPUT)
    if augmented:
        raise ValueError(
            "MODEL.SEGMENTER_CACHE keeps predictions of frames, but here a frame is different each time it is read: "
            f"{', '.join(augmented)}. Switch the augmentation off (INPUT.RANDOM_FLIP none, one INPUT.MIN_SIZE_TRAIN, "
            "INPUT.AUGMENTATIONS [], INPUT.CROP.ENABLED False), or the cache"
        )
    settings = _digest(*(str(cfg.MODEL[name]).encode() for name in _SETTINGS if name in cfg.MODEL))
    folder = Path(node.DIR).expanduser()
    return SegmenterCache(folder=folder, dtype=DTYPES[node.DTYPE], max_bytes=node.MAX_GB * 1e9, settings=settings)


def refuse_segmenter_cache(cfg: CfgNode) -> None:
    """For a method that trains its segmenter.

    Raises:
        ValueError: the cache is switched on.
    """
    if cfg.MODEL.SEGMENTER_CACHE.ENABLED:
        raise ValueError(
            "MODEL.SEGMENTER_CACHE.ENABLED is for a frozen segmenter, but "
            f"{cfg.MODEL.META_ARCHITECTURE} trains its own: set it to False"
        )


def _augmentations(node: CfgNode) -> list[str]:
    """The keys that make a frame different each time it is read, with their values."""
    sizes = node.MIN_SIZE_TRAIN if isinstance(node.MIN_SIZE_TRAIN, (list, tuple)) else (node.MIN_SIZE_TRAIN,)
    found = {
        f"INPUT.MIN_SIZE_TRAIN {tuple(sizes)}": len(set(sizes)) > 1,
        f"INPUT.RANDOM_FLIP {node.RANDOM_FLIP}": node.RANDOM_FLIP != "none",
        f"INPUT.AUGMENTATIONS {list(node.AUGMENTATIONS)}": bool(node.AUGMENTATIONS),
        "INPUT.CROP.ENABLED True": node.CROP.ENABLED,
    }
    return [text for text, is_on in found.items() if is_on]


def _digest(*parts: bytes | memoryview) -> str:
    state = hashlib.blake2b(digest_size=20)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Shape, dtype and numbers are what an entry of the cache belongs to; the padded size is in the shape."""
    array = tensor.detach().cpu().contiguous()
    head = f"{tuple(array.shape)} {array.dtype} ".encode()
    return memoryview(head + array.flatten().view(torch.uint8).numpy().tobytes())


def _named(name: str, tensor: Tensor) -> Iterable[bytes | memoryview]:
    return name.encode(), _bytes_of(tensor)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).float()
