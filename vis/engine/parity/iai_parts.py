"""Single modules of the released IAI: association block, identity bank, id branch, mask branch, dynamic layers."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vis.engine.parity.compared import Comparison
from vis.layers.dynamic_conv import aligned_bilinear, dynamic_convs, relative_axes
from vis.layers.hybrid_association import HybridAssociationLayer, Memory
from vis.modeling.heads.condinst import FEATURE_STRIDE, WIDTHS
from vis.modeling.meta_arch.iai import IAI

BAR = 1e-4


def check_parts(model: IAI, compared: Comparison) -> None:
    """The modules that are recorded, with inputs that are made from their names."""
    recorded = compared.recorded
    for prefix in ("hab.", "hab_b2."):
        if f"{prefix}out" in recorded and compared.wanted(prefix):
            _check_block(model, prefix, compared)
    assert model.association is not None
    if "bank.labels" in recorded and compared.wanted("bank."):
        bank = model.association.id_bank
        labels = torch.from_numpy(recorded["bank.labels"])
        compared.note("bank.labels", True, "input")
        compared.close("bank.out", bank(labels[None]).transpose(0, 1), BAR)
        compared.close("bank.zero", bank.nothing(1, 1)[0], BAR)
    image_model: Any = model.image_model
    if "idhead.out" in recorded and compared.wanted("idhead."):
        head = image_model.proposal_generator.fcos_head
        hidden = head.id_tower(_made(compared, "idhead.in", (2, head.id_logits.in_channels, 16, 24)))
        compared.close("idhead.hidden", hidden, BAR)
        compared.close("idhead.out", head.id_logits(hidden), BAR)
    if "maskbranch.out" in recorded and (compared.wanted("maskbranch.") or compared.wanted("dyn.")):
        channels = image_model.mask_branch.refine[0][0].in_channels
        levels = [_made(compared, f"maskbranch.in.p{3 + i}", (1, channels, 16 >> i, 24 >> i)) for i in range(3)]
        features = image_model.mask_branch(levels)[0]
        compared.close("maskbranch.out", features, BAR)
        if "dyn.points" in recorded:
            _check_dynamic(features, compared)


def _check_block(model: IAI, prefix: str, compared: Comparison) -> None:
    assert model.association is not None
    layer, norm = model.association.layers[0], model.association.norms[0]
    assert isinstance(layer, HybridAssociationLayer)
    dim = model.association.dim
    shape = compared.recorded.get(f"{prefix}out.shape", np.array(compared.recorded[f"{prefix}out"].shape))
    batch, _, height, width = (int(size) for size in shape)
    size = (height, width)
    frames = 3 if batch == 1 else 2
    current, local_keys, local_values = (
        _made(compared, f"{prefix}in.{name}", (batch, dim, *size)).flatten(2).transpose(1, 2)
        for name in ("cur", "local_k", "local_v")
    )
    global_keys, global_values = (
        _made(compared, f"{prefix}in.{name}", (frames * height * width, batch, dim)).transpose(0, 1)
        for name in ("global_k", "global_v")
    )
    id_embeds = _made(compared, f"{prefix}in.id_emb", (height * width, batch, dim)).transpose(0, 1)
    stored, before = Memory(global_keys, global_values), Memory(local_keys, local_values)

    pos = model.association._positions(size, current)
    compared.close(f"{prefix}pos", pos.T.unflatten(1, size)[None], BAR)
    x, normed, keys = layer.look(current, pos)
    values = layer.values(normed, id_embeds)
    hooked: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: hooked.update({name: output}))
        for name, module in (("ffn_act", layer.activation), ("linear2", layer.linear2))
    ]
    out = norm(layer.read(x, keys, stored, before, size))
    for handle in handles:
        handle.remove()
    alone = Memory(keys, values)
    tokens = {
        "cur_k": keys,
        "cur_v": normed,
        "mem_v": values,
        "part.self": layer.self_attn(layer.norm2(current), pos),
        "part.norm1": normed,
        "part.long": layer.long_term_attn(keys, stored),
        "part.short": layer.short_term_attn(keys, before, size),
        "part.ffn_act": hooked["ffn_act"],
        "part.linear2": hooked["linear2"],
        "self_memory.v": values,
    }
    for name, array in tokens.items():
        compared.close(prefix + name, array.transpose(0, 1), BAR)
    weights = layer.short_term_attn.weights(keys, local_keys, size)
    compared.close(f"{prefix}part.short_weights", weights.transpose(2, 3), BAR)
    compared.close(f"{prefix}out", _map(out, size), BAR)
    compared.close(f"{prefix}self_memory.out", _map(norm(layer.read(x, keys, alone, alone, size)), size), BAR)


def _check_dynamic(features: Tensor, compared: Comparison) -> None:
    points, strides = (torch.from_numpy(compared.recorded[f"dyn.{name}"]) for name in ("points", "strides"))
    for name in ("points", "strides"):
        compared.note(f"dyn.{name}", True, "input")
    params = _made(compared, "dyn.in.params", (len(points), 169))
    height, width = features.shape[-2:]
    sizes = (FEATURE_STRIDE * strides)[:, None]
    x, y = (axis / sizes for axis in relative_axes(points, height, width, FEATURE_STRIDE))
    coords = [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)]
    compared.close("dyn.coords", torch.stack(coords, dim=1), BAR)
    logits = dynamic_convs(features, params, x, y, WIDTHS)
    compared.close("dyn.logits", logits, BAR)
    compared.close("dyn.up2", aligned_bilinear(logits, 2), BAR)
    compared.close("dyn.up8", aligned_bilinear(aligned_bilinear(logits, 2).sigmoid(), 4), BAR)


def _map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, size)


def _made(compared: Comparison, name: str, shape: tuple[int, ...]) -> Tensor:
    """An input made from its name; its first values, which are recorded, say how large it is."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    first = compared.recorded[f"check.{name}"]
    begin = noise.reshape(-1)[: len(first)]
    std = np.float32(round(float(first @ begin / np.square(begin).sum()), 4))
    made = noise * std
    same = bool(np.allclose(made.reshape(-1)[: len(first)], first, rtol=1e-5, atol=1e-7))
    compared.note(f"check.{name}", same, f"input of standard deviation {std:g}")
    return torch.from_numpy(made)
