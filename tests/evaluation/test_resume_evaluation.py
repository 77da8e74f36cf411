"""An evaluation that is stopped in any way continues after the last finished video and ends with the same bytes."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from vis.checkpoint import load_weights
from vis.config import CfgNode, get_cfg
from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.engine.trainer import evaluate as evaluate_model
from vis.engine.trainer import evaluate_only
from vis.evaluation import PartWriter, ResultsWriteError, VideoInferenceError, resume
from vis.evaluation.results_writer import part_files, run_key
from vis.evaluation.resume import Identity, identity_of, prepare_parts, weights_hash
from vis.modeling import build_model

NAME = "resume_test_videos"
VIDEOS = 6


# What an evaluation is


@pytest.fixture
def json_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "videos.json"
    path.write_text('{"videos": []}')
    MetadataCatalog.get(NAME).set(json_file=str(path))
    yield path
    MetadataCatalog.pop(NAME)


def changed(*keys: str, value: Any) -> Callable[[CfgNode, nn.Module, Path], None]:
    def change(cfg: CfgNode, model: nn.Module, path: Path) -> None:
        cfg.merge_from_list([keys[0], value])

    return change


def other_weights(cfg: CfgNode, model: nn.Module, path: Path) -> None:
    model.running_mean[1] += 1e-7  # type: ignore[index, operator]


def other_json(cfg: CfgNode, model: nn.Module, path: Path) -> None:
    path.write_text('{"videos": [] }')


def other_import(cfg: CfgNode, model: nn.Module, path: Path) -> None:
    path.with_name("part.py").write_text("WIDTH = 3\n")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (other_weights, "weights: "),
        (other_json, "json: "),
        (other_import, "code: "),
        (changed("INPUT.MIN_SIZE_TEST", value=240), "INPUT.MIN_SIZE_TEST: 800 -> 240"),
        (changed("MODEL.META_ARCHITECTURE", value="VITA"), "MODEL.META_ARCHITECTURE: 'MinVIS' -> 'VITA'"),
        (changed("TEST.DETECTIONS_PER_IMAGE", value=7), "TEST.DETECTIONS_PER_IMAGE: 100 -> 7"),
        (changed("TEST.PREFETCH_FRAMES", value=3), None),
        (changed("TEST.EVAL_PERIOD", value=3), None),
        (changed("MODEL.DEVICE", value="cpu"), None),
        (changed("MODEL.WEIGHTS", value="the/same/elsewhere.pth"), None),
        (changed("SOLVER.BASE_LR", value=3.0), None),
        (changed("OUTPUT_DIR", value="elsewhere"), None),
    ],
)
def test_what_makes_another_evaluation(json_file: Path, change: Callable[..., None], difference: str | None) -> None:
    cfg, model = get_cfg(), nn.BatchNorm1d(3)
    json_file.with_name("part.py").write_text("WIDTH = 2\n")
    cfg.IMPORTS = [str(json_file.with_name("part.py"))]
    before = identity_of(cfg, NAME, model)
    assert before.key == identity_of(cfg, NAME, model).key
    change(cfg, model, json_file)
    after = identity_of(cfg, NAME, model)
    assert (after.key == before.key) == (difference is None)
    found = after.differences(json.loads(json.dumps(before.content())))
    assert len(found) == (difference is not None)
    assert difference is None or found[0].startswith(difference)


def test_the_source_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(any((resume._ROOT / folder).rglob("*.*")) for folder in resume._FOLDERS)
    monkeypatch.setattr(resume, "_ROOT", tmp_path)
    source = tmp_path / "layers" / "deep" / "op.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    first = resume._source_hash()
    (tmp_path / "layers" / "notes.txt").write_text("no source")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "trainer.py").write_text("results do not depend on it")
    assert resume._source_hash() == first
    source.write_text("x = 2\n")
    second = resume._source_hash()
    (tmp_path / "_C.so").write_bytes(b"compiled")
    assert len({first, second, resume._source_hash()}) == 3
    monkeypatch.setattr(resume, "_SOURCE", first)
    assert resume._code_hash([]) != resume._code_hash(["json"])


def test_videos_without_a_json_are_told_apart_by_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"video_id": 3, "height": 4, "width": 5, "length": 1, "file_names": ["a"]}
    monkeypatch.setitem(DatasetCatalog.data, "resume_test_records", lambda: [record])
    first = resume._dataset_hash("resume_test_records")
    record["file_names"] = ["b"]
    assert resume._dataset_hash("resume_test_records") != first


def test_weights_are_compared_by_content() -> None:
    class Model(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((2, 3), number, dtype=torch.bfloat16).t())
            self.register_buffer("count", torch.tensor(4))
            self.register_buffer("nothing", torch.zeros(0))

        def get_extra_state(self) -> Any:
            return {"number": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    assert weights_hash(Model(0.5)) == weights_hash(Model(0.5))
    assert weights_hash(Model(0.5)) != weights_hash(Model(0.25))


# What is kept on disk


IDENTITY = Identity({"weights": "aa", "device": "cpu"}, {"MODEL.X": "1", "MODEL.Y": "2"})


def begun(folder: Path) -> Path:
    """An evaluation with the videos 3 and 7; the folder of its parts."""
    assert prepare_parts(folder, IDENTITY) == frozenset()
    writer = PartWriter(folder, IDENTITY.key)
    for video_id in (7, 3):
        writer.append(video_id, [])
    return folder / "parts"


def test_equal_evaluations_continue(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    (parts / ".video_9.jsonl.12.tmp").write_text("half")
    (tmp_path / ".results.json.12.tmp").write_text("half")
    assert prepare_parts(tmp_path, replace(IDENTITY)) == {3, 7}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["parts", "run.json", "video_3.jsonl", "video_7.jsonl"]
    assert json.loads((parts / "run.json").read_text())["identity"] == IDENTITY.facts


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (Identity({"weights": "bb", "device": "cpu"}, IDENTITY.config), r"\(weights: aa -> bb\)"),
        (Identity(IDENTITY.facts, {"MODEL.X": "3"}), r"\(MODEL.X: 1 -> 3; MODEL.Y: 2 -> None\)"),
        (Identity(IDENTITY.facts, dict.fromkeys("abcdefg", "1")), r"4 more keys of the config\)"),
    ],
)
def test_any_difference_starts_anew(
    tmp_path: Path, identity: Identity, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts = begun(tmp_path)
    caplog.set_level(logging.INFO, logger="vis")
    assert prepare_parts(tmp_path, identity) == frozenset()
    assert len(caplog.records) == 1
    assert re.search("starting anew: the 2 finished videos.*" + reason, caplog.text)
    assert not part_files(parts)
    assert run_key(parts) == identity.key


def test_starting_anew_on_demand(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    (parts / "notes.txt").write_text("mine")
    assert prepare_parts(tmp_path, IDENTITY, resume=False) == frozenset()
    assert sorted(path.name for path in parts.iterdir()) == ["notes.txt", "run.json"]
    begun(tmp_path)
    assert prepare_parts(tmp_path, None) == frozenset()
    assert sorted(path.name for path in parts.iterdir()) == ["notes.txt", "run.json"]
    assert run_key(parts) == ""


@pytest.mark.parametrize("content", ["", "{}", "[]", "garbage", '{"key": "x", "identity": 3}'])
def test_damaged_run_file_starts_anew(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    parts = begun(tmp_path)
    (parts / "run.json").write_text(content)
    caplog.set_level(logging.INFO, logger="vis")
    assert prepare_parts(tmp_path, IDENTITY) == frozenset()
    assert "its run.json does not say of which one" in caplog.text
    assert prepare_parts(begun(tmp_path).parent, IDENTITY) == {3, 7}


def test_lost_run_file_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (begun(tmp_path) / "run.json").unlink()
    caplog.set_level(logging.INFO, logger="vis")
    assert prepare_parts(tmp_path, IDENTITY) == frozenset()
    assert "its run.json does not say of which one" in caplog.text


def test_damaged_and_foreign_parts_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = begun(tmp_path)
    PartWriter(tmp_path, "another").append(5, [])
    (parts / "video_7.jsonl").write_bytes(os.urandom(300))
    assert prepare_parts(tmp_path, IDENTITY) == {3}
    assert "video_7.jsonl is damaged: video 7 is computed again" in caplog.text
    assert "video_5.jsonl is of another evaluation" in caplog.text
    assert list(part_files(parts)) == [3]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsWriteError, match="cannot be prepared.*Nothing was computed yet"):
        prepare_parts(tmp_path / "file", IDENTITY)


# A real model


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the data sets: a few of the embedded videos."""
    root = tmp_path_factory.mktemp("datasets")
    generate("synthetic_ytvis", root, splits=("val",), num_videos={"val": VIDEOS})
    return root


def options(output: Path, *more: str) -> list[str]:
    return ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "2", "OUTPUT_DIR", str(output), *more]


@pytest.fixture
def evaluate(
    datasets: Path, project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Evaluates in this process; returns the folder of the results."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.chdir(project_root)

    def run(name: str, *opts: str) -> Path:
        evaluate_only(load_cfg("configs/demo/minvis_synthetic.yaml", options(tmp_path / name, *opts)))
        return tmp_path / name / "inference"

    return run


def parts_of(folder: Path) -> dict[int, tuple[int, int]]:
    """Finished video -> what changes when its part is written again."""
    found = part_files(folder / "parts").items()
    return {video: (path.stat().st_ino, path.stat().st_mtime_ns) for video, path in found}


def test_a_finished_evaluation_is_not_computed_again(
    evaluate: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = evaluate("out")
    before, results = parts_of(folder), (folder / "results.json").read_bytes()
    assert len(before) == VIDEOS
    (folder / "results.json").unlink()
    caplog.set_level(logging.INFO, logger="vis")
    assert evaluate("out", "TEST.PREFETCH_FRAMES", "0") == folder
    assert f"all {VIDEOS} videos are finished, nothing is computed again" in caplog.text
    assert parts_of(folder) == before
    assert (folder / "results.json").read_bytes() == results
    evaluate("out", "TEST.RESUME", "False")
    assert not parts_of(folder).items() & before.items()
    assert (folder / "results.json").read_bytes() == results
    evaluate("out", "INPUT.MIN_SIZE_TEST", "80")
    assert "INPUT.MIN_SIZE_TEST: 96 -> 80" in caplog.text
    assert (folder / "results.json").read_bytes() != results


def test_evaluations_of_a_training_do_not_mix(
    evaluate: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights of another iteration are other weights; those after the last one are the ones in the file."""
    folder = evaluate("out")
    before = parts_of(folder)
    cfg = load_cfg("configs/demo/minvis_synthetic.yaml", options(tmp_path / "out"))
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    evaluate_model(cfg, model)
    assert parts_of(folder) == before
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    caplog.set_level(logging.INFO, logger="vis")
    evaluate_model(cfg, model)
    assert not parts_of(folder).items() & before.items()
    assert "(weights: " in caplog.text


def test_damaged_frame_and_its_repair(
    evaluate: Callable[..., Path], datasets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = evaluate("whole")
    frame = sorted((datasets / "synthetic_ytvis" / "val" / "JPEGImages").glob("*/*"))[3 * 11 + 5]
    content = frame.read_bytes()
    frame.write_bytes(content[: len(content) // 2])
    try:
        with pytest.raises(
            VideoInferenceError, match=rf"(?s)inference failed on video .*{frame.name}.*evaluating again"
        ):
            evaluate("out")
    finally:
        frame.write_bytes(content)
    before = parts_of(whole.parents[1] / "out" / "inference")
    assert 0 < len(before) < VIDEOS
    caplog.set_level(logging.INFO, logger="vis")
    folder = evaluate("out")
    assert f"continuing: {len(before)} of {VIDEOS} videos are finished" in caplog.text
    assert before.items() <= parts_of(folder).items()
    assert (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_disk_that_is_full_for_a_while(evaluate: Callable[..., Path], tmp_path: Path) -> None:
    whole = evaluate("whole")
    sizes = sorted(path.stat().st_size for path in part_files(whole / "parts").values())
    room = max(sizes[-2], (whole / "parts" / "run.json").stat().st_size)
    assert room < sizes[-1]  # all but the largest fit
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            ResultsWriteError, match=r"video \d+ cannot be written: .*All videos finished so far are kept"
        ):
            evaluate("out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before = parts_of(tmp_path / "out" / "inference")
    folder = evaluate("out")
    assert before.items() <= parts_of(folder).items()
    assert (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()


# Processes that are killed

SERVER = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("train_net", "tools/train_net.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
for line in sys.stdin:
    job = json.loads(line)
    pids = []
    for environment in job["environments"]:
        pids.append(os.fork())
        if not pids[-1]:
            os.environ.update(environment)
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            status = tool.main(job["argv"])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class Tool:
    """Runs ``tools/train_net.py --eval-only`` in processes that start at once: forks of one that has imported it."""

    def __init__(self, datasets: Path, root: Path, folder: Path) -> None:
        self.folder = folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DETECTRON2_DATASETS": str(datasets),
            "PYTHONPATH": str(root),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=root,
            text=True,
        )

    def __call__(
        self, name: str, *, processes: int = 1, kill: Callable[[int], bool] = lambda finished: False
    ) -> list[int]:
        """Evaluate; kill all processes once ``kill(number of finished videos)``. Exit statuses."""
        output = self.folder / name
        argv = ["--eval-only", "--config-file", "configs/demo/minvis_synthetic.yaml", *options(output)]
        ranks = [{} for _ in range(processes)] if processes == 1 else _ranks(processes)
        job = {"environments": ranks, "argv": argv, "log": str(self.folder / f"{name}.log")}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        pids = json.loads(self.server.stdout.readline())
        while Path(f"/proc/{pids[0]}").exists() and Path(f"/proc/{pids[0]}/stat").read_text().split()[2] != "Z":
            if kill(len(part_files(output / "inference" / "parts"))):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        return json.loads(self.server.stdout.readline())


def _ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@pytest.fixture(scope="module")
def tool(datasets: Path, project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tool]:
    tool = Tool(datasets, project_root, tmp_path_factory.mktemp("killed"))
    yield tool
    assert tool.server.stdin is not None
    tool.server.stdin.close()
    tool.server.wait(10)


@pytest.fixture(scope="module")
def reference(tool: Tool) -> bytes:
    """The results of one process that nothing stops."""
    assert tool("through") == [0], (tool.folder / "through.log").read_text()[-3000:]
    return (tool.folder / "through" / "inference" / "results.json").read_bytes()


def random_moment(rng: random.Random, at_least: int) -> Callable[[int], bool]:
    """Some time after a random number of finished videos."""
    wanted = rng.randint(at_least, VIDEOS - 1)
    until: list[float] = []

    def now(finished: int) -> bool:
        if finished >= wanted and not until:
            until.append(time.monotonic() + rng.random() * 0.1)
        return bool(until) and time.monotonic() >= until[0]

    return now


@pytest.mark.slow
def test_killed_at_random_moments(tool: Tool, reference: bytes) -> None:
    """Once killed and continued, five times; nothing that was finished is computed twice."""
    rng = random.Random(3)
    killed = 0
    for attempt in range(5):
        name = f"killed_{attempt}"
        folder = tool.folder / name / "inference"
        killed += tool(name, kill=random_moment(rng, attempt)) == [-signal.SIGKILL]
        before = parts_of(folder)
        assert tool(name) == [0], (tool.folder / f"{name}.log").read_text()[-3000:]
        assert before.items() <= parts_of(folder).items()
        assert (folder / "results.json").read_bytes() == reference
        assert not list(folder.rglob(".*")), "what a killed process left half-written is removed"
        log = (tool.folder / f"{name}.log").read_text()
        assert not before or f"continuing: {len(before)} of {VIDEOS}" in log or f"all {VIDEOS} videos" in log
    assert killed >= 3


@pytest.mark.slow
def test_killed_again_and_again(tool: Tool, reference: bytes) -> None:
    """One evaluation that is killed after each video, by turns one process and two."""
    folder = tool.folder / "often" / "inference"
    before: dict[int, Any] = {}
    for finished in range(1, VIDEOS):
        tool("often", processes=1 + finished % 2, kill=lambda found, finished=finished: found >= finished)  # type: ignore[misc]
        assert before.items() <= parts_of(folder).items()
        before = parts_of(folder)
    assert tool("often") == [0]
    assert (folder / "results.json").read_bytes() == reference


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(tool: Tool, reference: bytes) -> None:
    assert tool("two", processes=2) == [0, 0], (tool.folder / "two.log").read_text()[-3000:]
    assert (tool.folder / "two" / "inference" / "results.json").read_bytes() == reference
    done = [(tool.folder / "two" / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    counts = [int(text.split(" of them here")[0].split()[-1]) for text in done]
    assert sum(counts) == VIDEOS, "no video is computed twice"
    assert min(counts) > 0
