"""Categories of the known data sets, so that nothing but an evaluation's own files is needed on disk.

YouTube-VIS 2019: Yang et al., "Video Instance Segmentation", ICCV 2019; 2021 and 2022: later versions with one list;
OVIS: Qi et al., "Occluded Video Instance Segmentation", IJCV 2022; COCO: Lin et al., ECCV 2014.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Category(NamedTuple):
    """One category as a json lists it."""

    id: int
    name: str


Categories = tuple[Category, ...]


def _numbered(names: str) -> Categories:
    return tuple(Category(number, name) for number, name in enumerate(names.split(), start=1))


YTVIS_2019 = _numbered(
    "person giant_panda lizard parrot skateboard sedan ape dog snake monkey hand rabbit duck cat cow fish train horse "
    "turtle bear motorbike giraffe leopard fox deer owl surfboard airplane truck zebra tiger elephant snowboard boat "
    "shark mouse frog eagle earless_seal tennis_racket"
)
# YouTube-VIS 2022 adds long videos to 2021 and keeps its categories.
YTVIS_2021 = _numbered(
    "airplane bear bird boat car cat cow deer dog duck earless_seal elephant fish flying_disc fox frog giant_panda "
    "giraffe horse leopard lizard monkey motorbike mouse parrot person rabbit shark skateboard snake snowboard "
    "squirrel surfboard tennis_racket tiger train truck turtle whale zebra"
)
# "Vehical" is how the data set spells it.
OVIS = _numbered(
    "Person Bird Cat Dog Horse Sheep Cow Elephant Bear Zebra Giraffe Poultry Giant_panda Lizard Parrot Monkey Rabbit "
    "Tiger Fish Turtle Bicycle Motorcycle Airplane Boat Vehical"
)
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
# COCO's ids run from 1 to 90 and leave ten out.
_COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO: Categories = tuple(
    Category(number, name)
    for number, name in zip((i for i in range(1, 91) if i not in _COCO_UNUSED), _COCO_NAMES.split(","), strict=True)
)

# COCO category id -> category id of the video data set. Two of COCO's may become one (skis and snowboard).
COCO_TO_YTVIS_2019: Mapping[int, int] = {
    **{1: 1, 2: 21, 3: 6, 4: 21, 5: 28, 7: 17, 8: 29, 9: 34, 17: 14, 18: 8, 19: 18, 21: 15, 22: 32, 23: 20},
    **{24: 30, 25: 22, 35: 33, 36: 33, 41: 5, 42: 27, 43: 40},
}
COCO_TO_YTVIS_2021: Mapping[int, int] = {
    **{1: 26, 2: 23, 3: 5, 4: 23, 5: 1, 7: 36, 8: 37, 9: 4, 16: 3, 17: 6, 18: 9, 19: 19, 21: 7, 22: 12, 23: 2},
    **{24: 40, 25: 18, 34: 14, 35: 31, 36: 31, 41: 29, 42: 33, 43: 34},
}
COCO_TO_OVIS: Mapping[int, int] = {
    **{1: 1, 2: 21, 3: 25, 4: 22, 5: 23, 6: 25, 8: 25, 9: 24, 17: 3, 18: 4, 19: 5, 20: 6, 21: 7, 22: 8, 23: 9},
    **{24: 10, 25: 11},
}


def contiguous_ids(categories: Iterable[Category]) -> dict[int, int]:
    """Category id of the data set -> 0..K-1, in the order of the ids."""
    return {number: index for index, number in enumerate(sorted(category.id for category in categories))}


def class_names(categories: Iterable[Category]) -> list[str]:
    """Names in the order of the contiguous ids."""
    return [category.name for category in sorted(categories)]


def class_colors(count: int) -> list[tuple[int, int, int]]:
    """``count`` clearly different RGB colours; colour i is the same whatever ``count`` is."""
    colors = []
    for index in range(count):
        # steps of the golden ratio spread any number of hues evenly
        hue = (index * 0.618033988749895) % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.65 + 0.35 * (index % 2), 1.0 - 0.3 * (index // 2 % 2))
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colors


def difference(found: Sequence[Category], expected: Sequence[Category]) -> str | None:
    """How the categories of a json differ from those a data set is known to have, or None where they do not.

    Case and the character between words do not count; ids and their order do.
    """
    have = {category.id: category.name for category in found}
    want = {category.id: category.name for category in expected}
    parts = []
    missing, unknown = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    if missing:
        parts.append("lacks " + _listed(f"{number} {want[number]!r}" for number in missing))
    if unknown:
        parts.append("has besides " + _listed(f"{number} {have[number]!r}" for number in unknown))
    renamed = [number for number in sorted(have.keys() & want.keys()) if _plain(have[number]) != _plain(want[number])]
    if renamed:
        parts.append("names " + _listed(f"{n} {have[n]!r} instead of {want[n]!r}" for n in renamed))
    return "; ".join(parts) or None


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _listed(items: Iterable[str], shown: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")
