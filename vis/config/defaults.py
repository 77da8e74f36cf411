"""Defaults that several parts share. A key that belongs to one part is declared beside that part, not here."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_shared_defaults(cfg: CfgNode) -> None:
    """Change detectron2's defaults to those of video instance segmentation and add the keys that many parts read."""
    # Modules of parts outside this project, imported before their keys and names are looked up.
    cfg.IMPORTS = []
    # No file is loaded unless a yaml or the command line names one.
    cfg.MODEL.WEIGHTS = ""
    # "auto" takes CUDA where there is a device and says which one was taken.
    cfg.MODEL.DEVICE = "auto"
    # ImageNet statistics in RGB, as every released model of the family has them (detectron2's own default is BGR).
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.280, 103.530]
    cfg.MODEL.PIXEL_STD = [58.395, 57.120, 57.375]
    cfg.MODEL.META_ARCHITECTURE = "MinVIS"
    cfg.MODEL.MASK_ON = True
    cfg.SEED = 42
