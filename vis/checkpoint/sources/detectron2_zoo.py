"""detectron2's model zoo: ImageNet ResNets (converted from torchvision, or Caffe2's of MSRA) and whole detectors."""

from __future__ import annotations

import re

from vis.checkpoint.sources.source import Source, always, register, renames

_BGR = (
    "its layers expect BGR pixels with only the mean subtracted and the stride in the 1x1 convolutions: INPUT.FORMAT "
    "BGR, MODEL.PIXEL_MEAN [103.53, 116.28, 123.675], MODEL.PIXEL_STD [1, 1, 1], MODEL.RESNETS.STRIDE_IN_1X1 True"
)

register(
    Source(
        name="detectron2_msra",
        title="a Caffe2 ResNet of detectron2's zoo (MSRA)",
        recognise=lambda names: names.any(r"conv1_w$", r"res2_0_branch2a_w$"),
        stage=always("backbone"),
        backbone=True,
        to_ours=renames(
            (r"^conv1_", "stem.conv1."),
            (r"^res_conv1_(bn|gn)_", "stem.conv1.norm."),
            (r"^res(\d)_(\d+)_branch1_", r"res\1.\2.shortcut."),
            *((rf"^res(\d)_(\d+)_branch2{letter}_", rf"res\1.\2.conv{i}.") for i, letter in enumerate("abc", start=1)),
            (r"\.(bn|gn)_", ".norm."),
            (r"\.(w|s)$", ".weight"),
            (r"\.b$", ".bias"),
            (r"\.rm$", ".running_mean"),
            (r"\.riv$", ".running_var"),
        ),
        to_released=None,
        # heads, optimizer state, biases of zeros before norms, and the layers of whole Caffe2 detectors
        drop=re.compile(r"_momentum$|^conv1_b$|_branch(1|2[abc])_b$|^(?!conv1_|res\d?_)|^res_(?!conv1_)"),
        # statistics are folded into scale and shift
        may_miss=re.compile(r"\.norm\.running_(mean|var)$"),
        note=_BGR,
    ),
    Source(
        name="detectron2_resnet",
        title="an ImageNet ResNet of detectron2's zoo",
        recognise=lambda names: names.any(r"stem\.conv1\.weight$", r"res2\.0\.conv1\.weight$"),
        stage=always("backbone"),
        backbone=True,
        drop=re.compile(r"^(stem\.)?(fc|linear)\."),
    ),
    Source(
        name="detectron2_detector",
        title="a detector of detectron2's zoo",
        recognise=lambda names: names.any(r"backbone\.(bottom_up\.)?stem\.", r"(proposal_generator|roi_heads|head)\."),
        stage=always("detector"),
        part=("backbone.bottom_up.", "backbone."),
    ),
)
