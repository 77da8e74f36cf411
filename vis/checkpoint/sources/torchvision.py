"""ImageNet ResNets of torchvision, and of timm, which names its plain ResNets alike."""

from __future__ import annotations

import re

from vis.checkpoint.sources.source import Source, always, register, renames

# res2..res5 have the stage's stride as the exponent of 2; torchvision counts the stages from 1.
_STAGES = [(stage, stage + 1) for stage in range(1, 5)]

register(
    Source(
        name="torchvision",
        title="a ResNet of torchvision or timm",
        recognise=lambda names: names.any(r"conv1\.weight$", r"bn1\.", r"layer4\.0\.conv1\.weight$"),
        stage=always("backbone"),
        backbone=True,
        to_ours=renames(
            (r"^conv1\.", "stem.conv1."),
            (r"^bn1\.", "stem.conv1.norm."),
            *((rf"^layer{theirs}\.", f"res{ours}.") for theirs, ours in _STAGES),
            (r"\.bn(\d)\.", r".conv\1.norm."),
            (r"\.downsample\.0\.", ".shortcut."),
            (r"\.downsample\.1\.", ".shortcut.norm."),
        ),
        to_released=renames(
            (r"^stem\.conv1\.norm\.", "bn1."),
            (r"^stem\.conv1\.", "conv1."),
            *((rf"^res{ours}\.", f"layer{theirs}.") for theirs, ours in _STAGES),
            (r"\.conv(\d)\.norm\.", r".bn\1."),
            (r"\.shortcut\.norm\.", ".downsample.1."),
            (r"\.shortcut\.", ".downsample.0."),
        ),
        drop=re.compile(r"^fc\."),
    )
)
