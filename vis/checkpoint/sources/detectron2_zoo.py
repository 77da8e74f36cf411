"""detectron2's model zoo: ImageNet ResNets (converted from torchvision, or Caffe2's of MSRA) and whole detectors."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from vis.checkpoint.sources.source import Names, Source, always, register, renames

#: Where methods hold a detector.
IMAGE_MODEL = "image_model."
_STD = (58.395, 57.12, 57.375)  # MODEL.PIXEL_STD here, of R, G and B
#: What is to be known of networks that began as a Caffe2 ResNet of MSRA.
MSRA_NOTE = (
    "it began as a Caffe2 ResNet (MSRA): the stride of its stages is in the 1x1 convolutions, which needs "
    "MODEL.RESNETS.STRIDE_IN_1X1 True, and it was trained on BGR pixels with only the mean subtracted. Its first "
    "convolution is rewritten for MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and PIXEL_STD [58.395, 57.12, 57.375] in "
    "RGB, which are the defaults: keep them"
)


def rgb_stem(name: str, tensor: Tensor) -> Tensor:
    """The first convolution for RGB pixels divided by their deviation, where it was for BGR pixels that are not."""
    if not name.endswith("stem.conv1.weight") or tensor.shape[1] != 3:
        return tensor
    return tensor.flip(1) * torch.tensor(_STD, dtype=tensor.dtype)[:, None, None]


def _is_mask_rcnn(names: Names) -> bool:
    return names.any(r"backbone\.bottom_up\.stem\.", r"proposal_generator\.rpn_head\.", r"roi_heads\.mask_head\.")


def _is_other(names: Names) -> bool:
    known = _is_mask_rcnn(names) or names.any(r"controller\.", r"mask_branch\.")  # AdelaiDet's CondInst
    heads = names.any(r"backbone\.(bottom_up\.)?stem\.", r"(proposal_generator|roi_heads|head)\.")
    return heads and not known


def _mask_rcnn(name: str, title: str, *, msra: bool) -> Source:
    """A Mask R-CNN with FPN, as part of a method (``image_model.*``)."""
    return Source(
        name=name,
        title=title,
        recognise=_is_mask_rcnn,
        stage=always("mask_rcnn"),
        to_ours=renames((r"^", IMAGE_MODEL)),
        to_released=None if msra else renames((rf"^{re.escape(IMAGE_MODEL)}", "")),
        part=(f"{IMAGE_MODEL}backbone.bottom_up.",),
        under=IMAGE_MODEL,
        values=rgb_stem if msra else None,
        note=MSRA_NOTE if msra else "",
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
        values=rgb_stem,
        note=MSRA_NOTE,
    ),
    Source(
        name="detectron2_resnet",
        title="an ImageNet ResNet of detectron2's zoo",
        recognise=lambda names: names.any(r"stem\.conv1\.weight$", r"res2\.0\.conv1\.weight$"),
        stage=always("backbone"),
        backbone=True,
        drop=re.compile(r"^(stem\.)?(fc|linear)\."),
    ),
    _mask_rcnn("detectron2_mask_rcnn", "a Mask R-CNN of detectron2's zoo (MSRA)", msra=True),
    # only by its name: the names in the file do not tell the pixels it was trained on
    _mask_rcnn("detectron2_mask_rcnn_rgb", "a Mask R-CNN of detectron2 for RGB pixels", msra=False),
    Source(
        name="detectron2_detector",
        title="a detector of detectron2's zoo",
        recognise=_is_other,
        stage=always("detector"),
        part=("backbone.bottom_up.", "backbone."),
        note=(
            "most detectors of the zoo began as a Caffe2 ResNet (MSRA), for BGR pixels and with the stride in the 1x1 "
            "convolutions. Only those of Mask R-CNN are rewritten for RGB here: better start from one of them, or from "
            "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
        ),
    ),
)
