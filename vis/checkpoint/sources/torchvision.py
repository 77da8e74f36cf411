"""ImageNet ResNets of torchvision, and of timm, which names its plain ResNets alike."""

from __future__ import annotations

import re

from vis.checkpoint.sources.source import Renames, Source, always, register, renames

# res2..res5 have the stage's stride as the exponent of 2; torchvision counts the stages from 1.
_STAGES = [(stage, stage + 1) for stage in range(1, 5)]


def to_ours(theirs: str = "", ours: str = "") -> Renames:
    """torchvision's names of a ResNet -> detectron2's, with the prefixes that they have on either side."""
    start = re.escape(theirs)
    inside = rf"^({re.escape(ours)}res\d\.\d+)"
    return renames(
        (rf"^{start}conv1\.", f"{ours}stem.conv1."),
        (rf"^{start}bn1\.", f"{ours}stem.conv1.norm."),
        *((rf"^{start}layer{stage}\.", f"{ours}res{res}.") for stage, res in _STAGES),
        (rf"{inside}\.bn(\d)\.", r"\1.conv\2.norm."),
        (rf"{inside}\.downsample\.0\.", r"\1.shortcut."),
        (rf"{inside}\.downsample\.1\.", r"\1.shortcut.norm."),
    )


def to_released(theirs: str = "", ours: str = "") -> Renames:
    """The way back."""
    start = re.escape(ours)
    inside = rf"^({re.escape(theirs)}layer\d\.\d+)"
    return renames(
        (rf"^{start}stem\.conv1\.norm\.", f"{theirs}bn1."),
        (rf"^{start}stem\.conv1\.", f"{theirs}conv1."),
        *((rf"^{start}res{res}\.", f"{theirs}layer{stage}.") for stage, res in _STAGES),
        (rf"{inside}\.conv(\d)\.norm\.", r"\1.bn\2."),
        (rf"{inside}\.shortcut\.norm\.", r"\1.downsample.1."),
        (rf"{inside}\.shortcut\.", r"\1.downsample.0."),
    )


register(
    Source(
        name="torchvision",
        title="a ResNet of torchvision or timm",
        recognise=lambda names: names.any(r"conv1\.weight$", r"bn1\.", r"layer4\.0\.conv1\.weight$"),
        stage=always("backbone"),
        backbone=True,
        to_ours=to_ours(),
        to_released=to_released(),
        drop=re.compile(r"^fc\."),
    )
)
