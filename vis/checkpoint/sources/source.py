"""What is known of one kind of released weights file: how to tell it, and its names in ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

#: (pattern, replacement) pairs, all applied in order.
Renames = tuple[tuple[re.Pattern[str], str], ...]


def renames(*pairs: tuple[str, str]) -> Renames:
    """``(regular expression, replacement)`` pairs, compiled."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def apply(rules: Renames, name: str) -> str:
    """``name`` after all rules."""
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


class Names:
    """The names of a file, to be asked what is among them."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def any(self, *patterns: str) -> bool:
        """Whether each of the regular expressions is found at the start of some name."""
        return all(any(map(re.compile(pattern).match, self.state)) for pattern in patterns)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, ``()`` where there is none of the name."""
        return tuple(self.state[name].shape) if name in self.state else ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of released file.

    Attributes:
        name: what ``--source`` and the report call it.
        title: the same for people.
        recognise: whether a file with these names is one.
        stage: what the file is good for (:mod:`vis.checkpoint.stages`), from its names in our naming.
        to_ours: the release's names -> ours. Those of a backbone have no prefix in ours (``res2.0.conv1.weight``).
        to_released: ours -> the release's; None where the release's naming is not written.
        drop: names (the release's) that no model here has: a classification head, buffers computed anew.
        backbone: the file holds a backbone alone.
        part: of a file with more than a backbone, the prefix that the backbone has in it: such a file serves as a
            backbone for models that have nothing else of it.
        may_miss: names (ours, without prefix) of the backbone that such files do not have and that keep initial values.
        aliases: names (ours) that repeat another tensor of the file: ignored where the model has them once.
        start_only: names (ours) of the file that the model need not have when a training starts from it.
        adapt: a tensor of another shape made fit, or None: (name, tensor, wanted shape).
        refuse: why a file that was recognised cannot be used, or None.
        no_object: the last row of a class head is "no object".
        under: what our names of the file begin with in a method that has the model as a part of it; a model that is
            one itself has the names without.
        values: a tensor as our models want it, whatever their shapes: (our name, tensor).
        note: what a user must know who loads it.
    """

    name: str
    title: str
    recognise: Callable[[Names], bool]
    stage: Callable[[Names], str]
    to_ours: Renames = ()
    to_released: Renames | None = ()
    drop: re.Pattern[str] | None = None
    backbone: bool = False
    part: tuple[str, ...] = ()
    may_miss: re.Pattern[str] | None = None
    aliases: re.Pattern[str] | None = None
    start_only: re.Pattern[str] | None = None
    adapt: Callable[[str, Tensor, tuple[int, ...]], Tensor | None] | None = None
    refuse: Callable[[Names], str | None] | None = None
    no_object: bool = True
    under: str = ""
    values: Callable[[str, Tensor], Tensor] | None = None
    note: str = ""

    def ours(self, name: str) -> str | None:
        """Our name, or None for what is dropped."""
        return None if self.drop is not None and self.drop.search(name) else apply(self.to_ours, name)


SOURCES: dict[str, Source] = {}


def register(*sources: Source) -> None:
    """Add sources; recognition asks them in the order in which they were added."""
    for source in sources:
        if source.name in SOURCES:
            raise ValueError(f"a source named {source.name!r} is registered already")
        SOURCES[source.name] = source


def always(stage: str) -> Callable[[Names], str]:
    """For sources whose files are all of one stage."""
    return lambda names: stage


def renamed(source: Source, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """(our name -> name in the file, names dropped).

    Raises:
        ValueError: two names of the file become one.
    """
    found: dict[str, str] = {}
    dropped = []
    for name in names:
        ours = source.ours(name)
        if ours is None:
            dropped.append(name)
        elif ours in found:
            raise ValueError(f"{name} and {found[ours]} of the file are both {ours} in our naming ({source.title})")
        else:
            found[ours] = name
    return found, dropped
