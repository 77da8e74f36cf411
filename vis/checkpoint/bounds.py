"""What a file declares compared with what it has, before memory is reserved for any of it.

A file of some kilobytes can declare terabytes: zip entries that unpack to more, storages that are longer than their
entry, tensors that are longer than their storage, pickle instructions with sizes of their own. ``torch.load`` and
``pickle`` reserve what is declared. The pickles are therefore walked first with stand-ins for everything they name:
nothing is called, sizes are added up.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_MOST_OPCODES = 5_000_000
_LARGEST_PICKLE = 64 * 2**20  # of the pickle beside the data of a torch file; the largest checkpoints have a few MB
_MOST_COMPRESSION = 4.0
_SIZED = {"LONG_BINPUT", "LONG_BINGET"}
_BYTES_OF = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat", "UInt64"), 8),
    **dict.fromkeys(("Float", "Int", "UInt32", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short", "UInt16"), 2),
    "ComplexDouble": 16,
}


class Unbounded(ValueError):
    """The file declares more than it has."""


def check_opcodes(file: IO[bytes], size: int) -> None:
    """Read one pickle's instructions, up to its end, without running them.

    Raises:
        Unbounded: a memo index beyond the file's size, or more instructions than any file of weights has.
        ValueError: it is not a pickle or ends too early.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count > _MOST_OPCODES:
            raise Unbounded(f"its pickle has more than {_MOST_OPCODES} instructions")
        if opcode.name in _SIZED and isinstance(argument, int) and argument > size:
            raise Unbounded(f"its pickle numbers an object {argument} in a file of {size} bytes")


def check_torch_zip(file: Path) -> None:
    """Compare a zip file of ``torch.save`` with itself.

    Raises:
        Unbounded: it declares more than it has.
        ValueError, zipfile.BadZipFile: it is damaged.
    """
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.file_size > _MOST_COMPRESSION * max(entry.compress_size, 256):
                raise Unbounded(
                    f"{entry.filename} in it unpacks from {entry.compress_size} bytes to {entry.file_size}, and "
                    "weights are stored unpacked"
                )
        total = sum(entry.file_size for entry in entries)
        if total > _MOST_COMPRESSION * size:
            raise Unbounded(f"its entries unpack to {total} bytes, the file has {size}")
        lengths = {entry.filename: entry.file_size for entry in entries}
        pickles = [name for name in lengths if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(lengths) < len(entries) or len(pickles) > 1:
            raise Unbounded("it has several entries of one name")
        name = pickles[0]
        if lengths[name] > _LARGEST_PICKLE:
            raise Unbounded(f"{name} in it has {lengths[name]} bytes")
        folder = name.removesuffix("data.pkl")
        content = archive.read(name)
        check_opcodes(io.BytesIO(content), len(content))

        def storage(key: str, nbytes: int) -> None:
            if nbytes > lengths.get(f"{folder}data/{key}", 0):
                raise Unbounded(
                    f"storage {key} in it declares {nbytes} bytes and has {lengths.get(f'{folder}data/{key}', 0)}"
                )

        _Walk(io.BytesIO(content), storage).load()


def check_legacy_torch(file: Path) -> None:
    """The same for files of ``torch.save`` before version 1.6: three small pickles, the content, the bare data.

    Raises:
        Unbounded: it declares more than it has.
        ValueError, pickle.UnpicklingError: it is damaged.
    """
    size = file.stat().st_size
    declared: dict[str, int] = {}

    def storage(key: str, nbytes: int) -> None:
        declared[key] = nbytes
        if sum(declared.values()) > size:
            raise Unbounded(f"its storages declare {sum(declared.values())} bytes, the file has {size}")

    with file.open("rb") as handle:
        for _ in range(4):
            check_opcodes(handle, size)
        handle.seek(0)
        for _ in range(4):
            _Walk(handle, storage).load()


class _Storage:
    """Stands for one storage: its number of elements."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class _Anything:
    """Stands for every object that a pickle names or makes; takes whatever is done to it and does nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __call__(self, *args: Any, **options: Any) -> _Anything:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _StorageType:
    def __init__(self, name: str) -> None:
        self.itemsize = _BYTES_OF.get(name.removesuffix("Storage"), 1)


def _tensor_of(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Anything:
    """In the place of ``torch._utils._rebuild_tensor_v2``."""
    if isinstance(storage, _Storage):
        sizes, steps = [int(n) for n in shape], [int(n) for n in stride]
        if min([*sizes, *steps, int(offset), 0]) < 0 or len(sizes) != len(steps):
            raise Unbounded(f"a tensor in it has shape {sizes} and strides {steps}")
        numel = math.prod(sizes)
        last = int(offset) + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True)) + 1
        if numel and (last > storage.numel or numel > storage.numel):
            raise Unbounded(f"a tensor in it of shape {sizes} reads {max(last, numel)} of {storage.numel} elements")
    return _Anything()


def _no_shape(*args: Any) -> _Anything:
    """In the place of rebuilders that make tensors without a storage."""
    raise Unbounded("a tensor in it has no data (sparse, quantised or without a device)")


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _tensor_of,
    "_rebuild_tensor_v2": _tensor_of,
    "_rebuild_tensor_v3": _tensor_of,
    "_rebuild_sparse_tensor": _no_shape,
    "_rebuild_sparse_csr_tensor": _no_shape,
    "_rebuild_qtensor": _no_shape,
    "_rebuild_meta_tensor_no_storage": _no_shape,
    "_rebuild_nested_tensor": _no_shape,
    "_rebuild_wrapper_subclass": _no_shape,
}


class _Walk(pickle.Unpickler):
    """Unpickles with stand-ins; ``storage(key, bytes)`` is told of every storage."""

    def __init__(self, file: IO[bytes], storage: Callable[[str, int], None]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "torch":
            if module == "torch._utils" and name in _REBUILD:
                return _REBUILD[name]
            if name.endswith("Storage"):
                return _StorageType(name)
        return _Anything

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"a reference {str(pid)[:80]!r} that torch does not write")
        _, kind, key, _, numel = pid[:5]
        count = int(numel)
        if count < 0:
            raise Unbounded(f"storage {key} in it has {count} elements")
        self._storage(str(key), count * getattr(kind, "itemsize", 1))
        return _Storage(count)
