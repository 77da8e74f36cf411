"""Files that declare more than they have, or that would run code: refused with a reason, in bounded memory."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vis.checkpoint import load_weights, read_checkpoint, read_weights
from vis.checkpoint.files import NUMBERS_ALLOWED

HUGE = 2**33  # elements: nothing of that size may be reserved


class _Storage:
    def __init__(self, numel: int) -> None:
        self.pid = ("storage", torch.FloatStorage, "0", "cpu", numel)


class _Tensor:
    """Pickled as ``torch.save`` pickles tensors."""

    def __init__(self, numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.arguments = (_Storage(numel), offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle._Pickler):
    def persistent_id(self, item: Any) -> Any:
        return item.pid if isinstance(item, _Storage) else None


def pickled(content: Any) -> bytes:
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump(content)
    return data.getvalue()


def torch_zip(content: bytes, data: bytes = bytes(48), *, compress: bool = False, twice: bool = False) -> bytes:
    """A file of ``torch.save`` with this pickle and this one storage."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def tensor_zip(numel: int, shape: tuple[int, ...], stride: tuple[int, ...], **options: Any) -> bytes:
    offset = options.pop("offset", 0)
    return torch_zip(pickled({"model": {"a": _Tensor(numel, shape, stride, offset)}}), **options)


def legacy(numel: int, shape: tuple[int, ...]) -> bytes:
    """The format before 1.6: magic number, protocol, system, content, keys of the storages, bare data."""
    storage = ("storage", torch.FloatStorage, "0", "cpu", numel, None)
    tensor = _Tensor(numel, shape, (1,))
    tensor.arguments[0].pid = storage
    parts = [pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [pickled({"a": tensor}), pickle.dumps(["0"], 2)]
    return b"".join(parts) + numel.to_bytes(8, "little") + bytes(48)


def safetensors(header: Any, data: bytes = bytes(48), length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


class _EmptyArray:
    """An array that is reserved by its shape alone."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.zeros(1).__reduce__()[0], (np.ndarray, (HUGE,), b"d")


def array_of(kind: str, content: Any = ()) -> bytes:
    return pickle.dumps({"model": {"a": np.array(content, dtype=kind)}})


def saved(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "unpacks to a thousand times": (
        lambda: tensor_zip(2**23, (2**23,), (1,), data=bytes(2**25), compress=True),
        r"archive/data/0 in it unpacks from \d+ bytes to 33554432",
    ),
    "storage longer than its entry": (
        lambda: tensor_zip(HUGE, (12,), (1,)),
        "storage 0 in it declares 34359738368 bytes and has 48",
    ),
    "tensor longer than its storage": (lambda: tensor_zip(12, (HUGE,), (1,)), "reads 8589934592 of 12 elements"),
    "expanded tensor": (lambda: tensor_zip(12, (2**20, 2**13), (0, 0)), "reads 8589934592 of 12 elements"),
    "far stride": (lambda: tensor_zip(12, (2, 2), (HUGE, 1)), "reads 8589934594 of 12 elements"),
    "far offset": (lambda: tensor_zip(12, (2, 2), (2, 1), offset=HUGE), "of 12 elements"),
    "negative stride": (lambda: tensor_zip(12, (2, 2), (-2, 1)), r"strides \[-2, 1\]"),
    "entry twice": (lambda: tensor_zip(12, (12,), (1,), twice=True), "several entries of one name"),
    "many views": (
        lambda: torch_zip(
            pickled({"model": {f"a{i}": _Tensor(2**18, (2**18,), (1,)) for i in range(64)}}), bytes(2**20)
        ),
        "declares 67108864 bytes of tensors and has",
    ),
    "sparse tensor": (
        lambda: saved({"a": torch.ones(3).to_sparse()}),
        "a tensor in it has no data",
    ),
    "tensor without a device": (lambda: saved({"a": torch.empty(HUGE, device="meta")}), "a tensor in it has no data"),
    "legacy storage longer than the file": (lambda: legacy(HUGE, (12,)), "declare 34359738368 bytes, the file has"),
    "legacy tensor longer than its storage": (lambda: legacy(12, (HUGE,)), "reads 8589934592 of 12 elements"),
    "array without content": (lambda: pickle.dumps({"a": _EmptyArray()}), "without content"),
    "array of text": (lambda: array_of("U3", ["abc"]), "a is an array of <U3, expected numbers"),
    "object numbered out of reach": (
        lambda: b"\x80\x02}r\xff\xff\xff\x7f.",
        "numbers an object 2147483647 in a file of 9 bytes",
    ),
    "object numbered out of reach, zip": (
        lambda: torch_zip(b"\x80\x02}r\xff\xff\xff\x7f."),
        "numbers an object 2147483647 in a file of 9 bytes",
    ),
    "text longer than the file": (lambda: b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"abc.", "damaged"),
    "bytes longer than the file": (lambda: b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.", "damaged"),
    "safetensors header longer than the file": (
        lambda: safetensors({"a": entry([12], 0, 48)}, length=2**29),
        "cut off or damaged",
    ),
    "safetensors data longer than the file": (
        lambda: safetensors({"a": entry([HUGE], 0, 4 * HUGE)}),
        "cut off or damaged",
    ),
    "safetensors shape longer than its data": (lambda: safetensors({"a": entry([HUGE], 0, 48)}), "cut off or damaged"),
    "safetensors names that overlap": (
        lambda: safetensors({"a": entry([12], 0, 48), "b": entry([12], 0, 48)}),
        "cut off or damaged",
    ),
}

READER = """
import json, resource, sys
from pathlib import Path
from vis.checkpoint import read_weights
def size(name):
    return int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size("VmSize") + 200 * 2**20, resource.RLIM_INFINITY))
before, found = size("VmHWM"), {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_weights(path)
        found[path.name] = "was read"
    except ValueError as error:
        found[path.name] = str(error)
print(json.dumps({"errors": found, "growth": size("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_memory_stays_bounded(tmp_path: Path, project_root: Path) -> None:
    """All of them in one process that may reserve 200 MiB; the largest file has 1 MiB."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, (make, _) in BOMBS.items():
        (folder / name).write_bytes(make())
    command = [sys.executable, "-c", READER, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=project_root, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    for name, (_, message) in BOMBS.items():
        error = report["errors"][name]
        assert str(folder / name) in error
        assert re.search(message, error), f"{name}: {error}"
    assert report["growth"] < 60 * 2**20


class _Evil:
    """Creates a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("where", ["weights", "optimizer", "key"])
@pytest.mark.parametrize("kind", ["pkl", "zip", "legacy"])
def test_nothing_is_run(where: str, kind: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pth"
    evil = _Evil(mark)
    content: dict[Any, Any] = {"model": {"a": np.ones(2) if kind == "pkl" else torch.ones(2)}}
    if where == "key":
        content[evil] = 1
    else:
        (content["model"] if where == "weights" else content)[where] = evil
    if kind == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match="holds Python objects beside .* and is refused: reading them can run code"):
        read_weights(path)
    if kind != "pkl":
        with pytest.raises(ValueError, match="holds Python objects"):
            read_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pkl", "safetensors"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.97])
def test_files_that_end_too_early(kind: str, kept: float, tmp_path: Path) -> None:
    state = {f"layer{i}.weight": torch.rand(31, 7) for i in range(5)}
    path = tmp_path / "model.pth"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    assert len(read_weights(path).state) == 5
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match="cut off or damaged|is refused") as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_a_file_of_another_model(release: Callable[..., Any], tmp_path: Path) -> None:
    names = [f"model.pixel_level_module.encoder.layer.{i}.weight" for i in range(30)]
    torch.save({name: torch.ones(3) for name in names}, tmp_path / "pytorch_model.bin")
    model = release("minvis_r50").model()
    with pytest.raises(ValueError, match="no known release, stage unknown; 0 of its 558 tensors match") as caught:
        load_weights(model, tmp_path / "pytorch_model.bin")
    assert "558 missing in the file" in str(caught.value)
    assert "30 in the file but not in the model" in str(caught.value)
    assert not any(value.any() for value in model.state_dict().values())


def test_ordinary_files_are_left_alone(tmp_path: Path) -> None:
    """Views, shared tensors, empty ones, every type, non-contiguous ones; a training's other state."""
    base = torch.rand(6, 5)
    state = {"view": base[1:3], "turned": base.t(), "same": base, "empty": torch.zeros(0, 3), "one": torch.tensor(3)}
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64)
    state |= {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    numbers = {"best": np.float64(41.5), "epoch": np.int64(3), "done": np.bool_(True), "lr": np.float32(0.1)}
    content: dict[str, Any] = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}},
        "trainer": [None],
    }
    if NUMBERS_ALLOWED:
        content["numbers"] = numbers
    for new in (True, False):
        torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=new)
        found = read_weights(tmp_path / "model.pth").state
        assert all(torch.equal(found[name], value) for name, value in state.items())


def test_lists_that_hold_one_another(tmp_path: Path) -> None:
    """Sixty lists of two, each twice the one before: a quintillion paths through some hundred bytes."""
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"a": np.ones(3)}, "extra": nested}))
    torch.save({"model": {"a": torch.ones(3)}, "extra": nested}, tmp_path / "w.pth")
    for name in ("w.pkl", "w.pth"):
        assert read_weights(tmp_path / name).state["a"].tolist() == [1, 1, 1]


def test_one_array_under_many_names(tmp_path: Path) -> None:
    array = np.asfortranarray(np.ones((300, 100)))
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({f"a{i}": array for i in range(1000)}))
    with pytest.raises(ValueError, match=r"declares 240000000 bytes of tensors and has \d+: it is refused"):
        read_weights(tmp_path / "w.pkl")
