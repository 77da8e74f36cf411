"""What a load did, in numbers and words, and what kept a file from being loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vis.checkpoint.class_rows import CopiedRows
from vis.checkpoint.names import grouped


@dataclass
class LoadReport:
    """What became of every name.

    Attributes:
        path: the file.
        source: title of the release that the file is of.
        stage: what it is (:data:`vis.checkpoint.stages.STAGES`), or "unknown".
        matched: names loaded.
        remade: class heads whose classes differ, as (name, shape in the file, shape in the model): these start from
            the initial values of the model, but for the rows in ``rows``.
        rows: per class head, the classes whose rows were copied from the file.
        other_ids: layers whose channels are ids, of which the model has another number: as ``remade``.
        adapted: names whose tensor was brought to another shape (patch kernels).
        missing: names of the model that the file has not, all of them allowed.
        ignored: names of the file that the model does not need (constants; a classification head beside a backbone).
        backbone_only: the file served as a backbone and nothing else.
        note: what one must know about files of this source.
    """

    path: str
    source: str = ""
    stage: str = ""
    matched: list[str] = field(default_factory=list)
    remade: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    rows: list[CopiedRows] = field(default_factory=list)
    other_ids: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    backbone_only: bool = False
    note: str = ""

    def summary(self) -> str:
        """One paragraph for the log."""
        lines = [f"{self.path}: {len(self.matched)} tensors loaded", f"source: {self.source}, stage: {self.stage}"]
        if self.adapted:
            lines.append(f"resized to the model: {', '.join(self.adapted)}")
        if self.remade:
            lines.append(f"made anew, since the classes differ, to be trained: {_shapes(self.remade)}")
        if self.other_ids:
            lines.append(f"made anew, since MODEL.IAI.NUM_IDS differs, to be trained: {_shapes(self.other_ids)}")
        if self.rows:
            copied, new = self.rows[0].copied, self.rows[0].new
            lines.append(
                f"rows of {len(copied)} classes copied by name into {len(self.rows)} of these "
                f"({', '.join(copied) or 'none'}); new: {', '.join(new) or 'none'}"
            )
        if self.missing:
            why = "the file holds a backbone alone" if self.backbone_only else "missing in the file, as allowed"
            lines.append(f"{why}: {len(self.missing)} others start from initial values ({grouped(self.missing)})")
        if self.ignored:
            lines.append(f"{len(self.ignored)} of the file are not needed ({grouped(self.ignored)})")
        if self.note:
            lines.append(f"NOTE: {self.note}")
        return "; ".join(lines)


@dataclass
class Problems:
    """What does not fit: lines that describe it, or names."""

    wrong_shape: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    other_constants: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.wrong_shape or self.missing or self.unexpected or self.other_constants)

    def text(self, report: LoadReport, total: int) -> str:
        """The message of the error, for a model of ``total`` tensors."""
        kinds = (
            ("of another shape", self.wrong_shape),
            ("missing in the file", self.missing),
            (
                "of a backbone that the model does not have"
                if report.backbone_only
                else "in the file but not in the model",
                self.unexpected,
            ),
            ("with other constant values: another variant of this backbone", self.other_constants),
        )
        found = f"found: {report.source}, stage {report.stage}"
        return (
            f"{report.path} does not fit this model ({found}; {len(report.matched)} of its {total} tensors match):\n"
            + "\n".join(_listed(what, names) for what, names in kinds if names)
            + "\nUse the weights of this architecture and stage, or the config that these weights were trained with. "
            "To train a stage that starts from an earlier one, name the new parts: "
            "MODEL.WEIGHTS_ALLOW_MISSING \"['tracker.']\""
        )


def _shapes(remade: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {list(found)} -> {list(own)}" for name, found, own in remade)


def _listed(what: str, names: Sequence[str], most: int = 20) -> str:
    more = f"\n    ... and {len(names) - most} more" if len(names) > most else ""
    return f"  {len(names)} {what}:\n    " + "\n    ".join(names[:most]) + more
