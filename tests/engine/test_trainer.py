"""What a training writes, says and refuses, on a model of a few numbers."""

from __future__ import annotations

import json
import logging
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage

from vis.checkpoint import read_checkpoint
from vis.engine import load_cfg
from vis.engine.hooks import MetricPrinter
from vis.engine.state import config_changes, last_checkpoint, random_state, random_state_kept
from vis.engine.step import StepNumbers
from vis.engine.trainer import Trainer, evaluate_only


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Whatever a test does to the loggers is undone: the tests of others look at them too."""
    loggers = [logging.getLogger(name) for name in ("vis", "detectron2", "fvcore")]
    before = [(list(item.handlers), item.propagate, item.level) for item in loggers]
    yield
    for item, (handlers, propagate, level) in zip(loggers, before, strict=True):
        item.handlers, item.propagate = handlers, propagate
        item.setLevel(level)


@pytest.fixture
def train(stub_config: Callable[[str], Path]) -> Callable[..., Trainer]:
    """Train with KEY VALUE pairs over the config of the stub; gives the trainer."""

    def run(*opts: str, name: str = "out", resume: bool = False) -> Trainer:
        trainer = Trainer(load_cfg(str(stub_config(name)), opts))
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def tool(project_root: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call tools/train_net.py in this process; gives exit status, stdout, stderr."""
    main = runpy.run_path(str(project_root / "tools" / "train_net.py"))["main"]

    def call(*words: str) -> tuple[int, str, str]:
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = stop.code
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def test_the_folder_of_a_training(train: Callable[..., Trainer], tmp_path: Path) -> None:
    train("SOLVER.MAX_ITER", "43", "SOLVER.CHECKPOINT_PERIOD", "20", "DATASETS.TEST", "['training_stub_test']")
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert {"model_0000019.pth", "model_0000039.pth", "model_final.pth", "last_checkpoint", "metrics.json"} <= names
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert [name for name in names if name.startswith("events.out.tfevents")]
    assert (folder / "inference" / "results.json").is_file()
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [19, 39, 42]
    assert {"total_loss", "loss_colour", "loss_size", "lr", "time", "data_time", "grad_norm", "eta_seconds"} <= lines[
        0
    ].keys()
    assert lines[-1]["total_loss"] < lines[0]["total_loss"], "it learns"
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == 43


def test_the_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage(239) as storage, caplog.at_level("INFO"):
        storage.put_scalars(total_loss=2.5, loss_ce=1.25, time=0.5, data_time=0.125)
        storage.put_scalar("lr", 1e-4, smoothing_hint=False)
        MetricPrinter(max_iter=1000, cuda=False).write()
    record = caplog.records[-1]
    # detectron2's formatter shortens the name in the record, where an earlier test has set it up
    assert record.name.replace("d2.", "detectron2.") == "detectron2.utils.events"
    pattern = (
        r" eta: 0:06:20  iter: 239  total_loss: 2\.5  loss_ce: 1\.25  time: 0\.5000  last_time: 0\.5000  "
        r"data_time: 0\.1250  last_data_time: 0\.1250  lr: 0\.0001  max_mem: \d+M"
    )
    assert re.fullmatch(pattern, record.getMessage())


def test_keeps_the_last_checkpoints(train: Callable[..., Trainer], tmp_path: Path) -> None:
    train("SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.CHECKPOINT_KEEP", "2", "SOLVER.MAX_ITER", "7")
    names = {path.name for path in (tmp_path / "out").glob("model_*")}
    assert names == {"model_0000003.pth", "model_0000005.pth", "model_final.pth"}
    train("SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.CHECKPOINT_KEEP", "2", "SOLVER.MAX_ITER", "8", resume=True)
    names = {path.name for path in (tmp_path / "out").glob("model_*")}
    assert names == {"model_0000005.pth", "model_0000007.pth", "model_final.pth"}, "those of the run before count"


def test_a_loss_that_is_not_finite(train: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match="not finite at iteration 6: loss_colour nan, loss_size [0-9.e-]+"
    ) as caught:
        train("MODEL.STUB.NAN_AT", "6", "DATASETS.TEST", "['training_stub_test']")
    assert re.search(r"videos of the batch: 1[1-5] \(frames \[\d\]\), 1[1-5] ", str(caught.value))
    assert "The last checkpoint before is" in str(caught.value)
    path = last_checkpoint(tmp_path / "out")
    assert path is not None
    assert path.name == "model_0000003.pth"
    assert all(torch.isfinite(value).all() for value in read_checkpoint(path)["model"].values())
    assert not (tmp_path / "out" / "inference").exists(), "a failed training is not evaluated"


def test_what_a_matcher_finds_is_said_with_the_iteration(
    train: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.run_step

    def fail(batch: list[Any]) -> None:
        raise FloatingPointError("3 of 8 matching costs are not finite")

    def run_step(trainer: Trainer) -> None:
        if trainer.iter == 2:
            trainer.model.forward = fail
        step(trainer)

    monkeypatch.setattr(Trainer, "run_step", run_step)
    with pytest.raises(
        FloatingPointError, match=r"at iteration 2, videos of the batch 1\d \(frames .*: 3 of 8 matching"
    ):
        train("SOLVER.MAX_ITER", "4")


def test_amp_on_the_cpu_is_said(train: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        train("SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", "1")
    assert "mixed precision in float16 applies to CUDA only" in caplog.text
    with pytest.raises(ValueError, match="SOLVER.AMP.DTYPE 'float8' is not one of float16, bfloat16"):
        train("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float8")


class Scaled(Trainer):
    """A training with the loss scaler of mixed precision, which torch has for the CPU too."""

    def __init__(self, *args: Any, scale: float) -> None:
        super().__init__(*args)
        self.step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


def test_gradients_are_clipped_after_the_scale_is_taken_out(stub_config: Callable[[str], Path]) -> None:
    """A scale that is a power of two changes no bit of the training."""
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
    clip += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.01"]
    trained = []
    for kind, name in ((Trainer, "plain"), (lambda cfg: Scaled(cfg, scale=2.0**10), "scaled")):
        torch.manual_seed(0)
        trainer = kind(load_cfg(str(stub_config(name)), clip))
        trainer.resume_or_load()
        trainer.train()
        trained.append(trainer)
    for one, other in zip(*(item.module.parameters() for item in trained), strict=True):
        assert torch.equal(one, other)
    assert trained[0].storage.history("grad_norm").latest() == trained[1].storage.history("grad_norm").latest()


def test_a_training_that_is_told_to_stop(
    train: Callable[..., Trainer], stub_config: Callable[[str], Path], tmp_path: Path
) -> None:
    test = ["DATASETS.TEST", "['training_stub_test']", "TEST.EVAL_PERIOD", "3"]
    trainer = Trainer(load_cfg(str(stub_config("out")), test))
    asked: list[int] = []

    def enough(results: Any) -> None:
        asked.append(trainer.iter)
        if len(asked) == 2:
            trainer.stop("nothing is gained any more")

    trainer.after_evaluation.append(enough)
    trainer.resume_or_load()
    trainer.train()
    assert asked == [2, 5], "and none after the training"
    assert read_checkpoint(tmp_path / "out" / "model_final.pth")["iteration"] == 6
    assert train(*test, resume=True).iter == 12, "it can go on"


class Counting:
    """Something with a state of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_parts_are_in_the_checkpoints(stub_config: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    config = load_cfg(str(stub_config("out")), ["SOLVER.MAX_ITER", "1"])
    trainer = Trainer(config)
    trainer.stateful["counting"] = Counting(3)
    trainer.resume_or_load()
    trainer.train()
    trainer = Trainer(config)
    trainer.stateful = {"counting": Counting(0), "other": Counting(5)}
    trainer.resume_or_load(resume=True)
    assert [part.state_dict()["count"] for part in trainer.stateful.values()] == [3, 5]
    assert "no state of other, which starts anew" in caplog.text


def test_a_step_that_the_sentinel_leaves_out(stub_config: Callable[[str], Path]) -> None:
    trainer = Trainer(load_cfg(str(stub_config("out")), ["SOLVER.MAX_ITER", "3", "MODEL.STUB.NAN_AT", "1"]))
    seen = []

    class Skip:
        def examine(self, numbers: StepNumbers) -> bool:
            seen.append((numbers.iteration, numbers.finite()))
            return numbers.finite()

    trainer.step.sentinel = Skip()
    trainer.resume_or_load()
    trainer.train()
    assert seen == [(0, True), (1, False), (2, True)]
    assert all(torch.isfinite(p).all() for p in trainer.module.parameters())


def test_an_overflow_lowers_the_scale_and_goes_on(stub_config: Callable[[str], Path]) -> None:
    scaled = Scaled(load_cfg(str(stub_config("out")), ["SOLVER.MAX_ITER", "1"]), scale=8.0)
    before = {name: p.clone() for name, p in scaled.module.named_parameters()}
    scaled.step.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    scaled.resume_or_load()
    scaled.train()
    assert scaled.step.scaler is not None
    assert scaled.step.scaler.get_scale() == 4.0
    assert all(torch.equal(p, before[name]) for name, p in scaled.module.named_parameters()), "the step is left out"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_on_cuda(train: Callable[..., Trainer], dtype: str) -> None:
    opts = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", dtype]
    first = train(*opts)
    assert (first.step.scaler is not None) == (dtype == "float16")
    assert next(first.module.parameters()).dtype == torch.float32
    second = train(*opts, "SOLVER.MAX_ITER", "20", resume=True)
    assert second.start_iter == 12
    assert all(torch.isfinite(p).all() for p in second.module.parameters())


def test_resume_says_which_weights_it_used(
    train: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("SOLVER.MAX_ITER", "4", name="first")
    weights = str(tmp_path / "first" / "model_final.pth")
    with caplog.at_level("INFO"):
        train("MODEL.WEIGHTS", weights, "SOLVER.MAX_ITER", "4", resume=True)
    assert "no last_checkpoint in" in caplog.text
    assert f"weights: {weights}: 10 tensors loaded" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        train("MODEL.WEIGHTS", weights, "SOLVER.MAX_ITER", "6", resume=True)
    assert re.search(r"--resume continues from .*out/model_final.pth; MODEL.WEIGHTS .*first.* is NOT used", caplog.text)
    assert "4 of 6 iterations are done" in caplog.text
    assert "config differs from that of the checkpoint: SOLVER.MAX_ITER: 4 -> 6" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        train("SOLVER.MAX_ITER", "6", resume=True)
    assert "nothing is left to train" in caplog.text


def test_starting_anew_in_a_used_folder(
    train: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("SOLVER.MAX_ITER", "5")
    with caplog.at_level("WARNING"):
        train("SOLVER.MAX_ITER", "3")
    assert "already holds checkpoints (model_0000003.pth ... model_final.pth) and training starts anew" in caplog.text
    folder = tmp_path / "out"
    assert json.loads((folder / "metrics.json").read_text().splitlines()[-1])["iteration"] == 2
    assert json.loads((folder / "metrics.1.json").read_text().splitlines()[-1])["iteration"] == 4
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == 3


@pytest.mark.parametrize(
    ("pointer", "error", "message"),
    [
        (
            "model_0000099.pth",
            FileNotFoundError,
            "names model_0000099.pth, which is not there .the folder holds model_0000003.pth",
        ),
        ("../secret.pth", ValueError, "expected the name of a checkpoint in the same folder"),
        ("broken.pth", ValueError, "cut off or damaged"),
        ("weights.pth", ValueError, "is not a checkpoint of a training here"),
    ],
)
def test_resume_from_what_is_not_a_checkpoint(
    train: Callable[..., Trainer], tmp_path: Path, pointer: str, error: type[Exception], message: str
) -> None:
    train("SOLVER.MAX_ITER", "4")
    folder = tmp_path / "out"
    (folder / "broken.pth").write_bytes((folder / "model_final.pth").read_bytes()[:2000])
    torch.save({"a": torch.ones(2)}, folder / "weights.pth")
    (folder / "last_checkpoint").write_text(pointer)
    with pytest.raises(error, match=message):
        train(resume=True)


def test_resume_with_another_model(train: Callable[..., Trainer]) -> None:
    train("SOLVER.MAX_ITER", "4")
    with pytest.raises(ValueError, match="of another model than this config describes"):
        train("MODEL.STUB.WIDTH", "6", resume=True)


def test_a_full_disk_stops_the_training_and_keeps_what_was_written(
    train: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("SOLVER.MAX_ITER", "4")
    before = (tmp_path / "out" / "model_final.pth").read_bytes()
    monkeypatch.setattr("vis.checkpoint.atomic.os.getpid", lambda: 4242)
    (tmp_path / "out" / ".model_final.pth.4242.tmp").symlink_to("/dev/full")
    monkeypatch.setattr("vis.engine.trainer.remove_temporary_files", lambda folder: [])
    with pytest.raises(OSError, match="no space left to write .*model_final.pth"):
        train("SOLVER.MAX_ITER", "6", resume=True)
    assert (tmp_path / "out" / "model_final.pth").read_bytes() == before


def test_missing_test_data_are_noticed_before_training(train: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="ytvis_2019_val"):
        train("DATASETS.TEST", "['ytvis_2019_val']", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "40")
    assert not (tmp_path / "out" / "model_final.pth").exists()


def test_evaluation_needs_no_training_data(
    train: Callable[..., Trainer], stub_config: Callable[[str], Path], tmp_path: Path
) -> None:
    train("SOLVER.MAX_ITER", "2")
    config = str(stub_config("evaluated"))
    test = ["DATASETS.TEST", "['training_stub_test']", "DATASETS.TRAIN", "['nowhere']"]
    with pytest.raises(ValueError, match="nothing to evaluate: set MODEL.WEIGHTS"):
        evaluate_only(load_cfg(config, ["DATASETS.TEST", "['training_stub_test']"]))
    with pytest.raises(ValueError, match="DATASETS.TEST is empty"):
        evaluate_only(load_cfg(config))
    opts = [*test[:2], "DATASETS.TRAIN", "[]", "MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    assert evaluate_only(load_cfg(config, opts)) == {}
    assert (tmp_path / "evaluated" / "inference" / "results.json").is_file()
    with pytest.raises(ValueError, match="does not fit this model"):
        evaluate_only(load_cfg(config, [*opts, "MODEL.STUB.WIDTH", "6"]))


def test_random_states_are_kept() -> None:
    state = random_state()
    with random_state_kept():
        torch.rand(3)
    for name, value in random_state()["python"].items():
        assert (
            torch.equal(value, state["python"][name])
            if isinstance(value, torch.Tensor)
            else value == state["python"][name]
        )
    assert torch.equal(random_state()["torch"], state["torch"])


def test_changes_of_the_config() -> None:
    assert config_changes("A: {B: 1, C: [2]}\nD: x", "A: {B: 2, C: [2]}\nE: y") == [
        "A.B: 1 -> 2",
        "D: x -> (absent)",
        "E: (absent) -> y",
    ]


def test_the_tool_trains_and_logs(tool: Callable[..., Any], stub_config: Callable[[str], Path], tmp_path: Path) -> None:
    status, out, _ = tool("--config-file", str(stub_config("tool")), "SOLVER.MAX_ITER", "2", "SEED", "-1")
    assert status == 0
    assert "SEED is negative: using" in out
    log = (tmp_path / "tool" / "log.txt").read_text()
    assert "Saved checkpoint to" in log
    assert "iter: 1  total_loss" in log
    seed = read_checkpoint(tmp_path / "tool" / "model_final.pth")["config"].split("SEED: ")[1].split("\n")[0]
    assert int(seed) >= 0
    _, out, _ = tool("--config-file", str(stub_config("tool")), "--resume", "SOLVER.MAX_ITER", "3", "SEED", "-1")
    assert f"SEED is negative: using {seed}" in out, "a resumed run goes on with the seed of the first"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["--config-file", "{config}", "SOLVER.MAX_ITER", "2", "--resume"],
            2,
            "--resume stands after the KEY VALUE pairs",
        ),
        (["SOLVER.MAX_ITER", "2", "--config-file", "{config}"], 2, "--config-file stands after"),
        (["--config-file", "{config}", "SOLVER.MAX_ITER"], 2, "odd number of words"),
        ([], 2, "--config-file FILE is needed"),
        (["--config-file", "nowhere.yaml"], 1, "'nowhere.yaml' does not exist"),
        (["--config-file", "{config}", "SOLVER.MAX_ITERS", "2"], 1, "Did you mean 'MAX_ITER'"),
        (["--config-file", "{config}", "--num-gpus", "64"], 1, "--num-gpus 64 was asked for"),
        (["--config-file", "{config}", "--eval-only"], 1, "DATASETS.TEST is empty"),
        (["--config-file", "{config}", "MODEL.WEIGHTS", "nowhere.pth"], 1, "weights file nowhere.pth does not exist"),
        (["--config-file", "{config}", "MODEL.STUB.NAN_AT", "0"], 1, "not finite at iteration 0"),
        (["--config-file", "{config}", "OUTPUT_DIR", "{config}"], 1, "a file has that name"),
    ],
)
def test_mistakes_on_the_command_line(
    tool: Callable[..., Any], stub_config: Callable[[str], Path], words: list[str], status: int, message: str
) -> None:
    config = str(stub_config("mistake"))
    found, _, err = tool(*(word.format(config=config) for word in words))
    assert found == status
    assert message in err
    assert "Traceback" not in err


def test_help_has_examples(tool: Callable[..., Any]) -> None:
    status, out, _ = tool("--help")
    assert status == 0
    assert "torchrun --nproc-per-node 8" in out
    assert "--resume OUTPUT_DIR" in out
