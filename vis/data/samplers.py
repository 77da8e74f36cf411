"""Which samples make up a training batch: a pure function of (seed, iteration, position in the effective batch).

Records are sorted into pools, one per data set and orientation. An effective batch is cut into groups of as many clips
as one process of the reference layout would get (:class:`~vis.data.layout.BatchLayout`); every group draws a pool and
takes the next records of the pool's endless shuffled stream, so it comes from one data set and has one orientation,
groups never share a record of the same epoch, and within a pool every record is seen once before any is seen twice. How
many processes there are, and in how many steps they compute a batch, only decides who computes which positions. The
place in the stream is the iteration number and nothing else: going to iteration k counts how often each pool was drawn
before, which takes numpy milliseconds.

Trainings of earlier versions, in which a group was what one process got, go on with the same batches in the same number
of processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from detectron2.utils import comm

from vis.data.layout import BatchLayout

__all__ = ["ClipBatchSampler", "Pool", "SampleIndex", "pools_of", "sample_generator", "shared_numbers"]

# Independent streams of random numbers of one seed.
_POOL_STREAM, _ORDER_STREAM, _SAMPLE_STREAM = 1, 2, 3
_CHUNK = 4096  # iterations whose pools are drawn at once


def sample_generator(seed: int, counter: int) -> np.random.Generator:
    """The generator of the sample with this global number: the same in any worker, and after resuming."""
    return np.random.default_rng([seed, _SAMPLE_STREAM, counter])


class SampleIndex(NamedTuple):
    """What a mapper needs: which record of which data set, and the global number of the sample."""

    dataset: int
    record: int
    counter: int


@dataclass(frozen=True)
class Pool:
    """Records of one data set and one orientation; ``weight`` is the share of batches that come from it (sum 1)."""

    dataset: int
    records: np.ndarray
    weight: float
    shape: str = ""


def pools_of(
    landscape: Sequence[Sequence[bool]], *, ratios: Sequence[float] = (), group_by_orientation: bool = True
) -> list[Pool]:
    """Sort the records of D data sets into pools.

    Args:
        landscape: for each data set, for each record, whether it is wider than high.
        ratios: odds of the data sets; empty: in proportion to their numbers of records.
        group_by_orientation: keep landscape and portrait apart. Within a data set a pool's weight is its share of
            records.

    Raises:
        ValueError: a data set has no record, or the odds do not fit.
    """
    sizes = [len(flags) for flags in landscape]
    if not sizes or min(sizes) == 0:
        raise ValueError(f"Every training data set needs at least one record, found {sizes} records.")
    odds = np.asarray(ratios if len(ratios) else sizes, dtype=np.float64)
    if len(odds) != len(sizes) or (odds < 0).any() or odds.sum() <= 0:
        raise ValueError(
            f"DATASETS.DATASET_RATIO {list(ratios)} must give one number >= 0 for each of the {len(sizes)} data "
            f"sets of DATASETS.TRAIN, at least one above 0."
        )
    pools = []
    for dataset, (flags, share) in enumerate(zip(landscape, odds / odds.sum(), strict=True)):
        groups = np.asarray(flags, dtype=bool) if group_by_orientation else np.ones(len(flags), dtype=bool)
        for orientation in (True, False):
            records = np.flatnonzero(groups == orientation)
            if len(records) and share > 0:
                shape = ("landscape" if orientation else "portrait") if group_by_orientation else "any"
                pools.append(Pool(dataset, records, share * len(records) / len(groups), shape))
    return pools


class ClipBatchSampler:
    """Endless parts of batches for one process, starting at any iteration; ``layout.steps`` of them are an iteration.

    Args:
        pools: see :func:`pools_of`.
        layout: how batches are spread.
        seed: the same on every rank.
        start_iter: first iteration to give.
    """

    def __init__(
        self, *, pools: Sequence[Pool], layout: BatchLayout, seed: int, rank: int = 0, start_iter: int = 0
    ) -> None:
        if seed < 0 or start_iter < 0:
            raise ValueError(f"seed ({seed}) and start_iter ({start_iter}) must be at least 0.")
        self.pools = list(pools)
        self.layout = layout
        self.seed = seed
        self.rank = rank
        self.start_iter = start_iter
        self._edges = np.cumsum([pool.weight for pool in self.pools])
        self._edges[-1] = np.inf  # a sum that ended below 1 by rounding must not leave a gap
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        groups = self.layout.clips // self.layout.group
        # Groups taken from each pool before the chunk.
        taken = np.zeros(len(self.pools), dtype=np.int64)
        chunk = 0
        while True:
            drawn = self._drawn_pools(chunk, groups)
            first = chunk * _CHUNK
            if self.start_iter < first + _CHUNK:
                flat = drawn.reshape(-1)
                before = taken + np.cumsum(flat[:, None] == np.arange(len(self.pools)), axis=0)
                before = before[np.arange(len(flat)), flat].reshape(drawn.shape) - 1
                for iteration in range(max(first, self.start_iter), first + _CHUNK):
                    yield from self._parts(iteration, drawn[iteration - first], before[iteration - first])
            taken += np.bincount(drawn.reshape(-1), minlength=len(self.pools))
            chunk += 1

    def _drawn_pools(self, chunk: int, groups: int) -> np.ndarray:
        """(_CHUNK, groups) int."""
        rng = np.random.default_rng([self.seed, _POOL_STREAM, chunk])
        return np.searchsorted(self._edges, rng.random((_CHUNK, groups)), side="right")

    def _parts(self, iteration: int, drawn: np.ndarray, before: np.ndarray) -> Iterator[list[SampleIndex]]:
        """This process' parts of one batch.

        Args:
            drawn: (groups,) the pool of each group; before: (groups,) groups that the pool has given already.
        """
        size = self.layout.group
        for step in range(self.layout.steps):
            first = self.layout.first_position(self.rank, step)
            part = []
            for position in range(first, first + self.layout.per_part):
                group, item = divmod(position, size)
                pool = int(drawn[group])
                record = self._record(pool, int(before[group]) * size + item)
                counter = iteration * self.layout.clips + position
                part.append(SampleIndex(self.pools[pool].dataset, record, counter))
            yield part

    def _record(self, pool: int, number: int) -> int:
        """The record at this place of the endless stream of a pool."""
        epoch, offset = divmod(number, len(self.pools[pool].records))
        if pool not in self._orders or self._orders[pool][0] != epoch:
            rng = np.random.default_rng([self.seed, _ORDER_STREAM, pool, epoch])
            self._orders[pool] = epoch, rng.permutation(self.pools[pool].records)
        return int(self._orders[pool][1][offset])


_rounds = itertools.count()


def shared_numbers() -> Iterator[int]:
    """0, 1, 2, ...: every number goes to one process of the job, to the one that asks for it first.

    How long a video takes is known only when it is done (tracks, outlines, a slower GPU), so dealing out videos before
    the start leaves processes waiting for the last one. A counter in the store through which the processes found each
    other needs no file of claims: nothing has to be cleaned up after a process that died with a claim, since the job
    and its counter end with it, and the next job, of any number of processes, counts over the videos that are left.

    Every process must call this equally often: the n-th calls belong together.
    """
    turn = next(_rounds)
    if comm.get_world_size() == 1:
        return itertools.count()
    from torch.distributed import PrefixStore, distributed_c10d  # not in every build of torch

    # torch has no public way to the store of a group that it made itself; another one would need an address of its own.
    store = PrefixStore(f"vis_shared_numbers_{turn}", distributed_c10d._get_default_store())
    return (store.add("drawn", 1) - 1 for _ in itertools.repeat(None))
