"""A feature pyramid (Lin et al., FPN, CVPR 2017) whose top-down half runs on its own, on maps that may have changed.

The layers and their names are those of detectron2's ``FPN``: ``bottom_up``, ``fpn_lateral3``, ``fpn_output3``,
``top_block.p6`` ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from vis.layers.linear import speed_up_pointwise
from vis.modeling.backbones.build import build_backbone


class SplitFPN(FPN):
    """detectron2's FPN in two halves: ``bottom_up`` is the backbone, :meth:`top_down` the pyramid."""

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        top_block: nn.Module | None = None,
        norm_eval: bool = True,
    ) -> None:
        """Args:
        in_features: maps of the backbone that are used, fine to coarse.
        norm_eval: batch norms of the backbone keep the statistics that they were loaded with; their weight and bias are
            trained.

        Raises:
            ValueError: the backbone has no map of a name.
        """
        given = bottom_up.output_shape()
        missing = [name for name in in_features if name not in given]
        if missing:
            raise ValueError(f"the pyramid needs {', '.join(missing)} of the backbone, which gives {', '.join(given)}")
        super().__init__(bottom_up, list(in_features), out_channels, top_block=top_block)
        self.norm_eval = norm_eval

    @property
    def last_channels(self) -> int:
        """Channels of the coarsest map of the backbone that is used."""
        channels: int = self.bottom_up.output_shape()[self.in_features[-1]].channels
        return channels

    def train(self, mode: bool = True) -> SplitFPN:
        """As usual, except that batch norms of the backbone stay in evaluation mode with ``norm_eval``."""
        super().train(mode)
        if self.norm_eval:
            for module in self.bottom_up.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _coarsest(self, x: Tensor) -> list[Tensor]:
        """Levels above the backbone's last (N, C, h, w)."""
        assert self.top_block is not None
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return list(self.top_block(x))
        # On CPUs torch (2.14) leaves the weight's gradient of a bfloat16 convolution of a map one cell wide unwritten,
        # and the last levels of a small picture are such. They cost next to nothing in float32.
        with torch.autocast("cpu", enabled=False):
            return list(self.top_block(x.float()))

    def top_down(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps (N, C_i, h_i, w_i) of the backbone, each half the size of the one before -> the pyramid by name."""
        coarse_first = [features[name] for name in reversed(self.in_features)]
        carried: Tensor | None = None
        levels: list[Tensor] = []
        for x, lateral, output in zip(coarse_first, self.lateral_convs, self.output_convs, strict=True):
            x = lateral(x)
            carried = x if carried is None else x + F.interpolate(carried, size=x.shape[-2:], mode="nearest")
            levels.insert(0, output(carried))
        if self.top_block is not None:
            levels.extend(self._coarsest(levels[-1]))
        return dict(zip(self._out_features, levels, strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> the pyramid."""
        return self.top_down(self.bottom_up(images))


def build_fpn(cfg: CfgNode, *, in_features: Sequence[str], out_channels: int, top: str, norm_eval: bool) -> SplitFPN:
    """A pyramid on the backbone that the configuration names.

    Args:
        top: "p6p7", two strided convolutions of the coarsest output (RetinaNet, FCOS), or "pool", every second of its
            cells (Mask R-CNN).
        norm_eval: see :class:`SplitFPN`.
    """
    blocks: dict[str, Any] = {
        "p6p7": lambda: LastLevelP6P7(out_channels, out_channels, in_feature="p5"),
        "pool": LastLevelMaxPool,
    }
    fpn = SplitFPN(
        bottom_up=build_backbone(cfg),
        in_features=in_features,
        out_channels=out_channels,
        top_block=blocks[top](),
        norm_eval=norm_eval,
    )
    speed_up_pointwise(fpn)
    return fpn
