"""The doctor on a healthy set-up, and on broken ones: each is told what is wrong with it and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from vis.checkpoint import save_weights
from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.engine.doctor import machine, packages, setting
from vis.engine.doctor.__main__ import main
from vis.engine.doctor.findings import BAD, GOOD, NOTE
from vis.engine.doctor.memory import clips, estimate, largest_size, saved_bytes
from vis.layers.ms_deform_attn import backends
from vis.modeling import build_model

SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "MODEL.WEIGHTS", ""]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor_data")
    generate("synthetic_ytvis", str(root), num_videos={"train": 2, "val": 1})
    return root


@pytest.fixture
def folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data set that a test may break."""
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    return tmp_path / "data" / "synthetic_ytvis"


@pytest.fixture
def config(project_root: Path) -> str:
    return str(project_root / "configs" / "demo" / "minvis_synthetic.yaml")


@pytest.fixture
def doctor(
    folder: Path, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run the command on the demo's configuration; gives the exit status and the text."""
    import logging

    level = logging.getLogger("vis").level

    def run(*opts: str, steps: int = 0, file: str = "") -> tuple[int, str]:
        out = ["OUTPUT_DIR", str(tmp_path / "output" / "run")]
        status = main(["--config-file", file or config, "--steps", str(steps), *SMALL, *out, *opts])
        return status, capsys.readouterr().out

    yield run
    logging.getLogger("vis").setLevel(level)


def test_a_healthy_set_up(doctor: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, said = doctor(steps=1)
    assert status == 0, said
    assert "nothing is wrong" in said
    assert "synthetic_ytvis_train: 2 videos" in said
    assert "classes:        6, as in synthetic_ytvis_train, synthetic_ytvis_val" in said
    assert "1 iterations of 2 clips" in said
    assert "GiB per process" in said
    assert not (tmp_path / "output").exists(), "nothing is written"


# Broken set-ups


def test_data_that_are_missing(
    doctor: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    status, said = doctor(steps=1)
    assert status == 1
    assert "synthetic_ytvis_train" in said
    assert "prepare_synthetic.py" in said
    assert "dry steps:      are left out before the data are right" in said


def test_a_json_that_is_cut_off(doctor: Callable[..., tuple[int, str]], folder: Path) -> None:
    text = (folder / "train.json").read_text()
    (folder / "train.json").write_text(text[: len(text) // 2])
    status, said = doctor()
    assert status == 1
    assert "problems in" in said
    assert "train.json" in said
    assert "python tools/check_dataset.py synthetic_ytvis_train" in said


def test_a_json_of_ones_own_that_is_broken(doctor: Callable[..., tuple[int, str]], folder: Path) -> None:
    """The number of classes comes from it, so that the configuration cannot be read before it is mended."""
    (folder / "mine.json").write_text('{"videos": [], "categories": []}')
    custom = [{"NAME": "my_train", "JSON": str(folder / "mine.json"), "ROOT": str(folder)}]
    status, said = doctor("DATASETS.CUSTOM", repr(custom), "DATASETS.TRAIN", "('my_train',)")
    assert status == 1
    assert "ERROR data:" in said
    assert "mine.json" in said
    assert "mend it first" in said


def test_a_frame_that_is_missing(doctor: Callable[..., tuple[int, str]], folder: Path) -> None:
    frame = next((folder / "val" / "JPEGImages").rglob("*.*g"))
    frame.unlink()
    status, said = doctor()
    assert status == 1
    assert frame.name in said


def test_weights_of_another_stage(
    doctor: Callable[..., tuple[int, str]], folder: Path, project_root: Path, tmp_path: Path
) -> None:
    online = load_cfg(str(project_root / "configs/demo/dvis_online_synthetic.yaml"), ["MODEL.DEVICE", "cpu"])
    weights = tmp_path / "dvis_online.pth"
    save_weights(build_model(online).state_dict(), weights)
    status, said = doctor("MODEL.WEIGHTS", str(weights))
    assert status == 1
    assert "found: DVIS, stage dvis_online" in said
    assert "MODEL_ZOO.md says which weights each stage starts from" in said


def test_weights_that_are_missing_or_broken(doctor: Callable[..., tuple[int, str]], config: str, folder: Path) -> None:
    status, said = doctor("MODEL.WEIGHTS", str(folder / "nowhere.pth"))
    assert (status, "does not exist" in said) == (1, True)
    model = build_model(load_cfg(config, ["MODEL.DEVICE", "cpu"]))
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] = float("nan")
    save_weights(model.state_dict(), folder / "nan.pth")
    status, said = doctor("MODEL.WEIGHTS", str(folder / "nan.pth"))
    assert (status, "holds numbers that are not finite" in said) == (1, True)
    status, said = doctor("MODEL.WEIGHTS", "https://example.com/model.pth")
    assert "is fetched when the training starts" in said


def test_an_unknown_key(doctor: Callable[..., tuple[int, str]]) -> None:
    status, said = doctor("MODEL.WEIGHT", "x.pth")
    assert status == 1
    assert "unknown config key MODEL.WEIGHT. Did you mean 'WEIGHTS'?" in said


def test_no_config(doctor: Callable[..., tuple[int, str]]) -> None:
    status, said = doctor(file="nowhere.yaml")
    assert (status, "'nowhere.yaml' does not exist" in said) == (1, True)


def test_no_room_on_the_disk(doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(setting.shutil, "disk_usage", lambda place: usage(10**12, 10**12, 2**20))
    status, said = doctor()
    assert status == 1
    assert "0.0 GiB free for 3 checkpoints" in said
    assert "make room, or choose an OUTPUT_DIR on another disk" in said
    monkeypatch.setattr(setting.shutil, "disk_usage", lambda place: usage(10**12, 10**12, 60 * 2**20))
    status, said = doctor()
    assert status == 0
    assert "SOLVER.CHECKPOINT_KEEP" in said


def test_another_number_of_classes(doctor: Callable[..., tuple[int, str]]) -> None:
    status, said = doctor("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7", steps=1)
    assert status == 1
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 7, synthetic_ytvis_train has 6" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(doctor: Callable[..., tuple[int, str]]) -> None:
    status, said = doctor("MODEL.DEVICE", "cuda")
    assert (status, "MODEL.DEVICE is cuda, and torch finds no GPU" in said) == (1, True)


def test_a_value_that_cannot_be_used(doctor: Callable[..., tuple[int, str]]) -> None:
    status, said = doctor("SOLVER.BASE_LR", "-1.0", steps=1)
    assert (status, "ERROR model:          SOLVER.BASE_LR must be greater than 0" in said) == (1, True)


# Packages, op, GPU


def test_detectron2_and_everything_else_missing(project_root: Path) -> None:
    """In a Python that has nothing installed."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "vis.doctor"],
        cwd=project_root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert not done.stderr
    assert "ERROR detectron2:     is not installed" in done.stdout
    assert "> python tools/install_detectron2.py" in done.stdout
    assert "ERROR torch:          is not installed" in done.stdout


def test_detectron2_alone_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    there = packages._is_there
    monkeypatch.setattr(packages, "_is_there", lambda module: module != "detectron2" and there(module))
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "ERROR detectron2" in said
    assert "1 thing to mend" in said


def test_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    version = packages._version
    monkeypatch.setattr(packages, "_version", lambda name: "1.24.0" if name == "numpy" else version(name))
    found = {finding.what: finding for finding in packages.check_packages()}
    assert (found["numpy"].level, found["numpy"].text) == (BAD, "is 1.24.0, at least 1.26 is needed")
    assert found["Python"].level == GOOD


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.sys, "version_info", (3, 9, 2))
    assert "vis needs 3.10 to 3.13" in packages._python().remedy


def op(backend: str = "auto") -> Any:
    (finding,) = machine.check_op("cpu", backend)
    return finding


@pytest.fixture
def unchosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backends are looked for anew."""
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    yield
    backends.set_backend("auto")


@pytest.mark.usefixtures("unchosen")
def test_an_op_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.library, "problem", lambda device: "vis._C is not built")
    assert (op().level, "slower than compiled: vis._C is not built" in op().remedy) == (NOTE, True)
    asked = op("compiled")
    assert asked.level == BAD
    assert "asks for the backend 'compiled', which is not there: vis._C is not built" in asked.text
    assert "pip install --no-build-isolation -e ." in asked.remedy


@pytest.mark.usefixtures("unchosen")
def test_an_op_for_another_gpu_and_one_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str, device: str) -> tuple[bool, str]:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(machine, "self_test", other)
    assert "is built for other GPUs: CUDA error: no kernel image" in op("torch").text
    monkeypatch.setattr(machine, "self_test", lambda name, device: (False, "self-test FAILED, relative errors 3e-1"))
    assert (op("torch").level, "its results are wrong" in op("torch").remedy) == (BAD, True)
    assert "expected auto, compiled" in op("compild").text


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((12, 0), ["sm_90a", "compute_90"], True),
        ((7, 0), ["sm_75", "compute_75"], False),
    ],
)
def test_kernels_for_a_gpu(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert machine.fits(capability, built) == runs


@pytest.mark.parametrize(("cuda", "said"), [(None, "is built without CUDA"), ("13.0", "cannot use the driver")])
def test_a_driver_that_torch_does_not_fit(cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine, "_driver", lambda: "NVRM version: 535.1")
    (finding,) = machine.check_machine()
    assert (finding.level, said in finding.text) == (BAD, True)
    monkeypatch.setattr(machine, "_driver", lambda: "")
    (finding,) = machine.check_machine()
    assert finding.level == NOTE


# Memory


def test_the_estimate_of_memory(config: str) -> None:
    """At a size that was not tried, of frames that are padded: within a twentieth of what a step of that size keeps."""
    cfg = load_cfg(config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).train()
    found = estimate(cfg, model, context=nullcontext)
    size = (210, 330)
    kept = saved_bytes(model, clips(cfg, model, size, 1), context=nullcontext)
    assert found.activations(1, size) == pytest.approx(kept, rel=0.05)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.state >= 4 * 4 * parameters
    assert found.total(3) == found.state + 3 * found.activations()
    assert found.size == largest_size(cfg) == (96, 192)


@pytest.mark.parametrize(
    "words", [["MODEL.DEVICE", "cpu"], ["--config-file", "c.yaml", "KEY", "--steps"], ["--steps", "-1"]]
)
def test_wrong_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    capsys.readouterr()
