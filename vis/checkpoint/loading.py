"""Loading weights into a model: strict, with a report, and errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike

from torch import Tensor, nn

from vis.checkpoint.files import read_weights
from vis.checkpoint.names import CLASS_HEADS, CONSTANTS, backbone_names, modern_names
from vis.config import CfgNode, declare

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    """Parts that may be missing from MODEL.WEIGHTS when training starts."""
    # Prefixes of parameter names, for a stage that starts from the weights of an earlier one (["tracker."]). They keep
    # their initial values. Evaluation never allows anything to be missing.
    cfg.MODEL.WEIGHTS_ALLOW_MISSING = []


@dataclass
class LoadReport:
    """What became of every name.

    Attributes:
        path: the file.
        matched: names loaded.
        remade: class heads whose number of classes differs, as (name, shape in the file, shape in the model): these
            keep the initial values of the model.
        missing: names of the model that the file has not, all of them allowed.
        ignored: names of the file that the model does not need (constants; a classification head beside a backbone).
        backbone_only: the file holds a backbone and nothing else.
    """

    path: str
    matched: list[str] = field(default_factory=list)
    remade: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    backbone_only: bool = False

    def summary(self) -> str:
        """One paragraph for the log."""
        lines = [f"{self.path}: {len(self.matched)} tensors loaded"]
        if self.remade:
            heads = ", ".join(f"{name} {list(found)} -> {list(own)}" for name, found, own in self.remade)
            lines.append(f"made anew, since the number of classes differs, to be trained: {heads}")
        if self.missing:
            why = "the file holds a backbone alone" if self.backbone_only else "missing in the file, as allowed"
            lines.append(f"{why}: {len(self.missing)} others start from initial values ({_groups(self.missing)})")
        if self.ignored:
            lines.append(f"{len(self.ignored)} of the file are not needed ({_groups(self.ignored)})")
        return "; ".join(lines)


def load_weights(model: nn.Module, path: str | PathLike[str], *, allow_missing: Sequence[str] = ()) -> LoadReport:
    """Load the weights of a file into ``model`` in place; values are cast to the types of the model.

    Args:
        path: ``.pth``/``.pt`` (a state dict, or a container with "model"), ``.safetensors``, detectron2 ``.pkl``, or an
            address of one.
        allow_missing: prefixes of names that the file need not have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or its names or shapes are not those of the model, which is then unchanged.
    """
    weights = read_weights(path)
    own = model.state_dict()
    report = LoadReport(str(path), backbone_only=weights.backbone_only)
    state = modern_names(weights.state, own)
    if weights.backbone_only:
        state = backbone_names(state, own)

    wrong_shape = []
    chosen: dict[str, Tensor] = {}
    for name in [key for key in state if key in own]:
        found, wanted = tuple(state[name].shape), tuple(own[name].shape)
        if found == wanted:
            chosen[name] = state[name]
        elif CLASS_HEADS.search(name) and found[1:] == wanted[1:]:
            report.remade.append((name, found, wanted))
        else:
            wrong_shape.append(f"{name}: {list(found)} in the file, {list(wanted)} in the model")

    remade = {name for name, _, _ in report.remade}
    absent = [name for name in own if name not in chosen and name not in remade and name not in state]
    extra = [name for name in state if name not in own]
    report.matched = list(chosen)
    report.missing = [name for name in absent if _may_miss(name, weights.backbone_only, allow_missing)]
    report.ignored = [name for name in extra if weights.backbone_only or CONSTANTS.search(name)]
    problems = [
        *_problem("of another shape", wrong_shape),
        *_problem("missing in the file", sorted(set(absent) - set(report.missing))),
        *_problem("in the file but not in the model", sorted(set(extra) - set(report.ignored))),
    ]
    if weights.backbone_only and 2 * len(chosen) < len(state):
        # The few names that fit by accident ("norm.weight") would load the backbone of another architecture.
        problems += _problem("of a backbone that the model does not have", extra)
    if problems:
        raise ValueError(_advice(report.path, problems, len(chosen), len(own)))
    model.load_state_dict(chosen, strict=False)
    logger.info("weights: %s", report.summary())
    return report


def _may_miss(name: str, backbone_only: bool, allowed: Sequence[str]) -> bool:
    # Counters of batch normalisation steer nothing here and are not in files of older versions.
    return backbone_only or name.endswith("num_batches_tracked") or name.startswith(tuple(allowed))


def _problem(what: str, names: Sequence[str], most: int = 20) -> list[str]:
    if not names:
        return []
    more = f"\n    ... and {len(names) - most} more" if len(names) > most else ""
    return [f"  {len(names)} {what}:\n    " + "\n    ".join(names[:most]) + more]


def _advice(path: str, problems: Iterable[str], matched: int, total: int) -> str:
    return (
        f"{path} does not fit this model ({matched} of its {total} tensors match):\n"
        + "\n".join(problems)
        + "\nUse the weights of this architecture and stage, or the config that these weights were trained with. "
        "To train a stage that starts from an earlier one, name the new parts: "
        "MODEL.WEIGHTS_ALLOW_MISSING \"['tracker.']\""
    )


def _groups(names: Sequence[str]) -> str:
    """Names counted by their first part, or two where all share the first."""
    depth = 2 if len({name.split(".")[0] for name in names}) == 1 else 1
    counts: dict[str, int] = {}
    for name in names:
        head = ".".join(name.split(".")[:depth])
        counts[head] = counts.get(head, 0) + 1
    return ", ".join(f"{head} {count}" for head, count in counts.items())
