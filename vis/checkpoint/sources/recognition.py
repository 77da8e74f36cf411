"""Which source a file is of, and its tensors under our names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vis.checkpoint.sources.source import SOURCES, Names, Source, always, renamed
from vis.config import closest

UNKNOWN = "unknown"

#: Files of no known release: names are taken as they are. A user's own models are such.
AS_IT_IS = Source(name=UNKNOWN, title="no known release", recognise=lambda names: True, stage=always(UNKNOWN))
#: The same, where the file says that it is a backbone alone (detectron2's "matching_heuristics").
BACKBONE_AS_IT_IS = Source(
    name="backbone",
    title="a backbone of no known release",
    recognise=lambda names: True,
    stage=always("backbone"),
    backbone=True,
    drop=re.compile(r"^((stem|head)\.)?(fc|linear|head)\."),
)


@dataclass
class Recognised:
    """A file under our names.

    Attributes:
        source: where it is from.
        stage: what it is (:mod:`vis.checkpoint.stages`).
        state: our name -> tensor.
        dropped: names of the file that no model here has.
        backbone: it is a backbone alone; names have no prefix then.
    """

    source: Source
    stage: str
    state: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    backbone: bool = False


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the ``module.`` of data-parallel wrappers, where all names have it."""
    wrapped = bool(state) and all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}


def recognise(state: Mapping[str, Tensor], *, backbone_only: bool = False, name: str = "") -> Recognised:
    """The source of a file by its names, and its tensors under ours.

    Args:
        state: name in the file -> tensor.
        backbone_only: the file itself says that it is a backbone.
        name: take this source instead of looking for one.

    Raises:
        ValueError: there is no source ``name``, or the file is one of those that cannot be used.
    """
    state = unwrapped(state)
    names = Names(state)
    if name and name not in SOURCES:
        raise ValueError(f"no source is named {name!r}; there are {', '.join(SOURCES)}.{closest(name, list(SOURCES))}")
    fallback = BACKBONE_AS_IT_IS if backbone_only else AS_IT_IS
    source = SOURCES[name] if name else next((item for item in SOURCES.values() if item.recognise(names)), fallback)
    reason = source.refuse(names) if source.refuse is not None else None
    if reason is not None:
        raise ValueError(f"this file cannot be used: {reason}")
    found, dropped = renamed(source, state)
    ours = {new: state[old] for new, old in found.items()}
    if source.values is not None:
        ours = {name: source.values(name, value) for name, value in ours.items()}
    return Recognised(source, source.stage(Names(ours)), ours, dropped, source.backbone)


def fit_prefix(file: Recognised, own: Collection[str]) -> Recognised:
    """Without the prefix ``under`` of a detector, for a model that has the detector's names themselves."""
    under = file.source.under
    bare = {name.removeprefix(under): value for name, value in file.state.items()}
    head = any(name in own for name in bare if "backbone." not in name)
    return dataclasses.replace(file, state=bare) if under and head else file


def take_backbone(file: Recognised) -> Recognised:
    """The backbone out of a detector's file; everything else counts as dropped."""
    prefix = next((part for part in file.source.part if any(name.startswith(part) for name in file.state)), None)
    if prefix is None:
        return file
    body = {
        key.removeprefix(prefix): value
        for key, value in file.state.items()
        if key.startswith(prefix) and not key.startswith(f"{prefix}fpn_")
    }
    rest = [key for key in file.state if not key.startswith(prefix) or key.startswith(f"{prefix}fpn_")]
    return Recognised(file.source, "backbone", body, [*file.dropped, *rest], backbone=True)
