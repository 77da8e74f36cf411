"""CondInst of AdelaiDet (Tian et al., ECCV 2020): COCO weights that IAI and others on CondInst may start from.

Its names are those of our detector but for the controller, which is beside the head there. The convolutions of its
towers have biases; the towers here, as those of IAI's release, have none. A bias before a group normalisation has an
effect, so a model without them is not the released one: a training may start from it, an evaluation is refused.
"""

from __future__ import annotations

import re

from torch import Tensor

from vis.checkpoint.sources.detectron2_zoo import IMAGE_MODEL, MSRA_NOTE, rgb_stem
from vis.checkpoint.sources.source import Source, always, register, renames


def level_scale(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    """The factor of a level of the pyramid: one number, as a scalar or as a vector of one."""
    one = re.search(r"\.scales\.\d", name) and tensor.numel() == 1 and all(size == 1 for size in wanted)
    return tensor.reshape(wanted) if one else None


register(
    Source(
        name="adelaidet_condinst",
        title="CondInst of AdelaiDet (MSRA)",
        recognise=lambda names: names.any(
            r"backbone\.bottom_up\.stem\.", r"proposal_generator\.fcos_head\.", r"controller\.", r"mask_branch\."
        ),
        stage=always("condinst"),
        to_ours=renames((r"^controller\.", "proposal_generator.fcos_head.controller."), (r"^", IMAGE_MODEL)),
        to_released=None,
        # the semantic segmentation that accompanies its training; tables and counters of the mask head
        drop=re.compile(r"^mask_branch\.(seg_head|logits)\.|^mask_head\."),
        part=(f"{IMAGE_MODEL}backbone.bottom_up.",),
        start_only=re.compile(r"\.fcos_head\.(cls|bbox)_tower\.\d+\.bias$"),
        adapt=level_scale,
        no_object=False,
        under=IMAGE_MODEL,
        values=rgb_stem,
        note=MSRA_NOTE,
    )
)
