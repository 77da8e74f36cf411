"""The folder that a step with numbers that are not finite leaves: written by the training, read by the replay.

    OUTPUT_DIR/nonfinite/iter_0001234/
        report.txt     what was found, in words
        config.yaml    the configuration in full
        rank_0.pth     of each process: its batch, random states, buffers, losses, findings, the worst tensor
        model.pth      the parameters, which are the same in all processes

Every file loads with ``weights_only=True``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vis.checkpoint import read_checkpoint, save_atomic, write_text_atomic
from vis.engine.nonfinite.locate import Finding, Trace
from vis.engine.nonfinite.samples import from_plain, to_plain

FOLDER = "nonfinite"
REPORT, CONFIG, MODEL = "report.txt", "config.yaml", "model.pth"
_FORMAT = 1
# Of the worst tensor so many numbers are kept at most.
_MOST = 2**24


@dataclass
class StepRecord:
    """One process' part of a step that went wrong.

    Attributes:
        batches: those of the step (one, or several whose gradients are added up).
        random: the random state before the step; streams: the random numbers of each batch.
        buffers: name -> those of the model before the step.
        losses, grad_norm, scale: what the step came to, and what its loss was multiplied with.
        dtype: of autocast ("float16", ...), "" for none.
        reason: what the message of the error says of this process; "" where its numbers are finite.
        trace: what running the step again showed.
    """

    iteration: int
    rank: int
    world_size: int
    batches: list[Any]
    random: dict[str, Any]
    streams: list[dict[str, int]]
    buffers: dict[str, Tensor]
    losses: dict[str, float]
    grad_norm: float
    scale: float
    dtype: str
    device: str
    reason: str
    trace: Trace = field(default_factory=Trace)


def folder_of(output_dir: Path, iteration: int) -> Path:
    """Where the dump of an iteration goes."""
    return output_dir / FOLDER / f"iter_{iteration:07d}"


def rank_file(folder: Path, rank: int) -> Path:
    """The file of one process in a dump."""
    return folder / f"rank_{rank}.pth"


def write_record(record: StepRecord, folder: Path) -> None:
    """Write ``rank_<n>.pth``.

    Raises:
        OSError: the file cannot be written.
    """
    worst = record.trace.worst
    save_atomic(
        {
            "format": _FORMAT,
            "batches": to_plain(record.batches),
            **{
                name: getattr(record, name)
                for name in (
                    "iteration",
                    "rank",
                    "world_size",
                    "random",
                    "streams",
                    "losses",
                    "grad_norm",
                    "scale",
                    "dtype",
                )
            },
            "buffers": {name: value.detach().cpu() for name, value in record.buffers.items()},
            "device": record.device,
            "reason": record.reason,
            "findings": [asdict(finding) for finding in record.trace.findings],
            "worst": None if worst is None or worst.numel() > _MOST else worst,
        },
        rank_file(folder, record.rank),
    )


def write_shared(folder: Path, *, config: str, parameters: dict[str, Tensor], report: str) -> None:
    """Write what is the same for all processes: report, configuration, parameters, small files first.

    Raises:
        OSError: a file cannot be written.
    """
    write_text_atomic(report, folder / REPORT)
    write_text_atomic(config, folder / CONFIG)
    save_atomic({"model": parameters}, folder / MODEL)


def read_record(folder: Path, rank: int | None = None) -> StepRecord:
    """The record of one process: ``rank``, or the first one in which something was found.

    Raises:
        FileNotFoundError: there is no dump, or none of this process.
        ValueError: a file is damaged, or of another version.
    """
    files = sorted(folder.glob("rank_*.pth"), key=lambda path: int(path.stem[5:]) if path.stem[5:].isdigit() else -1)
    if rank is not None:
        files = [rank_file(folder, rank)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"{folder} holds no {'rank_*.pth' if rank is None else files[0].name}: expected the folder of a dump, "
            f"OUTPUT_DIR/{FOLDER}/iter_<iteration>"
        )
    records = (_read(file) for file in files)
    first = next(records)
    if rank is not None or first.trace.findings:
        return first
    return next((record for record in records if record.trace.findings), first)


def _read(file: Path) -> StepRecord:
    content = read_checkpoint(file)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{file} is not a dump that this version reads (format {_FORMAT})")
    names = set(StepRecord.__dataclass_fields__) - {"trace", "batches"}
    if lacking := sorted(names - content.keys()):
        raise ValueError(f"{file} lacks {', '.join(lacking)}: it is no dump of a training, or is damaged")
    findings = [Finding(**finding) for finding in content["findings"]]
    return StepRecord(
        batches=from_plain(content["batches"]),
        trace=Trace(findings, content["losses"], content["worst"]),
        **{name: content[name] for name in names},
    )


def report_text(headline: str, records: list[dict[str, Any]], folder: Path) -> str:
    """``report.txt``: the error, then for each process its batch and what was found, then how to replay it.

    Args:
        records: :func:`summary` of every process.
    """
    lines = [headline, ""]
    for record in records:
        lines.append(f"process {record['rank']} of {len(records)}")
        lines += [f"  video {clip}" for clip in record["clips"]]
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in record["losses"].items()) or "none"
        norm = record["grad_norm"]
        lines.append(f"  losses: {numbers}" + ("" if math.isnan(norm) and not record["losses"] else f"; norm {norm:g}"))
        found = record["findings"] or ["nothing that is not finite when the step is run again"]
        lines += [f"  {'first' if index == 0 else 'then'}: {text}" for index, text in enumerate(found)]
        lines.append("")
    return "\n".join([*lines, f"again: python tools/replay_nonfinite.py {folder}", ""])


def summary(record: StepRecord) -> dict[str, Any]:
    """What the report says of a process, without tensors."""
    samples = [sample for batch in record.batches for sample in batch]
    clips = [
        f"{sample.get('video_id')}, frames {sample.get('frame_ids')}: {' '.join(sample.get('file_names', []))}"
        for sample in samples
    ]
    return {
        "rank": record.rank,
        "clips": clips,
        "losses": record.losses,
        "grad_norm": record.grad_norm,
        "findings": list(map(str, record.trace.findings)),
        "reason": record.reason,
    }
