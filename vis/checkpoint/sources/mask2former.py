"""Mask2Former (Cheng et al., CVPR 2022) and MinVIS, which trains the same network on video frames.

Both use the names of our models. Earlier files differ: Mask2Former called the queries ``static_query``, and files of
its predecessor have the parts of the pixel decoder directly under ``sem_seg_head``.
"""

from __future__ import annotations

from vis.checkpoint.sources.source import Names, Renames, Source, always, register, renames

#: Names of earlier releases, shared by everything that contains a Mask2Former.
EARLIER: Renames = renames(
    (r"(^|\.)static_query\.", r"\1query_feat."),
    (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
)

CLASS_HEAD = "sem_seg_head.predictor.class_embed.weight"
# Class counts that only COCO has: instances (80) and panoptic (133), each with a row for "no object".
COCO_ROWS = (81, 134)


# A detector with other names (IDOL, IAI, MaskTrack R-CNN) can start from the backbone of any of them.
_PART = ("backbone.",)


def _is_segmenter(names: Names) -> bool:
    return names.any(r"sem_seg_head\.predictor\.") and not names.any(r"(tracker|refiner|offline_tracker|vita_module)\.")


def _has_coco_classes(names: Names) -> bool:
    return names.shape(CLASS_HEAD)[:1] in [(rows,) for rows in COCO_ROWS]


register(
    Source(
        name="ctvis",
        title="CTVIS or the segmenter of DVIS++",
        recognise=lambda names: _is_segmenter(names) and names.any(r"sem_seg_head\.predictor\.reid_embed\."),
        stage=always("ctvis"),
        to_ours=EARLIER,
        part=_PART,
    ),
    Source(
        name="mask2former",
        title="Mask2Former on COCO",
        recognise=lambda names: _is_segmenter(names) and _has_coco_classes(names),
        stage=always("image"),
        to_ours=EARLIER,
        part=_PART,
    ),
    Source(
        name="minvis",
        title="MinVIS",
        recognise=_is_segmenter,
        stage=always("segmenter"),
        to_ours=EARLIER,
        part=_PART,
    ),
)
