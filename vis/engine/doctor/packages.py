"""Python and the packages, found without importing them: nothing here needs more than the standard library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from vis.engine.doctor.findings import Finding, bad, good, note

ROOT = Path(__file__).resolve().parents[3]
PYTHONS = ((3, 10), (3, 13))
SETUP = "make setup (or: pip install -r requirements.txt -c constraints.txt)"
DETECTRON2 = (
    "python tools/install_detectron2.py\n"
    "(it has no release on the package index; a detectron2 that you compiled is used as it is)"
)
#: module -> distribution
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "scipy": "scipy",
    "PIL": "pillow",
    "pycocotools": "pycocotools",
    "cv2": "opencv-python-headless",
    "yaml": "PyYAML",
    "fvcore": "fvcore",
    "iopath": "iopath",
    "yacs": "yacs",
    "safetensors": "safetensors",
    "timm": "timm",
    "tensorboard": "tensorboard",
}
#: Without these only something is missing.
OPTIONAL = {"tensorboard": "curves go to metrics.json only", "cv2": "no drawing, no video files"}


def check_packages() -> Iterator[Finding]:
    """Python, what vis imports, and detectron2."""
    yield _python()
    least, tested = _versions("requirements.txt", ">="), _versions("constraints.txt", "==")
    there = []
    for module, distribution in PACKAGES.items():
        if not _is_there(module):
            make = note if module in OPTIONAL else bad
            yield make(distribution, f"is not installed: {OPTIONAL.get(module, 'vis cannot run')}", SETUP)
            continue
        version, key = _version(distribution), _plain(distribution)
        if key in least and _numbers(version) < _numbers(least[key]):
            yield bad(distribution, f"is {version}, at least {least[key]} is needed", SETUP)
            continue
        other = key in tested and version not in ("?", tested[key]) and not version.startswith(tested[key] + "+")
        there.append(f"{distribution} {version}" + (f" (tested: {tested[key]})" if other else ""))
    if there:
        yield good("packages", "\n".join(", ".join(there[i : i + 4]) for i in range(0, len(there), 4)))
    yield _detectron2()


def can_go_on() -> bool:
    """Whether the rest of the doctor can be imported."""
    return all(_is_there(module) for module in [*PACKAGES, "detectron2"] if module not in OPTIONAL)


def _python() -> Finding:
    found, (oldest, newest) = sys.version_info[:2], PYTHONS
    text = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    if not oldest <= found <= newest:
        wanted = " to ".join(".".join(map(str, version)) for version in PYTHONS)
        return bad("Python", text, f"vis needs {wanted}: make PYTHON=python3.12 setup")
    return good("Python", text)


def _detectron2() -> Finding:
    if not _is_there("detectron2"):
        return bad("detectron2", "is not installed", DETECTRON2)
    spec = importlib.util.find_spec("detectron2")
    place = str(Path(spec.origin).parent) if spec is not None and spec.origin else ""
    if not place:
        return bad(
            "detectron2",
            "is a folder without a package in it: a checkout named detectron2 in the current folder hides the package",
            f"start from another folder, or\n{DETECTRON2}",
        )
    return good("detectron2", f"{_version('detectron2')} ({place})")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str:
    names = [distribution, "opencv-python"] if distribution.startswith("opencv") else [distribution]
    for name in [*names, "sal-detectron2"] if distribution == "detectron2" else names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "?"


def _versions(name: str, sign: str) -> dict[str, str]:
    """distribution -> version of a requirements file of the checkout; the first where Python's version decides."""
    file = ROOT / name
    if not file.is_file():  # installed without the checkout
        return {}
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        match = re.match(rf"^([A-Za-z0-9_.-]+){sign}([0-9][\w.]*)", line)
        if match and _for_this_python(line):
            found.setdefault(_plain(match[1]), match[2])
    return found


def _for_this_python(line: str) -> bool:
    match = re.search(r'python_version\s*(<|>=)\s*"3\.(\d+)"', line)
    return match is None or (sys.version_info[1] >= int(match[2])) == (match[1] == ">=")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _numbers(version: str) -> tuple[int, ...]:
    if version == "?":
        return (10**9,)
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
