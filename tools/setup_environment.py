"""Sets up what is missing, once; `make demo` and `make test` call it.

    python tools/setup_environment.py [--venv FOLDER]

The environment is the active one ($VIRTUAL_ENV), else `.venv` in the checkout, made if need be. Into it go
requirements.txt as constraints.txt pins it, detectron2 (tools/install_detectron2.py) and vis itself, editable, with
its library vis/_C.so where a C++ compiler is (setup.py says how to build it otherwise).
A stamp in the environment says what it was set up from: while nothing of that changed, nothing is installed.
This file needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INPUTS = (
    "requirements.txt",
    "constraints.txt",
    "setup.py",
    "tools/install_detectron2.py",
    "tools/setup_environment.py",
)
LIBRARY, SOURCES = "vis/_C.so", "vis/csrc"
# What of the environment, and of the machine, changes the library: setup.py reads it.
VARIABLES = ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "VIS_BUILD_CUDA")
COMPILERS = ("c++", "g++", "clang++")
PYTHONS = ((3, 10), (3, 13))  # oldest and newest
STAMP = "vis-setup.stamp"

# What is looked for although the stamp is right: somebody may have uninstalled it. Nothing is imported.
PRESENT = (
    "import importlib.util as u, pathlib, sys\n"
    "vis = u.find_spec('vis')\n"
    "here = vis and vis.origin and pathlib.Path(vis.origin).resolve().parent.parent == pathlib.Path(sys.argv[1])\n"
    "sys.exit(not (here and u.find_spec('torch') and u.find_spec('detectron2')))\n"
)


class SetupError(RuntimeError):
    """Something a user can do something about; the message says what."""


def environment_folder(asked: str | None) -> Path:
    """The environment that is used: asked for, active, or `.venv` of this checkout."""
    return Path(asked or os.environ.get("VIRTUAL_ENV") or ROOT / ".venv").absolute()


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def check_python(version: tuple[int, ...], name: str) -> None:
    """Raises ``SetupError`` for a Python that vis was not made for."""
    oldest, newest = PYTHONS
    if not oldest <= version[:2] <= newest:
        raise SetupError(
            f"{name} is Python {version[0]}.{version[1]}; "
            f"vis needs {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}. "
            "Name another one: make PYTHON=python3.12 setup (and remove .venv if it was made with this one)."
        )


def environment_version(environment: Path) -> tuple[int, ...]:
    """The version of an environment's Python, read from its `pyvenv.cfg` where there is one: no process is started."""
    config = environment / "pyvenv.cfg"
    lines = config.read_text().splitlines() if config.is_file() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    text = values.get("version") or values.get("version_info")
    if not text:
        code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
        text = subprocess.run([python_of(environment), "-c", code], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in text.strip().split(".")[:3])


def fingerprint(version: tuple[int, ...], root: Path = ROOT) -> str:
    """Changes whenever what is installed would change."""
    digest = hashlib.sha256(f"{root} {version}".encode())
    sources = sorted(str(path.relative_to(root)) for path in (root / SOURCES).glob("*.*"))
    for name in (*INPUTS, *sources):
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    machine = [*(os.environ.get(name) for name in VARIABLES), find_compiler(), shutil.which("nvcc"), gpu_is_visible()]
    digest.update(repr(machine).encode())
    return digest.hexdigest()


def find_compiler() -> str | None:
    """Path of the C++ compiler that setup.py would take."""
    asked = os.environ.get("CXX")
    names = (asked.split()[0],) if asked else COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def gpu_is_visible() -> bool:
    return Path("/dev/nvidia0").exists()


def is_current(environment: Path, expected: str) -> bool:
    """True if the environment was set up from the files as they are now and its main parts are still there."""
    stamp = environment / STAMP
    if not stamp.is_file() or stamp.read_text().strip() != expected:
        return False
    if find_compiler() is not None and not (ROOT / LIBRARY).is_file():
        return False
    return subprocess.run([python_of(environment), "-I", "-c", PRESENT, str(ROOT)]).returncode == 0


def _run(what: str, command: list[str | Path]) -> None:
    print(f"-- {what}", flush=True)
    # constraints hold inside pip's build environments too; a relative path, so that a blank in it does not split it
    variables = {**os.environ, "PIP_CONSTRAINT": "constraints.txt", "PIP_BUILD_CONSTRAINT": "constraints.txt"}
    if subprocess.run(command, cwd=ROOT, env=variables).returncode:
        raise SetupError(f"{what}: failed, see above. The command was: {' '.join(map(str, command))}")


def set_up(environment: Path) -> None:
    """Installs everything into an environment that exists."""
    python = python_of(environment)
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    # first what builds the packages that come as sources
    _run("setuptools and wheel", [*pip, "--quiet", "setuptools", "wheel"])
    _run("requirements.txt", [*pip, "--quiet", "-r", "requirements.txt"])
    _run("detectron2", [python, "tools/install_detectron2.py", "--constraint", "constraints.txt"])
    # without what it asks for: opencv-python would overwrite the files of opencv-python-headless
    _run("TrackEval, which tests compare with", [*pip, "--quiet", "--no-deps", "trackeval"])
    _run("vis, editable", [*pip, "--quiet", "--no-build-isolation", "--no-deps", "--editable", "."])
    if not (ROOT / LIBRARY).is_file():
        print(
            f"-- vis._C was not built: no C++ compiler is found ({', '.join(COMPILERS)} or $CXX). "
            "Deformable attention runs on Triton or PyTorch",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", metavar="FOLDER", help="the environment (default: $VIRTUAL_ENV, else .venv)")
    environment = environment_folder(parser.parse_args(argv).venv)
    started = time.monotonic()
    try:
        if not python_of(environment).exists():
            if os.environ.get("VIRTUAL_ENV") and environment == environment_folder(None):
                raise SetupError(
                    f"VIRTUAL_ENV is {environment}, but there is no bin/python in it: deactivate it first."
                )
            check_python(sys.version_info[:3], sys.executable)
            _run(f"new environment in {environment}", [sys.executable, "-m", "venv", environment])
        version = environment_version(environment)
        check_python(version, str(python_of(environment)))
        expected = fingerprint(version)
        if is_current(environment, expected):
            return 0
        with (environment / "vis-setup.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second `make` waits and finds it done
            if not is_current(environment, expected):
                print(
                    f"Setting up {environment}: once; a few minutes, about 6 GB with torch's CUDA libraries", flush=True
                )
                (environment / STAMP).unlink(missing_ok=True)
                set_up(environment)
                (environment / STAMP).write_text(expected + "\n")
                print(f"Set up in {time.monotonic() - started:.0f} s", flush=True)
    except SetupError as error:
        print(f"setup_environment: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
