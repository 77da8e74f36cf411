"""The batch sampler: a pure function of seed, ranks and iteration. Numbers that processes share."""

from __future__ import annotations

import time
from collections import Counter
from itertools import count as count_from
from itertools import islice

import numpy as np
import pytest
from torch.distributed import HashStore, distributed_c10d

from vis.config import get_cfg
from vis.data import samplers
from vis.data.layout import BatchLayout, batch_layout
from vis.data.samplers import ClipBatchSampler, SampleIndex, pools_of, sample_generator, shared_numbers

# (data set, record) of three batches of four clips: of one process from iteration 5 on, of the second of two processes.
OF_ONE = [[(0, 4), (0, 1), (0, 1), (0, 4)], [(1, 3), (1, 4), (1, 3), (1, 4)], [(0, 5), (0, 6), (0, 2), (0, 3)]]
OF_TWO = [[(0, 0), (0, 3)], [(0, 6), (0, 2)], [(0, 4), (0, 1)]]
LANDSCAPE = [[True, False, True, True, False, True, True], [True] * 3 + [False] * 2]


def batches(
    count: int,
    *,
    ratios: tuple[float, ...] = (),
    batch: int = 2,
    seed: int = 7,
    rank: int = 0,
    world_size: int = 1,
    steps: int = 1,
    reference: int = 0,
    start_iter: int = 0,
    landscape: list[list[bool]] | None = None,
) -> list[list[SampleIndex]]:
    sampler = ClipBatchSampler(
        pools=pools_of(LANDSCAPE if landscape is None else landscape, ratios=ratios),
        layout=BatchLayout(batch, world_size, steps, reference or world_size),
        seed=seed,
        rank=rank,
        start_iter=start_iter,
    )
    return list(islice(sampler, count))


@pytest.mark.parametrize("start", [1, 17, 4095, 4096, 5000])
def test_starting_later_gives_the_same_batches(start: int) -> None:
    for rank in range(2):
        whole = batches(start + 20, batch=6, rank=rank, world_size=2, ratios=(1, 0.5))
        assert batches(20, batch=6, rank=rank, world_size=2, ratios=(1, 0.5), start_iter=start) == whole[start:]


def test_seed_decides() -> None:
    assert batches(30) == batches(30)
    assert batches(30) != batches(30, seed=8)


def test_a_batch_has_one_data_set_and_one_orientation() -> None:
    for batch in batches(300, batch=4):
        assert len({(index.dataset, LANDSCAPE[index.dataset][index.record]) for index in batch}) == 1


def test_orientations_mix_when_grouping_is_off() -> None:
    sampler = ClipBatchSampler(pools=pools_of(LANDSCAPE[:1], group_by_orientation=False), layout=BatchLayout(4), seed=0)
    mixed = [len({LANDSCAPE[0][index.record] for index in batch}) for batch in islice(sampler, 30)]
    assert 2 in mixed


@pytest.mark.parametrize("ratios", [(1.0, 0.75), (1.0, 0.0), (3.0, 1.0)])
def test_data_sets_come_with_their_odds(ratios: tuple[float, float]) -> None:
    drawn = Counter(batch[0].dataset for batch in batches(6000, ratios=ratios))
    assert drawn[0] / 6000 == pytest.approx(ratios[0] / sum(ratios), abs=0.025)


def test_without_odds_every_record_is_equally_frequent() -> None:
    drawn = Counter((index.dataset, index.record) for batch in batches(6000) for index in batch)
    assert len(drawn) == 12
    assert min(drawn.values()) > 0.85 * 1000
    assert max(drawn.values()) < 1.15 * 1000


def test_every_record_is_seen_before_any_comes_again() -> None:
    records = [index.record for batch in batches(10, landscape=[[True] * 10], batch=5) for index in batch]
    assert all(sorted(records[at : at + 10]) == list(range(10)) for at in range(0, 50, 10))


def test_ranks_share_the_records_of_an_epoch() -> None:
    ranks = [batches(5, landscape=[[True] * 30], batch=6, rank=rank, world_size=3) for rank in range(3)]
    seen = [index.record for rank in ranks for batch in rank for index in batch]
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize("reference", [1, 2, 4])
def test_positions_hold_the_same_whatever_the_layout(reference: int) -> None:
    """One process in one step, four in one, two in two steps ...: the clips of an iteration, in order."""

    def iterations(world_size: int, steps: int) -> list[list[SampleIndex]]:
        count = 40 * steps
        ranks = [
            batches(count, batch=8, world_size=world_size, steps=steps, reference=reference, rank=rank, start_iter=4090)
            for rank in range(world_size)
        ]
        assert all(len(part) == 8 // (world_size * steps) for parts in ranks for part in parts)
        return [
            [index for parts in ranks for part in parts[at : at + steps] for index in part]
            for at in range(0, count, steps)
        ]

    whole = iterations(1, 1)
    for layout in ((1, 2), (2, 1), (2, 2), (4, 2), (8, 1), (1, 8)):
        assert iterations(*layout) == whole
    size = 8 // reference
    for batch in whole:
        for at in range(0, 8, size):
            shapes = {(i.dataset, LANDSCAPE[i.dataset][i.record]) for i in batch[at : at + size]}
            assert len(shapes) == 1, "what one process of the reference layout gets is of one kind"


def test_batches_of_earlier_versions() -> None:
    """Recorded before positions were independent of the number of processes: trainings go on as they began."""
    of_one = [[(i.dataset, i.record) for i in batch] for batch in batches(3, batch=4, start_iter=5)]
    of_two = [[(i.dataset, i.record) for i in batch] for batch in batches(3, batch=4, rank=1, world_size=2)]
    assert of_one == OF_ONE
    assert of_two == OF_TWO


@pytest.mark.parametrize(
    ("clips", "world_size", "reference", "asked", "steps"),
    [
        (16, 1, 8, 0, 8),
        (16, 2, 8, 0, 4),
        (16, 8, 8, 0, 1),
        (16, 16, 8, 0, 1),
        (24, 6, 8, 0, 2),
        (2, 1, 8, 0, 2),
        (16, 4, 0, 0, 1),
        (16, 4, 0, 2, 2),
        (16, 1, 8, 1, 1),
    ],
)
def test_number_of_steps(clips: int, world_size: int, reference: int, asked: int, steps: int) -> None:
    """As many as it takes to hold no more at once than in the reference layout, or as asked for."""
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = clips, reference
    cfg.SOLVER.ACCUMULATE_STEPS = asked
    layout = batch_layout(cfg, world_size=world_size)
    assert layout.steps == steps
    assert layout.per_part * layout.steps * world_size == clips
    assert layout.reference == (reference or world_size)


def test_a_batch_that_cannot_be_divided_over_the_steps() -> None:
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS = 6, 4
    with pytest.raises(ValueError, match=r"6 cannot be divided over 1 process\(es\) x 4 step.*multiple of 4"):
        batch_layout(cfg)
    cfg.SOLVER.ACCUMULATE_STEPS = -1
    with pytest.raises(ValueError, match="ACCUMULATE_STEPS -1 must be 0"):
        batch_layout(cfg)


def test_counters_number_all_samples() -> None:
    ranks = [batches(50, batch=6, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(index.counter for rank in ranks for batch in rank for index in batch) == list(range(300))


def test_data_set_smaller_than_a_batch() -> None:
    (batch,) = batches(1, landscape=[[True, True]], batch=7)
    assert Counter(index.record for index in batch).most_common(1)[0][1] <= 4
    assert len(batch) == 7


def test_going_far_is_fast() -> None:
    start = time.perf_counter()
    (batch,) = batches(1, batch=32, world_size=8, rank=5, start_iter=400_000)
    assert time.perf_counter() - start < 5
    assert batch[0].counter == (400_000 * 8 + 5) * 4


def test_generators_of_samples_differ() -> None:
    first = [sample_generator(3, counter).random() for counter in range(50)]
    assert len(set(first)) == 50
    assert first == [sample_generator(3, counter).random() for counter in range(50)]
    assert sample_generator(3, 5).random() != sample_generator(4, 5).random()


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        batches(1, batch=4, world_size=3)
    with pytest.raises(ValueError, match="DATASET_RATIO"):
        pools_of(LANDSCAPE, ratios=(1.0,))
    with pytest.raises(ValueError, match="DATASET_RATIO"):
        pools_of(LANDSCAPE, ratios=(0.0, 0.0))
    with pytest.raises(ValueError, match="at least one record"):
        pools_of([[True], []])
    assert [pool.weight for pool in pools_of([[True], [True]], ratios=(1, 3))] == [0.25, 0.75]
    assert np.isclose(sum(pool.weight for pool in pools_of(LANDSCAPE)), 1)


def test_one_process_counts_for_itself() -> None:
    for _ in range(2):
        assert list(islice(shared_numbers(), 4)) == [0, 1, 2, 3]


def test_every_number_goes_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    monkeypatch.setattr(samplers.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    rounds = [count_from(), count_from()]  # of two processes

    def begin(rank: int) -> list[int]:
        monkeypatch.setattr(samplers, "_rounds", rounds[rank])
        numbers = shared_numbers()
        return [next(numbers) for _ in range(3)]

    assert begin(0) == [0, 1, 2]
    assert begin(0) == [0, 1, 2], "another round begins anew"
    assert begin(1) == [3, 4, 5], "the first round goes on"
