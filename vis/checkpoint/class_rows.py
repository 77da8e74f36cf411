"""Class heads between label sets: the rows of classes that both have are copied by name, the others start anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vis.checkpoint.names import ClassLayout
from vis.config import CfgNode, declare
from vis.data.categories import COCO, OVIS, class_names
from vis.data.registration import class_names_of

BY_NAME = "by_name"
_AMBIGUOUS = "ytvis_2019_train or ytvis_2021_train (YouTube-VIS 2022 has the classes of 2021)"

# Names of one thing in COCO, YouTube-VIS 2019 and 2021 and OVIS, without case and separators.
SYNONYMS: Mapping[str, str] = {
    "motorbike": "motorcycle",  # YouTube-VIS | COCO, OVIS
    "aeroplane": "airplane",
    "sedan": "car",  # YouTube-VIS 2019 | COCO, YouTube-VIS 2021
    "vehical": "car",  # OVIS; it covers cars, buses and trucks, of which cars are the most
    "vehicle": "car",
    "flyingdisc": "frisbee",  # YouTube-VIS 2021 | COCO
    "seal": "earlessseal",
    "panda": "giantpanda",
}


@declare
def add_config(cfg: CfgNode) -> None:
    """How class heads start when the number or the order of the classes in MODEL.WEIGHTS is another."""
    # "": from initial values. "by_name": rows of classes with the same name are copied, the others start anew.
    cfg.MODEL.WEIGHTS_CLASS_MAP = ""
    # The data set whose classes MODEL.WEIGHTS has, where that cannot be told from their number.
    cfg.MODEL.WEIGHTS_CLASSES = ""


@dataclass(frozen=True)
class ClassMap:
    """Attributes: ``names`` of the model's classes in order; ``file_names`` of the file's, None: from their number."""

    names: tuple[str, ...]
    file_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class CopiedRows:
    """What became of the rows of one class head: names of the model's classes."""

    head: str
    copied: tuple[str, ...]
    new: tuple[str, ...]


def build_class_map(cfg: CfgNode) -> ClassMap | None:
    """``MODEL.WEIGHTS_CLASS_MAP`` with the classes of ``DATASETS.TRAIN``; None where it is off.

    Raises:
        ValueError: it is neither "" nor "by_name", there is no training data set, or a data set is unknown.
    """
    kind = cfg.MODEL.WEIGHTS_CLASS_MAP
    if kind not in ("", BY_NAME):
        raise ValueError(f'MODEL.WEIGHTS_CLASS_MAP is {kind!r}, expected "" or "{BY_NAME}"')
    if not kind:
        return None
    if not cfg.DATASETS.TRAIN:
        raise ValueError(f'MODEL.WEIGHTS_CLASS_MAP "{BY_NAME}" needs DATASETS.TRAIN, whose classes the model has')
    given = cfg.MODEL.WEIGHTS_CLASSES
    own = tuple(class_names_of(cfg.DATASETS.TRAIN[-1:]))  # several sets are brought to the classes of the last
    return ClassMap(own, tuple(class_names_of([given])) if given else None)


def plain_names(names: Sequence[str]) -> list[str]:
    """Names to compare: without case and separators, synonyms replaced.

    The mouse of a label set that has a keyboard too (COCO) is the computer's.
    """
    plain = ["".join(character for character in name.casefold() if character.isalnum()) for name in names]
    if "keyboard" in plain:
        plain = ["computermouse" if name == "mouse" else name for name in plain]
    return [SYNONYMS.get(name, name) for name in plain]


def classes_of_file(count: int) -> tuple[str, ...]:
    """The classes of a file by their number.

    Raises:
        ValueError: several label sets have that many, or none that is known.
    """
    known = {len(COCO): COCO, len(OVIS): OVIS}
    if count in known:
        return tuple(class_names(known[count]))
    sets = f"those of {_AMBIGUOUS}" if count == 40 else "those of none of COCO, YouTube-VIS and OVIS"
    raise ValueError(
        f"MODEL.WEIGHTS_CLASS_MAP: the file has {count} classes, {sets}. Say which: MODEL.WEIGHTS_CLASSES names a data "
        "set with the classes of the file"
    )


def map_rows(
    head: str, found: Tensor, own: Tensor, class_map: ClassMap, layout: ClassLayout
) -> tuple[Tensor, CopiedRows] | None:
    """One class head (its weight or its bias) with the rows of the file where the model has a class of that name.

    Args:
        found: (rows of the file, ...).
        own: (rows of the model, ...), the initial values.
        layout: what the rows are.

    Returns: None where both have the same classes in the same order, so that the tensor of the file fits as it is.

    Raises:
        ValueError: the classes of the file are not known, or are not as many as its rows.
    """
    count, wanted = layout.classes(len(found)), layout.classes(len(own))
    names = class_map.file_names or classes_of_file(count)
    if len(names) != count:
        raise ValueError(
            f"MODEL.WEIGHTS_CLASSES names a data set of {len(names)} classes, but {head} of the file has {count}"
        )
    if len(class_map.names) != wanted:
        raise ValueError(f"the model has {wanted} classes, its training data {len(class_map.names)}")
    theirs, ours = plain_names(names), plain_names(class_map.names)
    if theirs == ours:
        return None
    rows, each = own.clone(), layout.each
    place = {name: index for index, name in reversed(list(enumerate(theirs)))}  # the first of equal names
    for index, name in enumerate(ours):
        if name in place:
            start = each * place[name]
            rows[each * index : each * (index + 1)] = found[start : start + each].to(own.dtype)
    if layout.none:
        rows[-layout.none :] = found[-layout.none :].to(own.dtype)
    copied = tuple(name for name, plain in zip(class_map.names, ours, strict=True) if plain in place)
    new = tuple(name for name, plain in zip(class_map.names, ours, strict=True) if plain not in place)
    return rows, CopiedRows(head, copied, new)
