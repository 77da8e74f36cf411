"""Runs the step of a dump again, in one process and without its data set, and says where it goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vis.checkpoint import read_checkpoint
from vis.engine.config import load_cfg
from vis.engine.nonfinite.dump import CONFIG, MODEL, StepRecord, read_record
from vis.engine.nonfinite.locate import Trace, trace_step
from vis.engine.precision import autocast
from vis.engine.state import random_state_kept, set_random_state
from vis.layers.item_streams import part_streams
from vis.modeling import build_model

logger = logging.getLogger(__name__)

# A dump holds its batch: neither data sets nor weights are needed beside it.
_WITHOUT_DATA = ("DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "DATASETS.CUSTOM", "[]", "MODEL.WEIGHTS", "")


@dataclass
class Replay:
    """What the training saw and what is seen now."""

    record: StepRecord
    trace: Trace
    device: str

    @property
    def reproduced(self) -> bool:
        """Whether numbers that are not finite come again, and from the same place."""
        before, now = self.record.trace.first, self.trace.first
        if before is None or now is None:
            return before is now
        return (before.kind, before.name) == (now.kind, now.name)

    def lines(self) -> list[str]:
        """In words."""
        record, trace = self.record, self.trace
        lines = [f"iteration {record.iteration}, process {record.rank} of {record.world_size}: {record.reason}", ""]
        lines += ["losses now: " + (", ".join(f"{name} {value:.6g}" for name, value in trace.losses.items()) or "none")]
        lines += [f"{'first' if index == 0 else ' then'}: {found}" for index, found in enumerate(trace.findings)]
        if self.reproduced and trace.first is not None:
            return [*lines, "", "reproduced: the same place comes first as in the training"]
        if self.reproduced:
            return [*lines, "", "as in the training nothing is found in this process: look at the other ranks"]
        before = record.trace.first
        lines += ["", f"NOT reproduced: in the training came first: {before or 'nothing in this process'}"]
        if record.world_size > 1:
            lines.append("(losses are normalised over all processes, of which only one runs here)")
        if not record.device.startswith(self.device):
            lines.append(f"(the training ran on {record.device}, this on {self.device})")
        return lines


def replay(dump: str | Path, *, rank: int | None = None, device: str = "") -> Replay:
    """Run the step of a dump again.

    Args:
        dump: ``OUTPUT_DIR/nonfinite/iter_<iteration>``.
        rank: of which process; None: the first in which something was found.
        device: where to run; "": where the training ran, if there is such a device here, else the CPU.

    Raises:
        FileNotFoundError: it is not a dump.
        ValueError: a file in it is damaged, or of another version of the model.
    """
    folder = Path(dump)
    record = read_record(folder, rank)
    where = device or ("cuda" if record.device.startswith("cuda") and torch.cuda.is_available() else "cpu")
    if not device and not record.device.startswith(where):
        logger.warning("the training ran on %s, which is not here: this runs on the CPU", record.device)
    cfg = load_cfg(str(folder / CONFIG), [*_WITHOUT_DATA, "MODEL.DEVICE", where])
    model = build_model(cfg).train()
    _load(model, record, folder / MODEL)
    tell = getattr(model, "set_iteration", None)
    if tell is not None:
        tell(record.iteration)
    dtype = getattr(torch, record.dtype) if record.dtype in ("float16", "bfloat16") else None
    parts = iter(record.streams)

    @contextmanager
    def context() -> Iterator[None]:
        with part_streams(**next(parts)), autocast(dtype, torch.device(where)):
            yield

    with random_state_kept():
        set_random_state(record.random)
        trace = trace_step(model, record.batches, context=context, scale=record.scale)
    return Replay(record, trace, where)


def _load(model: nn.Module, record: StepRecord, file: Path) -> None:
    state = read_checkpoint(file)["model"]
    own = dict(model.named_parameters())
    if differ := sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape):
        raise ValueError(
            f"{file} is not of the model that {CONFIG} beside it describes here: {', '.join(differ[:5])} differ. Was "
            "the program changed since? Go back to the commit that trained"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
        for name, buffer in model.named_buffers():
            if name in record.buffers:
                buffer.copy_(record.buffers[name])
