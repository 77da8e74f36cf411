"""VITA (Heo et al., NeurIPS 2022): a Mask2Former and ``vita_module``; names are ours."""

from __future__ import annotations

from vis.checkpoint.sources.mask2former import EARLIER
from vis.checkpoint.sources.source import Names, Source, always, register


def _genvis(names: Names) -> str | None:
    if names.any(r"vita_module\.pre_memory_embed_k\.") or names.any(r"genvis_criterion\."):
        return "it is a GenVIS model, which VITA cannot load: use the VITA weights of the same data set"
    return None


register(
    Source(
        name="vita",
        title="VITA",
        recognise=lambda names: names.any(r"vita_module\.", r"sem_seg_head\."),
        stage=always("vita"),
        to_ours=EARLIER,
        refuse=_genvis,
    )
)
