"""IAI (Zhu et al., ECCV 2022) and its CondInst of COCO, both released as files of MMDetection 2.11.

Ours are recognised too: a model trained here has the names on the right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vis.checkpoint.sources.adelaidet import level_scale
from vis.checkpoint.sources.detectron2_zoo import IMAGE_MODEL
from vis.checkpoint.sources.source import Names, Source, always, register, renames
from vis.checkpoint.sources.torchvision import to_ours, to_released

_BACKBONE = f"{IMAGE_MODEL}backbone."
_BOTTOM_UP = f"{_BACKBONE}bottom_up."
_HEAD = f"{IMAGE_MODEL}proposal_generator.fcos_head."
_BRANCH = f"{IMAGE_MODEL}mask_branch."


def _prefixes() -> Iterator[tuple[str, str]]:
    """(the release's, ours) of everything but the ResNet."""
    for i in range(3):
        yield f"neck.lateral_convs.{i}.conv.", f"{_BACKBONE}fpn_lateral{3 + i}."
        yield f"neck.fpn_convs.{i}.conv.", f"{_BACKBONE}fpn_output{3 + i}."
    for i in (6, 7):
        yield f"neck.fpn_convs.{i - 3}.conv.", f"{_BACKBONE}top_block.p{i}."
    for theirs, ours in (("cls_convs", "cls_tower"), ("reg_convs", "bbox_tower"), ("id_convs", "id_tower")):
        for i in range(4):  # ours count convolution, norm and ReLU
            yield f"bbox_head.{theirs}.{i}.conv.", f"{_HEAD}{ours}.{3 * i}."
            yield f"bbox_head.{theirs}.{i}.gn.", f"{_HEAD}{ours}.{3 * i + 1}."
    yield "bbox_head.conv_cls.", f"{_HEAD}cls_logits."
    yield "bbox_head.conv_reg.", f"{_HEAD}bbox_pred."
    yield "bbox_head.conv_centerness.", f"{_HEAD}ctrness."
    yield "bbox_head.conv_id.", f"{_HEAD}id_logits."
    yield "bbox_head.controller.", f"{_HEAD}controller."
    yield "bbox_head.scales.", f"{_HEAD}scales."
    yield "bbox_head.mask_refine.", f"{_BRANCH}refine."
    yield "bbox_head.mask_head.", f"{_BRANCH}tower."
    yield "encoder_projector.", "association.enc_proj."
    yield "backbone_projector.", "association.cls_proj."
    yield "lstt.LSTT.layers.", "association.layers."
    yield "lstt.LSTT.decoder_norms.", "association.norms."
    yield "lstt.patch_wise_id_bank.", "association.id_bank."


_PAIRS = tuple(_prefixes())
_TO_OURS = (
    *to_ours("backbone.", _BOTTOM_UP),
    *renames(*((f"^{re.escape(theirs)}", ours) for theirs, ours in _PAIRS)),
)
_TO_RELEASED = (
    *to_released("backbone.", _BOTTOM_UP),
    *renames(*((f"^{re.escape(ours)}", theirs) for theirs, ours in _PAIRS)),
)


def _is_iai(names: Names) -> bool:
    released = names.any(r"lstt\.LSTT\.", r"bbox_head\.", r"backbone\.")
    return released or names.any(r"association\.", re.escape(IMAGE_MODEL))


def _stage(names: Names) -> str:
    """Of a detector under our names."""
    tracked = names.any(rf"{re.escape(IMAGE_MODEL)}.*(embed|track_)")
    kind = "condinst" if names.any(re.escape(_HEAD)) else "mask_rcnn"
    return "masktrack_rcnn" if tracked else kind


def _is_condinst(names: Names) -> bool:
    released = names.any(r"bbox_head\.controller\.", r"bbox_head\.mask_head\.", r"neck\.lateral_convs\.")
    return released or names.any(re.escape(f"{_HEAD}controller."))


register(
    Source(
        name="iai",
        title="IAI",
        recognise=_is_iai,
        stage=always("iai"),
        to_ours=_TO_OURS,
        to_released=_TO_RELEASED,
        adapt=level_scale,
        no_object=False,
    ),
    Source(
        name="condinst",
        title="CondInst of IAI's release or of ours",
        recognise=_is_condinst,
        stage=_stage,
        to_ours=_TO_OURS,
        to_released=_TO_RELEASED,
        part=(_BOTTOM_UP,),
        adapt=level_scale,
        no_object=False,
        under=IMAGE_MODEL,
    ),
    Source(
        name="mask_rcnn",
        title="Mask R-CNN of ours",
        recognise=lambda names: names.any(re.escape(f"{IMAGE_MODEL}roi_heads.")),
        stage=_stage,
        part=(_BOTTOM_UP,),
        under=IMAGE_MODEL,
    ),
)
