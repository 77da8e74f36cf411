"""Which samples make up a training batch: a pure function of (seed, world size, rank, iteration); who tests what.

Records are sorted into pools, one per data set and orientation. Every iteration each rank draws a pool and takes the
next records of the pool's endless shuffled stream, so a rank's batch comes from one data set and has one orientation,
ranks never share a record of the same epoch, and within a pool every record is seen once before any is seen twice. The
position is the iteration number and nothing else: going to iteration k counts how often each pool was drawn before,
which takes numpy milliseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from detectron2.utils import comm

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
    """Endless batches of one rank, starting at any iteration.

    Args:
        pools: see :func:`pools_of`.
        total_batch_size: clips over all ranks (SOLVER.IMS_PER_BATCH).
        seed: the same on every rank.
        start_iter: first iteration to give.

    Raises:
        ValueError: the batch does not divide over the ranks.
    """

    def __init__(
        self,
        *,
        pools: Sequence[Pool],
        total_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_iter: int = 0,
    ) -> None:
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH counts the clips over all processes: {total_batch_size} cannot be divided over "
                f"{world_size} process(es). Set it to a multiple of {world_size}."
            )
        if seed < 0 or start_iter < 0:
            raise ValueError(f"seed ({seed}) and start_iter ({start_iter}) must be at least 0.")
        self.pools = list(pools)
        self.batch_size = total_batch_size // world_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_iter = start_iter
        self._edges = np.cumsum([pool.weight for pool in self.pools])
        self._edges[-1] = np.inf  # a sum that ended below 1 by rounding must not leave a gap

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        # Batches taken from each pool before the chunk, over all ranks.
        taken = np.zeros(len(self.pools), dtype=np.int64)
        orders: dict[int, tuple[int, np.ndarray]] = {}
        chunk = 0
        while True:
            drawn = self._drawn_pools(chunk)  # (_CHUNK, world size)
            first = chunk * _CHUNK
            if self.start_iter < first + _CHUNK:
                one_hot = np.cumsum(drawn.reshape(-1)[:, None] == np.arange(len(self.pools)), axis=0)
                for iteration in range(max(first, self.start_iter), first + _CHUNK):
                    position = (iteration - first) * self.world_size + self.rank
                    pool = int(drawn[iteration - first, self.rank])
                    batches_before = int(taken[pool] + one_hot[position, pool] - 1)
                    yield self._batch(iteration, pool, batches_before, orders)
            taken += np.bincount(drawn.reshape(-1), minlength=len(self.pools))
            chunk += 1

    def _drawn_pools(self, chunk: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, _POOL_STREAM, chunk])
        return np.searchsorted(self._edges, rng.random((_CHUNK, self.world_size)), side="right")

    def _batch(
        self, iteration: int, pool: int, batches_before: int, orders: dict[int, tuple[int, np.ndarray]]
    ) -> list[SampleIndex]:
        counter = (iteration * self.world_size + self.rank) * self.batch_size
        result = []
        for item in range(self.batch_size):
            epoch, offset = divmod(batches_before * self.batch_size + item, len(self.pools[pool].records))
            if pool not in orders or orders[pool][0] != epoch:
                rng = np.random.default_rng([self.seed, _ORDER_STREAM, pool, epoch])
                orders[pool] = epoch, rng.permutation(self.pools[pool].records)
            record = int(orders[pool][1][offset])
            result.append(SampleIndex(self.pools[pool].dataset, record, counter + item))
        return result


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
