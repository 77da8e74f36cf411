"""From one naming of weights to another, without a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vis.checkpoint.files import WeightFile
from vis.checkpoint.sources import SOURCES, Recognised, Source, recognise
from vis.checkpoint.sources.source import apply
from vis.config import closest

TO = ("ours", "released")


@dataclass
class Conversion:
    """Attributes: ``state`` under the new names; ``source`` whose naming is concerned; ``stage`` of the file;
    ``renamed`` how many names changed; ``dropped`` names that have no counterpart."""

    state: dict[str, Tensor]
    source: Source
    stage: str
    renamed: int
    dropped: list[str]

    def summary(self) -> str:
        """Lines for people."""
        lines = [
            f"source: {self.source.title} ({self.source.name}); stage: {self.stage}",
            f"{len(self.state)} tensors, {self.renamed} of them renamed",
        ]
        if self.dropped:
            shown = ", ".join(self.dropped[:8]) + (" ..." if len(self.dropped) > 8 else "")
            lines.append(f"{len(self.dropped)} left out, which no model here has: {shown}")
        if self.source.note:
            lines.append(f"NOTE: {self.source.note}")
        return "\n".join(lines)


def convert(weights: WeightFile, *, to: str = "ours", source: str = "", half: bool = False) -> Conversion:
    """The tensors of a file under our names, or under those of a release.

    Args:
        to: "ours" or "released".
        source: a name in ``SOURCES``: what the file is of, or, for "released", whose naming is wanted. "": the names
            in the file tell.
        half: floating-point tensors become float16.

    Raises:
        ValueError: no such source or direction, or the source's naming is not written.
    """
    if to not in TO:
        raise ValueError(f"weights are converted to {' or '.join(TO)}, not to {to!r}")
    file = _read(weights, source) if to == "ours" else _released(weights, source)
    renamed = len(set(file.state) - set(weights.state))
    state = {name: _half(value) if half else value for name, value in file.state.items()}
    return Conversion(state, file.source, file.stage, renamed, file.dropped)


def _read(weights: WeightFile, source: str) -> Recognised:
    try:
        return recognise(weights.state, backbone_only=weights.backbone_only, name=source)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from error


def _released(weights: WeightFile, name: str) -> Recognised:
    file = _read(weights, "")
    if name and name not in SOURCES:
        raise ValueError(f"no source is named {name!r}; there are {', '.join(SOURCES)}.{closest(name, list(SOURCES))}")
    wanted = SOURCES[name] if name else file.source
    if wanted.to_released is None:
        raise ValueError(f"the naming of {wanted.title} is read here, and not written")
    if wanted.backbone != file.backbone:
        raise ValueError(
            f"{weights.path} is {file.source.title}, which the naming of {wanted.title} does not fit: "
            + ("that is of a backbone alone" if wanted.backbone else "that is of a whole model")
        )
    state = {apply(wanted.to_released, key): value for key, value in file.state.items()}
    if len(state) < len(file.state):
        raise ValueError(f"{weights.path}: names of it fall together in the naming of {wanted.title}")
    return Recognised(wanted, file.stage, state, file.dropped, file.backbone)


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value
