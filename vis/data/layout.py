"""How the clips of one update are spread: over processes, and over steps of one process whose gradients are added up.

An iteration is one update of the weights from ``SOLVER.IMS_PER_BATCH`` clips, the effective batch. Its clips have
positions 0, 1, 2 ...; it is cut into parts of equally many, and process r computes the parts r*S to r*S + S - 1 one
after the other. What is in a position does not depend on how many processes and steps there are, so that one process
with eight steps trains on the batches of eight processes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from detectron2.utils import comm

from vis.config import CfgNode, declare

logger = logging.getLogger(__name__)


@declare
def add_config(cfg: CfgNode) -> None:
    # Parts of a batch that a process computes one after the other before the update. 0: as many as are needed for no
    # process to hold more clips at once than one of SOLVER.REFERENCE_WORLD_SIZE processes would (one where that is 0).
    cfg.SOLVER.ACCUMULATE_STEPS = 0


@dataclass(frozen=True)
class BatchLayout:
    """The parts of a batch.

    Attributes:
        clips: of an effective batch.
        world_size: processes; steps: parts of each.
        reference: the number of processes that the batches are made for: clips that one of them would get come from
            one data set and have one orientation.
    """

    clips: int
    world_size: int = 1
    steps: int = 1
    reference: int = 1

    def __post_init__(self) -> None:
        if min(self.clips, self.world_size, self.steps, self.reference) < 1:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {self.clips}, ACCUMULATE_STEPS {self.steps}: expected positive numbers"
            )
        if self.clips % self.parts:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH counts the clips of an update over all processes and steps: {self.clips} cannot "
                f"be divided over {self.world_size} process(es) x {self.steps} step(s). Set it to a multiple of "
                f"{self.parts}, or change SOLVER.ACCUMULATE_STEPS."
            )

    @property
    def parts(self) -> int:
        """Parts of a batch, over all processes."""
        return self.world_size * self.steps

    @property
    def per_part(self) -> int:
        """Clips that a process holds at once."""
        return self.clips // self.parts

    @property
    def group(self) -> int:
        """Neighbouring clips that come from one data set and have one orientation."""
        return _largest_divisor(self.clips, -(-self.clips // self.reference))

    def first_position(self, rank: int, step: int) -> int:
        """Position in the effective batch of the first clip of a part."""
        return (rank * self.steps + step) * self.per_part

    def __str__(self) -> str:
        return (
            f"{self.clips} clips per update = {self.world_size} process{'es' * (self.world_size > 1)} x {self.steps} "
            f"step{'s' * (self.steps > 1)} x {self.per_part} clip{'s' * (self.per_part > 1)}"
        )


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(at_most, 0, -1) if number % divisor == 0)


def batch_layout(cfg: CfgNode, *, world_size: int | None = None, reference: int = 0) -> BatchLayout:
    """The layout that ``SOLVER`` asks for.

    Args:
        world_size: None: that of this job.
        reference: used where ``SOLVER.REFERENCE_WORLD_SIZE`` is 0: that of a training that is resumed. 0: this job's.

    Raises:
        ValueError: the batch cannot be divided.
    """
    solver = cfg.SOLVER
    world_size = comm.get_world_size() if world_size is None else world_size
    if min(solver.REFERENCE_WORLD_SIZE, solver.ACCUMULATE_STEPS) < 0:
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE} and ACCUMULATE_STEPS "
            f"{solver.ACCUMULATE_STEPS} must be 0 (see configs/README.md) or more"
        )
    wanted = solver.REFERENCE_WORLD_SIZE or reference
    steps = solver.ACCUMULATE_STEPS or _steps(solver.IMS_PER_BATCH, world_size, wanted)
    return BatchLayout(solver.IMS_PER_BATCH, world_size, steps, wanted or world_size)


def _steps(clips: int, world_size: int, reference: int) -> int:
    """The fewest steps in which no process holds more clips than one of ``reference`` processes; 1 where that is 0."""
    at_once = -(-clips // reference) if reference else clips
    possible = (
        s for s in range(1, clips + 1) if clips % (world_size * s) == 0 and clips // (world_size * s) <= at_once
    )
    return next(possible, 1)


def log_layout(cfg: CfgNode, layout: BatchLayout) -> None:
    """Say what an iteration is."""
    solver = cfg.SOLVER
    logger.info(
        "Batches: %s. An iteration is one update: %d iterations see %d clips; learning rate %g and schedule are as in "
        "the config, whatever the number of processes",
        *(layout, solver.MAX_ITER, solver.MAX_ITER * layout.clips, solver.BASE_LR),
    )
    if solver.REFERENCE_WORLD_SIZE or layout.reference != layout.world_size:
        logger.info("Batches are those of %d process(es), in any number of processes and steps", layout.reference)
    elif layout.world_size > 1:
        logger.info(
            "SOLVER.REFERENCE_WORLD_SIZE is 0: another number of processes would draw other batches; set it to %d to "
            "repeat this training on fewer GPUs",
            layout.world_size,
        )
