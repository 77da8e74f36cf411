"""A number that is not finite is found where it arises, kept, and found again in what was kept."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from vis.checkpoint import read_checkpoint
from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.engine.nonfinite import replay
from vis.engine.nonfinite.dump import read_record
from vis.engine.nonfinite.samples import from_plain, tensors_in, to_plain
from vis.engine.trainer import Trainer
from vis.modeling.matchers import linear_assignment


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """The log of a test is seen by caplog, whatever set up loggers before."""
    logger = logging.getLogger("vis")
    before = list(logger.handlers), logger.propagate, logger.level
    logger.handlers, logger.propagate = [], True
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture
def stub(stub_config: Callable[[str], Path]) -> Callable[..., Trainer]:
    """A trainer of the stub, ready to train."""

    def make(*opts: str, name: str = "out", resume: bool = False) -> Trainer:
        torch.manual_seed(0)
        trainer = Trainer(load_cfg(str(stub_config(name)), ["SOLVER.MAX_ITER", "5", *opts]))
        trainer.resume_or_load(resume=resume)
        return trainer

    return make


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few videos of the synthetic data set."""
    root = tmp_path_factory.mktemp("demo_data")
    generate("synthetic_ytvis", str(root), num_videos={"train": 2, "val": 1})
    return root


@pytest.fixture
def demo(
    demo_data: Path, tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trainer]:
    """A trainer of the smallest MinVIS."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(demo_data))

    def make(*opts: str) -> Trainer:
        small = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
        small += ["MODEL.WEIGHTS", "", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "demo")]
        torch.manual_seed(0)
        trainer = Trainer(load_cfg(str(project_root / "configs/demo/minvis_synthetic.yaml"), [*small, *opts]))
        trainer.resume_or_load()
        return trainer

    return make


def at(trainer: Trainer, iteration: int, plant: Callable[[Any], Any], part: int = 0) -> None:
    """Let ``plant`` change a part of the batch of one iteration."""
    step = trainer.run_step

    def run_step() -> None:
        if trainer.iter == iteration:
            parts = list(trainer._first if trainer._first is not None else trainer._batches())
            parts[part] = plant(parts[part]) or parts[part]
            trainer._first = parts
        step()

    trainer.run_step = run_step  # type: ignore[method-assign]


def dump_of(folder: Path, iteration: int) -> Path:
    return folder / "nonfinite" / f"iter_{iteration:07d}"


# The three places


def poison(batch: Any) -> Any:
    """A pixel that is no number."""
    frames = [frame.float() for frame in batch[1]["image"]]
    frames[0][1, 2, 3] = math.nan
    batch[1]["image"] = frames
    return batch


def test_nan_in_the_data(stub: Callable[..., Trainer], tmp_path: Path, project_root: Path) -> None:
    trainer = stub()
    at(trainer, 2, poison)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 2") as caught:
        trainer.train()
    dump = dump_of(tmp_path / "out", 2)
    place = r"First of all: data batch[1].image[0]: float32 [3, 32, 48]: 1 NaN, 0 infinite of 4608, the first at [1, 2"
    assert place in str(caught.value)
    assert str(dump) in str(caught.value)
    assert {path.name for path in dump.iterdir()} == {"report.txt", "config.yaml", "rank_0.pth", "model.pth"}
    assert "tools/replay_nonfinite.py" in (dump / "report.txt").read_text()
    record = read_record(dump)
    assert [sample["video_id"] for sample in record.batches[0]]
    assert all(sample["file_names"] for sample in record.batches[0])
    assert record.trace.worst is not None
    assert record.trace.worst.shape == (3, 32, 48)
    again = replay(dump)
    assert again.reproduced
    assert again.trace.first is not None
    assert again.trace.first.name == "batch[1].image[0]"
    main = runpy.run_path(str(project_root / "tools" / "replay_nonfinite.py"))["main"]
    assert main([str(dump)]) == 0
    assert main([str(tmp_path)]) == 2


@pytest.mark.parametrize("kind", ["weight", "output"])
def test_nan_in_a_layer(demo: Callable[..., Trainer], tmp_path: Path, kind: str) -> None:
    """In a weight, and where finite weights overflow: in both cases the innermost module is named."""
    trainer = demo()
    names = dict(trainer.module.named_modules())
    layer = next(name for name in names if name.endswith("decoder_norm"))
    with torch.no_grad():
        names[layer].weight[3] = math.nan if kind == "weight" else 3e38
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    dump = dump_of(tmp_path / "demo", 0)
    first = replay(dump).trace.first
    assert first is not None
    assert (first.kind, first.name == f"{layer}.weight") == (
        ("weights", True) if kind == "weight" else ("module", False)
    )
    modules = [finding for finding in read_record(dump).trace.findings if finding.kind == "module"]
    assert modules
    assert layer.rpartition(".")[0] in modules[0].name
    assert "its input is finite" in modules[0].text
    assert replay(dump).reproduced
    assert modules[0].name in (dump / "report.txt").read_text()
    assert "First of all" in str(caught.value)


def test_nan_in_the_matching_costs(demo: Callable[..., Trainer], tmp_path: Path) -> None:
    """Every output is finite, and large enough that sums over them are not."""
    trainer = demo()
    with torch.no_grad():
        for name, parameter in trainer.module.named_parameters():
            if "mask_embed" in name and name.endswith("2.bias"):
                parameter.fill_(1e37)
    with pytest.raises(FloatingPointError, match=r"at iteration 0.*matching costs are not finite") as caught:
        trainer.train()
    assert "First of all: matching costs" in str(caught.value)
    dump = dump_of(tmp_path / "demo", 0)
    again = replay(dump)
    assert again.reproduced
    assert again.trace.first is not None
    assert again.trace.first.kind == "matching"
    record = read_record(dump)
    assert record.trace.worst is not None
    assert not torch.isfinite(record.trace.worst).all()


def test_nan_in_a_gradient_alone(stub: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = stub()

    def root(part: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + (output * 0).abs().sqrt()  # finite, with a slope that is not

    handle = trainer.module.class_embed.register_forward_hook(root)
    with pytest.raises(FloatingPointError, match="a gradient is not finite at iteration 0"):
        trainer.train()
    handle.remove()
    first = read_record(dump_of(tmp_path / "out", 0)).trace.first
    assert first is not None
    assert first.kind == "gradient"
    assert "the first one on the way back" in first.text
    assert not replay(dump_of(tmp_path / "out", 0)).reproduced, "what is not in the dump does not come again"


def test_nan_in_one_part_of_a_batch(stub: Callable[..., Trainer], tmp_path: Path) -> None:
    """Gradients are added up over two parts: both are kept, each with its random numbers."""
    trainer = stub("SOLVER.ACCUMULATE_STEPS", "2", "SOLVER.IMS_PER_BATCH", "4")
    at(trainer, 1, poison, part=1)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 1"):
        trainer.train()
    dump = dump_of(tmp_path / "out", 1)
    assert [len(batch) for batch in read_record(dump).batches] == [2, 2]
    again = replay(dump)
    assert again.trace.first is not None
    assert again.trace.first.name == "batch[1][1].image[0]"
    assert again.reproduced


# Skipping


def test_a_step_is_left_out_without_a_trace(stub: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    """Neither weights, nor running statistics, nor the moments of the optimizer know of it."""
    trainer = stub("SOLVER.NONFINITE.SKIP", "1")
    kept: dict[str, Any] = {}

    def plant(batch: Any) -> Any:
        kept.update({name: value.clone() for name, value in trainer.module.state_dict().items()})
        kept["moments"] = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
        return poison(batch)

    def compare(batch: Any) -> None:
        for name, value in trainer.module.state_dict().items():
            assert torch.equal(value, kept[name]), name
        for state, before in zip(trainer.optimizer.state.values(), kept["moments"], strict=True):
            assert torch.equal(state["exp_avg"], before)

    at(trainer, 2, plant)
    at(trainer, 3, compare)
    trainer.train()
    assert trainer.iter == 5
    assert trainer.sentinel.state_dict() == {"in_a_row": 0, "total": 1, "dumped": 1}
    assert "Step 2 is left out: no update (1 in a row of SOLVER.NONFINITE.SKIP 1, 1 of SKIP_TOTAL 100)" in caplog.text
    assert all(torch.isfinite(value).all() for value in trainer.module.state_dict().values())


def test_random_numbers_are_those_of_a_run_without_observation(stub: Callable[..., Trainer]) -> None:
    ends = []
    for dumps in ("0", "3"):
        trainer = stub("SOLVER.NONFINITE.SKIP", "1", "SOLVER.NONFINITE.DUMPS", dumps, name=f"dumps{dumps}")
        at(trainer, 2, poison)
        trainer.train()
        ends.append(trainer.module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not (Path(trainer.folder).parent / "dumps0" / "nonfinite").exists()


def test_too_many_in_a_row(stub: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = stub("SOLVER.NONFINITE.SKIP", "1")
    for iteration in (1, 2):
        at(trainer, iteration, poison)
    with pytest.raises(FloatingPointError, match="iteration 2.* 2 steps in a row and 2 altogether were not finite"):
        trainer.train()
    assert dump_of(tmp_path / "out", 1).is_dir()


def test_too_many_altogether_counts_through_a_resume(stub: Callable[..., Trainer]) -> None:
    opts = ["SOLVER.NONFINITE.SKIP", "1", "SOLVER.NONFINITE.SKIP_TOTAL", "1", "SOLVER.CHECKPOINT_PERIOD", "2"]
    trainer = stub(*opts, "SOLVER.MAX_ITER", "2")
    at(trainer, 0, poison)
    trainer.train()
    assert read_checkpoint(trainer.folder / "model_final.pth")["parts"]["nonfinite"]["total"] == 1
    trainer = stub(*opts, resume=True)
    at(trainer, 3, poison)
    with pytest.raises(FloatingPointError, match="1 steps in a row and 2 altogether"):
        trainer.train()


def test_resumed_with_a_step_left_out(stub: Callable[..., Trainer]) -> None:
    """A run that leaves a step out and is resumed before or after it ends with the same weights."""
    opts = ["SOLVER.NONFINITE.SKIP", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
    through = stub(*opts)
    at(through, 2, poison)
    through.train()
    for checkpoint in ("model_0000001.pth", "model_0000002.pth"):
        (through.folder / "last_checkpoint").write_text(checkpoint)
        resumed = stub(*opts, resume=True)
        at(resumed, 2, poison)
        resumed.train()
        for name, value in through.module.state_dict().items():
            assert torch.equal(resumed.module.state_dict()[name], value), (checkpoint, name)


@pytest.mark.parametrize("key", ["SKIP", "SKIP_TOTAL", "DUMPS"])
def test_limits_are_checked(stub: Callable[..., Trainer], key: str) -> None:
    with pytest.raises(ValueError, match="SOLVER.NONFINITE"):
        stub(f"SOLVER.NONFINITE.{key}", "-1")


# Loss scaler


def scaled(trainer: Trainer, scale: float) -> torch.amp.GradScaler:
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer.step.scaler


def test_overflow_under_a_scaler_is_no_error_until_no_scale_helps(stub: Callable[..., Trainer]) -> None:
    trainer = stub("SOLVER.MAX_ITER", "9")
    scaler = scaled(trainer, 4.0)
    trainer.step.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"iteration 3 although the loss scaler has gone down to 0\.5"):
        trainer.train()
    assert scaler.get_scale() == 0.5


def test_a_loss_that_is_nan_is_skipped_under_a_scaler(stub: Callable[..., Trainer]) -> None:
    trainer = stub("SOLVER.NONFINITE.SKIP", "1")
    scaler = scaled(trainer, 8.0)
    at(trainer, 1, poison)
    trainer.train()
    assert trainer.sentinel.total == 1
    assert scaler.get_scale() == 4.0
    assert all(torch.isfinite(value).all() for value in trainer.module.state_dict().values())


# Files


def test_a_full_disk_does_not_hide_the_error(
    stub: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vis.checkpoint.atomic.os.getpid", lambda: 4242)
    dump = dump_of(tmp_path / "out", 1)
    dump.mkdir(parents=True)
    (dump / ".model.pth.4242.tmp").symlink_to("/dev/full")
    trainer = stub()
    at(trainer, 1, poison)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 1"):
        trainer.train()
    assert "could not be kept in" in caplog.text
    assert "no space left to write" in caplog.text


def test_samples_survive() -> None:
    size = (5, 7)
    masks = torch.rand(2, *size) > 0.5
    one = Instances(size, gt_masks=BitMasks(masks), gt_boxes=Boxes(torch.rand(2, 4)), gt_ids=torch.tensor([3, -1]))
    sample = {"image": [torch.ones(3, *size, dtype=torch.uint8)], "instances": [one], "video_id": 4, "note": None}
    back = from_plain(to_plain([sample]))[0]
    assert torch.equal(back["instances"][0].gt_masks.tensor, masks)
    assert torch.equal(back["instances"][0].gt_boxes.tensor, one.gt_boxes.tensor)
    assert back["instances"][0].image_size == size
    assert (back["video_id"], back["note"]) == (4, None)
    places = [place for place, _ in tensors_in([sample], "batch")]
    assert places[0] == "batch[0].image[0]"
    assert "batch[0].instances[0].gt_boxes" in places
    with pytest.raises(ValueError, match="could not keep"):
        from_plain(to_plain({"strange": object()}))


# Two processes


def broken_costs(trainer: Trainer, iteration: int) -> None:
    """A matcher of this process finds what is not finite in one iteration; it does not tell the other one."""
    forward = trainer.module.forward

    def matched(batch: Any) -> Any:
        losses = forward(batch)
        if trainer.iter == iteration:
            linear_assignment(torch.tensor([[0.5, math.inf], [math.nan, 1.0]]))
        return losses

    trainer.module.forward = matched


def _process(rank: int, meeting: str, config: str, skip: str, place: str, queue: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    from detectron2.utils import comm

    comm.create_local_process_group(2)
    opts = ["SOLVER.MAX_ITER", "3", "SOLVER.NONFINITE.SKIP", skip, "SOLVER.IMS_PER_BATCH", "4"]
    torch.manual_seed(0)
    trainer = Trainer(load_cfg(config, opts))
    trainer.resume_or_load()
    if rank == 1 and place == "data":
        at(trainer, 1, poison)
    elif rank == 1:
        broken_costs(trainer, 1)
    try:
        trainer.train()
        error = ""
    except FloatingPointError as caught:
        error = str(caught)
    weights = {name: value.detach().numpy() for name, value in trainer.module.named_parameters()}
    queue.put((rank, error, trainer.sentinel.total, weights))


@pytest.mark.parametrize("skip", ["0", "1"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("data", "process 1: the loss is not finite at iteration 1"),
        ("costs", "process 1: at iteration 1, videos of the batch"),
    ],
)
def test_two_processes_stop_and_skip_together(
    stub_config: Callable[[str], Path], tmp_path: Path, skip: str, place: str, said: str
) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (str(tmp_path / "meeting"), str(stub_config("out")), skip, place, queue)
    processes = [context.Process(target=_process, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted((queue.get(timeout=90) for _ in processes), key=lambda item: item[0])
    for process in processes:
        process.join(10)
    assert [total for _, _, total, _ in results] == [1, 1]
    for _, error, _, _ in results:
        assert (said in error) == (skip == "0")
        assert "process 0:" not in error or place == "data", "a loss that is not finite spoils all gradients"
    first, second = (weights for *_, weights in results)
    assert all((first[name] == second[name]).all() for name in first)
    dump = dump_of(tmp_path / "out", 1)
    assert {path.name for path in dump.glob("rank_*")} == {"rank_0.pth", "rank_1.pth"}
    record = read_record(dump)
    assert record.rank == 1, "the one in which something was found"
    first_place = record.trace.first
    assert first_place is not None
    assert first_place.kind == ("data" if place == "data" else "matching")
    assert replay(dump).reproduced == (place == "data"), "these costs are not of the model"
