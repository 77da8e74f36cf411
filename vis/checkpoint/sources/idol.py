"""IDOL (Wu et al., ECCV 2022), released in VNext: names are ours (``detr.detr.transformer...``)."""

from __future__ import annotations

import re

from vis.checkpoint.sources.source import Source, always, register

register(
    Source(
        name="idol",
        title="IDOL (VNext)",
        recognise=lambda names: names.any(r"detr\.detr\.transformer\.", r"detr\.reid_embed_head\."),
        stage=always("idol"),
        aliases=re.compile(r"^detr\.detr\.transformer\.decoder\.bbox_embed\."),
        no_object=False,
    )
)
