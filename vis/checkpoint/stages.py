"""What a weights file is good for: its stage in the order image -> segmenter -> online -> offline.

A later stage trains its own part on top of an earlier one and leaves that frozen, so a file of the wrong stage gives a
model with random parts that runs without an error. A meta-architecture says what it starts from in ``WEIGHT_STAGES``:
stage of a file -> prefixes of the names that may be missing in it when a training starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from vis.checkpoint.names import class_layout
from vis.checkpoint.sources import UNKNOWN, Recognised

logger = logging.getLogger(__name__)

#: stage -> (what a file of it is, how to come by one)
STAGES: dict[str, tuple[str, str]] = {
    "backbone": (
        "an ImageNet backbone alone",
        "for instance detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    ),
    "detector": ("a detector of detectron2's model zoo", "from detectron2's MODEL_ZOO.md"),
    "image": (
        "a Mask2Former model of COCO images (by its class rows)",
        "from Mask2Former's model zoo (MODEL_ZOO.md here has the addresses), or train configs/coco/instance_r50.yaml",
    ),
    "segmenter": (
        "a MinVIS segmenter",
        "train one on the target data set with configs/minvis/, or take a released MinVIS",
    ),
    "ctvis": ("a CTVIS segmenter (with its re-identification head)", "from DVIS++'s release (ctvis_*.pth)"),
    "dvis_online": ("a DVIS online model", "train the online stage of DVIS, or take a released DVIS_online_*.pth"),
    "dvis_offline": ("a DVIS offline model", "train the offline stage of DVIS, or take a released DVIS_offline_*.pth"),
    "dvisplus_online": ("a DVIS++ online model", "train the online stage of DVIS++, or take a released one"),
    "dvisplus_offline": ("a DVIS++ offline model", "train the offline stage of DVIS++, or take a released one"),
    "vita": ("a VITA model", "train configs/vita/, or take a released one"),
    "idol": ("an IDOL model", "train configs/idol/, or take a released one (VNext)"),
    "condinst": ("a CondInst of images", "train configs/coco/condinst_r50.yaml, or take the one of IAI's release"),
    "mask_rcnn": ("a Mask R-CNN of images", "from detectron2's MODEL_ZOO.md (R50-FPN, R101-FPN)"),
    "masktrack_rcnn": ("a detector with MaskTrack R-CNN's embeddings", "train configs/masktrack_rcnn/"),
    "iai": ("an IAI model", "train configs/iai/, or take a released one"),
}


def stages_of(model: nn.Module) -> Mapping[str, tuple[str, ...]] | None:
    """``WEIGHT_STAGES`` of a model, None where it declares none.

    Raises:
        ValueError: it names a stage that there is not.
    """
    stages: Mapping[str, tuple[str, ...]] | None = getattr(model, "WEIGHT_STAGES", None)
    if stages is not None and (unknown := [stage for stage in stages if stage not in STAGES]):
        raise ValueError(f"{type(model).__name__}.WEIGHT_STAGES names {unknown}; there are {', '.join(STAGES)}")
    return stages


def permitted_missing(
    model: nn.Module, file: Recognised, path: str, *, training: bool, allow_missing: Sequence[str]
) -> tuple[str, ...]:
    """Prefixes of names that the file may lack.

    Args:
        training: a training starts from the file; an evaluation permits nothing.
        allow_missing: what the user permits; with it a training takes a file of any stage.

    Raises:
        ValueError: the file is of a stage that the model does not start from, or cannot be evaluated with.
    """
    stages = stages_of(model)
    if not training and file.stage == "backbone":
        raise ValueError(
            f"{path} is {file.source.title}: a backbone alone, from which a training can start. An evaluation needs "
            "the weights of the whole model"
        )
    if stages is None or file.stage == UNKNOWN:
        return tuple(allow_missing) if training else ()
    complete = [stage for stage, missing in stages.items() if not missing and stage != "backbone"]
    if training and file.stage in stages:
        return (*stages[file.stage], *allow_missing)
    if training and allow_missing:
        logger.warning(
            "%s is %s; %s starts from %s. It is used because MODEL.WEIGHTS_ALLOW_MISSING is set",
            *(path, STAGES[file.stage][0], type(model).__name__, " or ".join(stages)),
        )
        return tuple(allow_missing)
    if not training and file.stage in complete:
        return ()
    wanted = list(stages) if training else complete
    raise ValueError(
        f"{path} is {STAGES[file.stage][0]} (source: {file.source.title}), but {type(model).__name__} "
        + ("starts its training from " if training else "is evaluated with ")
        + "; or ".join(f"{STAGES[stage][0]} ({STAGES[stage][1]})" for stage in wanted)
        + (". To use it all the same: MODEL.WEIGHTS_ALLOW_MISSING names the parts that it lacks" if training else "")
    )


def check_class_heads(
    model: nn.Module, file: Recognised, path: str, remade: Mapping[str, tuple[int, int]], *, training: bool
) -> None:
    """Refuse class heads of another number of classes where they would never be trained.

    Args:
        remade: name of each head that does not fit -> (rows in the file, rows in the model).

    Raises:
        ValueError: an evaluation, or a training that leaves such a head frozen.
    """
    if not remade:
        return
    head, rows = next(iter(remade.items()))
    layout = class_layout(head, file.source.no_object)
    assert layout is not None, f"{head} was re-made as a class head"
    found, own = map(layout.classes, rows)
    counts = f"it has {found} classes, this model {own}"
    if not training:
        raise ValueError(
            f"{path} is of another set of classes ({counts}): its class layers would be random here. Evaluate it on "
            "the data set that it was trained on, or train it first"
        )
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    frozen = [name for name in remade if trained.get(name) is False]
    if frozen:
        what = STAGES.get(file.stage, (f"a file of stage {file.stage}",))[0]
        raise ValueError(
            f"{path} is {what} of another set of classes ({counts}), and this training leaves {frozen[0]} frozen, so "
            "that it would stay random. Train the earlier stage on this data set first: see MODEL_ZOO.md"
        )


def check_ids(path: str, remade: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]], *, training: bool) -> None:
    """Refuse layers of another number of ids where they would not be trained.

    Raises:
        ValueError: an evaluation.
    """
    if not remade or training:
        return
    name, found, own = remade[0]
    differs = next(axis for axis in range(len(own)) if found[axis] != own[axis])
    extra = int("id_logits" not in name)  # the bank and a softmax have one for the background
    raise ValueError(
        f"{path} was trained with MODEL.IAI.NUM_IDS {found[differs] - extra}, this model has {own[differs] - extra}: "
        "set it to that number"
    )
