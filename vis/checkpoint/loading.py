"""Loading weights into a model: strict, with a report, and errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor, nn

from vis.checkpoint.class_rows import ClassMap, map_rows
from vis.checkpoint.files import WeightFile, read_weights
from vis.checkpoint.names import (
    CONSTANTS,
    ID_CHANNELS,
    INDICES,
    backbone_prefix,
    class_layout,
    is_constant_of_classes,
)
from vis.checkpoint.report import LoadReport, Problems
from vis.checkpoint.sources import Recognised, fit_prefix, recognise, take_backbone
from vis.checkpoint.stages import check_class_heads, check_ids, permitted_missing
from vis.checkpoint.training_parts import left_out, without_training_parts
from vis.config import CfgNode, declare

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    """Parts that may be missing from MODEL.WEIGHTS when training starts."""
    # Prefixes of parameter names, for a stage that starts from the weights of an earlier one (["tracker."]). They keep
    # their initial values. Methods with stages of their own know them; evaluation never allows anything to be missing.
    cfg.MODEL.WEIGHTS_ALLOW_MISSING = []


def load_weights(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    training: bool = True,
    class_map: ClassMap | None = None,
    source: str = "",
) -> LoadReport:
    """Load the weights of a file into ``model`` in place; values are cast to the types of the model.

    The names in the file tell which release it is of (:mod:`vis.checkpoint.sources`), and are mapped to ours.

    Args:
        path: ``.pth``/``.pt`` (a state dict, or a container with "model"), ``.safetensors``, detectron2 ``.pkl``, or an
            address of one: ``https://``, ``detectron2://``, ``hf://owner/repository/path/in/it``.
        allow_missing: prefixes of names that the file need not have (in training).
        training: a training starts from the file: the file may lack what ``WEIGHT_STAGES`` of the model says, or
            everything but a backbone, and class heads may start anew. Otherwise all of that is an error.
        class_map: how class heads of other classes start; None: from initial values.
        source: the file is of this source (a name in ``vis.checkpoint.sources.SOURCES``); "": its names tell.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is of a wrong stage, or its names or shapes are not those of the model,
            which is then unchanged.
    """
    weights = read_weights(path)
    return load_state(
        *(model, weights, str(path)),
        allow_missing=allow_missing,
        training=training,
        class_map=class_map,
        source=source,
    )


def load_state(
    model: nn.Module,
    weights: WeightFile,
    path: str,
    *,
    allow_missing: Sequence[str] = (),
    training: bool = True,
    class_map: ClassMap | None = None,
    source: str = "",
) -> LoadReport:
    """:func:`load_weights` of a file that has been read; ``path`` is what messages call it."""
    own = model.state_dict()
    try:
        file = recognise(weights.state, backbone_only=weights.backbone_only, name=source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    file = fit_prefix(file, own)
    if file.source.part and not _beside(file, own):
        file = take_backbone(file)
    file, unneeded = without_training_parts(file, own)
    if unneeded:
        logger.info("weights: %s", left_out(path, unneeded))
    permitted = permitted_missing(model, file, path, training=training, allow_missing=allow_missing)
    report = LoadReport(path, file.source.title, file.stage, note=file.source.note)
    loader = _Loader(own, file, report, training=training)
    loader.sort(permitted, class_map)
    if loader.problems:
        raise ValueError(loader.problems.text(report, len(own)))
    remade = {name: (found[0], wanted[0]) for name, found, wanted in report.remade}
    check_class_heads(model, file, path, remade, training=training)
    check_ids(path, report.other_ids, training=training)
    model.load_state_dict(loader.chosen, strict=False)
    logger.info("weights: %s", report.summary())
    if report.note:
        logger.warning("%s is %s: %s", path, file.source.title, report.note)
    return report


def _beside(file: Recognised, own: Mapping[str, Tensor]) -> list[str]:
    """What a model has of a file beside the file's backbone."""
    return [name for name in file.state if name in own and not name.startswith(file.source.part)]


class _Loader:
    """Sorts the names of one file and one model into what is loaded, what may differ and what is wrong."""

    def __init__(self, own: Mapping[str, Tensor], file: Recognised, report: LoadReport, *, training: bool) -> None:
        self.own, self.file, self.report, self.training = own, file, report, training
        self.chosen: dict[str, Tensor] = {}
        self.problems = Problems()
        report.backbone_only = file.backbone
        report.ignored = list(file.dropped)
        self.prefix = ""
        if file.backbone:
            # names that have a backbone's prefix already stay as they are
            bare = [name for name in file.state if name not in own]
            self.prefix = backbone_prefix(bare, own) or ""
        self.state = {name if name in own else self.prefix + name: value for name, value in file.state.items()}

    def sort(self, permitted: Sequence[str], class_map: ClassMap | None) -> None:
        """Fill ``chosen``, ``report`` and ``problems``."""
        for name, value in self.state.items():
            if name in self.own:
                self._place(name, value, self.own[name], class_map)
            elif CONSTANTS.search(name) or self._unneeded(name):
                self.report.ignored.append(name)
            else:
                self.problems.unexpected.append(name)
        loaded = {self.own[name].data_ptr() for name in self.chosen} - {0}
        for name, value in self.own.items():
            # a parameter that the model has under two names is loaded with the other
            if name not in self.state and value.data_ptr() not in loaded:
                allowed = self._may_miss(name, permitted)
                (self.report.missing if allowed else self.problems.missing).append(name)
        # counters of normalisation and tables of indices are no news
        self.report.missing = [name for name in self.report.missing if not CONSTANTS.search(name)]
        self.report.matched = list(self.chosen)

    def _place(self, name: str, value: Tensor, own: Tensor, class_map: ClassMap | None) -> None:
        found, wanted = tuple(value.shape), tuple(own.shape)
        if INDICES.search(name):
            # some files have the table as a vector
            same = value.numel() == own.numel() and torch.equal(value.reshape(wanted).to(own), own)
            if same:
                self.chosen[name] = value.reshape(wanted)
            else:
                self.problems.other_constants.append(name)
            return
        layout = class_layout(name, self.file.source.no_object) if found[1:] == wanted[1:] else None
        if layout is not None and class_map is not None and not is_constant_of_classes(name):
            mapped = map_rows(name, value, own, class_map, layout)
            if mapped is not None:
                self.chosen[name], rows = mapped
                self.report.rows.append(rows)
                self.report.remade.append((name, found, wanted))
                return
        if found == wanted:
            self.chosen[name] = value
        elif layout is not None:
            self.report.remade.append((name, found, wanted))
        elif ID_CHANNELS.search(name) and len(found) == len(wanted):
            self.report.other_ids.append((name, found, wanted))
        elif (adapted := self._adapted(name, value, wanted)) is not None:
            self.chosen[name] = adapted
            self.report.adapted.append(name)
        else:
            self.problems.wrong_shape.append(f"{name}: {list(found)} in the file, {list(wanted)} in the model")

    def _adapted(self, name: str, value: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
        adapt = self.file.source.adapt
        return None if adapt is None else adapt(name, value, wanted)

    def _optional(self, name: str) -> bool:
        pattern = self.file.source.may_miss
        return pattern is not None and pattern.search(name.removeprefix(self.prefix)) is not None

    def _unneeded(self, name: str) -> bool:
        """Whether a name of the file may be one that the model does not have."""
        source = self.file.source
        patterns = [source.aliases, source.start_only if self.training else None]
        unneeded = any(pattern is not None and pattern.search(name) for pattern in patterns)
        return unneeded or (self.file.backbone and self._optional(name))

    def _may_miss(self, name: str, permitted: Sequence[str]) -> bool:
        if CONSTANTS.search(name) or name.startswith(tuple(permitted)):
            return True
        if not self.file.backbone:
            return False
        return self._outside(name) or self._optional(name)

    def _outside(self, name: str) -> bool:
        """Whether a name is outside the backbone that the file is of."""
        return bool(self.prefix) and not name.startswith(self.prefix)
