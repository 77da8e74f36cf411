"""Installs detectron2 where there is none.

    python tools/install_detectron2.py                     # detectron2's Python code: no compiler, any Python 3.10-3.13
    python tools/install_detectron2.py --from PATH_OR_URL  # a compiled one, from a checkout or a git address

detectron2 has no release on the package index. The index does carry its code as another project's wheel,
tagged for Python 3.10 because of one binary (deformable convolution, rotated boxes, a fast COCO evaluation)
that vis does not use. The archive is fetched through pip by its hash, packed again as
``detectron2-0.7.2-py3-none-any.whl`` without the binary, and installed. No line of its code is changed.

A detectron2 that can be imported is left alone. This file needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

NAME, VERSION = "detectron2", "0.7.2"
SOURCE = f"sal-detectron2=={VERSION}"
SOURCE_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
SOURCE_PYTHON = "3.10"  # what the archive is tagged for
WHEEL_NAME = f"{NAME}-{VERSION}-py3-none-any.whl"
DIST_INFO = f"{NAME}-{VERSION}.dist-info"

# `numpy<2` is not true of this code, `dataclasses` is in every supported Python, `black` only prints lazy configs
DROPPED_REQUIREMENTS = {"numpy", "dataclasses", "black"}
# imported by the code, not declared by the archive
ADDED_REQUIREMENTS = ("numpy", "fvcore>=0.1.5.post20221221", "iopath>=0.1.9")

WHEEL_TEXT = (
    "Wheel-Version: 1.0\nGenerator: vis tools/install_detectron2.py\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)
FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever it is packed


class InstallError(RuntimeError):
    """Something a user can do something about; the message says what."""


def find_detectron2() -> tuple[str, str] | None:
    """Version and folder of the detectron2 that this Python imports, None if there is none.

    It is asked in a new process in an empty folder: a checkout lying in the present folder is not an installation.
    """
    code = "import detectron2; print(detectron2.__version__); print(detectron2.__path__[0])"
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True)
    if done.returncode:
        return None
    version, folder = done.stdout.splitlines()[-2:]
    return version, folder


def check_hash(archive: Path) -> None:
    """Raises ``InstallError`` unless the file is the archive that was measured."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise InstallError(f"{archive} has sha256 {found}, expected {SOURCE_SHA256}: not the archive that was tested.")


def rewrite_metadata(text: str) -> str:
    """METADATA of the new wheel: named detectron2, without extras, with requirements that are true of the code."""
    head, blank, body = text.partition("\n\n")
    lines = []
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        if key == "Name":
            line = f"Name: {NAME}"
        elif key == "Summary":
            line = "Summary: Object detection and segmentation (the Python code; its one binary is left out)"
        elif key == "Provides-Extra" or (key == "Requires-Dist" and not _is_kept(value)):
            continue
        lines.append(line)
    lines += [f"Requires-Dist: {requirement}" for requirement in ADDED_REQUIREMENTS]
    return "\n".join(lines) + (blank + body if body else "\n")


def _is_kept(requirement: str) -> bool:
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
    return "extra ==" not in requirement and name not in DROPPED_REQUIREMENTS


def _record_row(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def repack(archive: Path, folder: Path) -> Path:
    """Writes the pure-Python wheel into ``folder`` and returns its path.

    Left out: the binary ``_C``, and a top-level package ``tools`` that would be installed under that common name.
    """
    members: dict[str, bytes] = {}
    with zipfile.ZipFile(archive) as source:
        for name in source.namelist():
            if name.endswith("/"):
                continue
            top, _, rest = name.partition("/")
            if top == NAME and not name.endswith((".so", ".pyd")):
                members[name] = source.read(name)
            elif top.endswith(".dist-info") and rest not in ("RECORD", "WHEEL", "top_level.txt"):
                members[f"{DIST_INFO}/{rest}"] = source.read(name)
    metadata = f"{DIST_INFO}/METADATA"
    if metadata not in members or f"{NAME}/__init__.py" not in members:
        raise InstallError(f"{archive} is not a wheel of detectron2: it has no {NAME}/__init__.py with METADATA.")
    members[metadata] = rewrite_metadata(members[metadata].decode()).encode()
    members[f"{DIST_INFO}/WHEEL"] = WHEEL_TEXT.encode()
    members[f"{DIST_INFO}/top_level.txt"] = f"{NAME}\n".encode()
    rows = [_record_row(name, data) for name, data in members.items()]
    record = f"{DIST_INFO}/RECORD"
    members[record] = "\n".join([*rows, f"{record},,", ""]).encode()

    wheel = folder / WHEEL_NAME
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, FIXED_DATE)
            info.external_attr = 0o644 << 16
            target.writestr(info, data, zipfile.ZIP_DEFLATED)
    return wheel


def _pip(arguments: Iterable[str], failed: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        raise InstallError(f"{failed} The command was: {' '.join(command)}")


def download(folder: Path) -> Path:
    """Fetches the archive through pip, as pip is set up here (mirrors, proxies), by its hash."""
    wanted = folder / "source.txt"
    wanted.write_text(f"{SOURCE} --hash=sha256:{SOURCE_SHA256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--python-version", SOURCE_PYTHON, "--require-hashes", "--quiet"]
    _pip(
        ["download", *options, "-d", str(folder), "-r", str(wanted)],
        f"pip could not fetch {SOURCE}. Without a network: --archive FILE takes that wheel from disk, "
        "--from PATH a checkout of detectron2.",
    )
    return next(folder.glob("*.whl"))


def build_address(source: str) -> str:
    """What pip is given for ``--from``: an existing folder as its absolute path, anything else as a git address."""
    if Path(source).is_dir():
        return str(Path(source).resolve())
    if source.startswith("git+"):
        return source
    if "://" in source:
        return f"git+{source}"
    scp_like = re.fullmatch(r"([\w.-]+@[\w.-]+):(?!/)(.+)", source)  # git@host:owner/name
    if scp_like:
        return f"git+ssh://{scp_like[1]}/{scp_like[2]}"
    raise InstallError(f"--from {source}: no such folder, and not the address of a git repository.")


def install(source: str | None = None, archive: Path | None = None, constraint: Path | None = None) -> str:
    """Installs what is asked for and returns a sentence that says what was done."""
    limits = ["-c", str(constraint)] if constraint else []
    if source is not None:
        address = build_address(source)
        print(f"detectron2: building {address} (minutes; needs the compiler that fits the installed torch)", flush=True)
        # --no-build-isolation: its setup.py compiles against the torch that is installed
        _pip(["install", "--no-build-isolation", "--upgrade", *limits, address], f"{address} could not be installed.")
        did = f"detectron2: installed from {address}"
    else:
        present = find_detectron2()
        if present:
            return f"detectron2: {present[0]} is importable from {present[1]}, left alone"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fetched = archive or download(folder)
            check_hash(fetched)
            wheel = repack(fetched, folder)
            _pip(["install", "--quiet", *limits, str(wheel)], f"{wheel.name} could not be installed.")
        did = f"detectron2: fetched {SOURCE}, packed its Python code as {WHEEL_NAME}, installed it"
    present = find_detectron2()
    if not present:
        raise InstallError(f"{did}; but this Python cannot import it. Try: {sys.executable} -c 'import detectron2'")
    return f"{did} ({present[0]} in {present[1]})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--from", dest="source", metavar="PATH_OR_GIT_URL", help="build and install this detectron2")
    where.add_argument("--archive", type=Path, help=f"the wheel of {SOURCE}, already on disk")
    parser.add_argument("--constraint", type=Path, help="a constraints file for what is installed along with it")
    arguments = parser.parse_args(argv)
    if arguments.archive and not arguments.archive.is_file():
        parser.error(f"--archive {arguments.archive}: no such file")
    try:
        print(install(arguments.source, arguments.archive, arguments.constraint), flush=True)
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
