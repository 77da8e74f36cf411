"""BatchFormerV2 in the encoder of a pixel decoder: keys and building; the layer is :mod:`vis.layers.batch_former`."""

from __future__ import annotations

from detectron2.config import CfgNode

from vis.config import declare
from vis.layers.batch_former import BatchFormers


@declare
def add_config(cfg: CfgNode) -> None:
    cfg.MODEL.BATCH_FORMER = node = type(cfg)()
    # Pictures of a batch attend to one another, in training alone: two streams from there on, losses over both.
    node.ENABLED = False
    # Encoder layers, from 0, at which there is one. One at layer 0 was best in its paper.
    node.LAYERS = [0]
    # after: it takes the layer's output (the released code of BatchFormerV2 on DETR); parallel: the layer's input, as
    # the 2nd place solution of OVIS 2022 says of MinVIS; before: as the released code does on Deformable DETR.
    node.POSITION = "after"
    # The published size.
    node.NUM_LAYERS = 1
    node.NUM_HEADS = 4
    node.DIM_FEEDFORWARD = 256
    node.DROPOUT = 0.5
    # Attend to the pictures of all processes; with one picture per process there are no others.
    node.ACROSS_GPUS = False


def build_batch_former(cfg: CfgNode, *, embed_dim: int, encoder_layers: int) -> BatchFormers | None:
    """What ``MODEL.BATCH_FORMER`` says, for an encoder of that many channels and layers; None where it is off.

    Raises:
        ValueError: a key has no possible value.
    """
    node = cfg.MODEL.BATCH_FORMER
    if not node.ENABLED:
        return None
    return BatchFormers(
        layers=node.LAYERS,
        position=node.POSITION,
        encoder_layers=encoder_layers,
        num_layers=node.NUM_LAYERS,
        across_gpus=node.ACROSS_GPUS,
        embed_dim=embed_dim,
        num_heads=node.NUM_HEADS,
        feedforward_dim=node.DIM_FEEDFORWARD,
        dropout=node.DROPOUT,
    )
