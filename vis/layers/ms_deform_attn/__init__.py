"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, section 4.1): the op and its module.

The op has three backends: compiled (C++ and CUDA, ``vis/csrc``), Triton and plain PyTorch; :mod:`.backends` chooses.
``python -m vis.layers.ms_deform_attn`` says which are there, which one runs and why, and tests each of them.
"""

from __future__ import annotations

from vis.layers.ms_deform_attn.backends import BACKENDS, set_backend
from vis.layers.ms_deform_attn.module import MSDeformAttn
from vis.layers.ms_deform_attn.op import ms_deform_attn

__all__ = ["BACKENDS", "MSDeformAttn", "ms_deform_attn", "set_backend"]
