"""Parity with recordings of released models: the same keys, the same outputs, the same losses.

A recording is up to four files: ``M.manifest.json.gz`` (the released state dict and the rule that computes each weight
from its name), ``M.npz`` (outputs for a recorded input), ``M.train.json`` with ``M.train.npz`` (losses of a labelled
clip).

What a model offers:

* ``model.parity_outputs(sample: ClipSample) -> dict[str, Tensor]`` in evaluation mode: every recorded array but the
  three below under its recorded name (``backbone.res2``, ``pred_cls``, ``tracker.pred_logits`` ...), not strided;
* ``model([sample])``: in evaluation mode a ``VideoPrediction``, from which ``scores``, ``labels`` and ``areas`` are
  taken; in training mode the weighted losses.

Of IAI one ``.npz`` file holds all of it, with training steps and single modules: :mod:`vis.engine.parity.iai`.

An array or a loss that cannot be compared is a failure. Nothing is skipped but what ``only`` leaves out on demand
(``left_out`` names it): so a part such as the backbone can be compared with the recording of another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vis.config import CfgNode
from vis.engine.parity import iai
from vis.engine.parity.common import Check, chosen, read_npz
from vis.engine.parity.losses import check_losses, read_losses
from vis.engine.parity.outputs import array_names, check_outputs
from vis.engine.parity.weights import check_state_dict, fill_weights, formula_weight, in_our_names, read_manifest
from vis.layers.linear import torch_products
from vis.modeling.meta_arch import IAI

__all__ = ["Check", "check_parity", "fill_weights", "formula_weight", "left_out", "parity_options", "read_manifest"]


def parity_options(config: CfgNode, losses: str | Path | None) -> list[Any]:
    """``KEY VALUE ...`` under which recordings were made: on the CPU, clips of the recorded length, no dropout.

    Args:
        config: a tree that names the keys (from ``load_cfg``): every DROPOUT, ``*DROP_RATE`` and ``DROP_PATH_RATE`` in
            ``MODEL`` is set to 0.
        losses: the ``.train.json`` file whose clip length holds, or None.
    """
    options: list[Any] = ["MODEL.DEVICE", "cpu"]
    for key in _drop_keys(config.MODEL, "MODEL"):
        options += [key, 0.0]
    if config.MODEL.META_ARCHITECTURE == "IAI":
        options += iai.OPTIONS
    if losses is not None:
        options += ["INPUT.SAMPLING_FRAME_NUM", int(read_losses(losses)["frames"])]
    return options


def _drop_keys(node: CfgNode, path: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _drop_keys(value, f"{path}.{key}")
        elif isinstance(value, float) and (key == "DROPOUT" or key.endswith(("DROP_RATE", "DROP_PATH_RATE"))):
            yield f"{path}.{key}"


def check_parity(
    model: nn.Module,
    manifest_file: str | Path,
    outputs: str | Path | None = None,
    losses: str | Path | None = None,
    *,
    only: Sequence[str] = (),
) -> list[Check]:
    """Everything a recording holds, against a model. Its weights are replaced by the formula's.

    Args:
        only: where given, only keys and arrays that begin with one of these are compared (and filled).

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not of the format, or holds nothing that begins so;
            ``only`` with losses, which no prefix divides.
    """
    if only and losses is not None:
        raise ValueError("losses are those of the whole model: leave out --only, or --losses")
    manifest = in_our_names(model, read_manifest(manifest_file))
    checks = check_state_dict(model, manifest, only)
    if not all(check.ok for check in checks):
        return [*checks, Check("outputs and losses", False, "not compared: the state dicts differ")]
    fill_weights(model, manifest, only)
    if outputs is not None:
        with torch_products():  # the recorded arithmetic: areas are compared to the pixel
            if isinstance(model, IAI):
                checks += iai.replay(model, outputs, lambda: fill_weights(model, manifest), only)
            else:
                checks += check_outputs(model, outputs, only)
    if losses is not None:
        checks += check_losses(model, losses)
    return checks


def left_out(model: nn.Module, manifest_file: str | Path, outputs: str | Path | None, only: Sequence[str]) -> list[str]:
    """What ``only`` leaves uncompared, in words; nothing without it."""
    if not only:
        return []
    manifest = in_our_names(model, read_manifest(manifest_file))
    keys = [name for name in manifest if not chosen(name, only)]
    ours = [name for name in model.state_dict() if not chosen(name, only)]
    lines = [f"{len(keys)} keys of the release and {len(ours)} of the model"]
    if outputs is not None:
        arrays = [name for name in array_names(read_npz(outputs)) if not chosen(name, only)]
        lines.append(f"recorded arrays {', '.join(arrays) or 'none'}")
        lines.append("frames of backbone features beyond those recorded")
    return lines
