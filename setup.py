"""Packages `vis` and builds its one extension, the library vis/_C.so: C++ for the CPU, CUDA where it is wanted.

    VIS_BUILD_CUDA=auto    (default) CUDA where torch is a CUDA build, a matching nvcc is found and a GPU is visible
    VIS_BUILD_CUDA=1       CUDA, without a GPU too; an error where it cannot be built
    VIS_BUILD_CUDA=0       the CPU alone
    TORCH_CUDA_ARCH_LIST   architectures; default: those of the visible GPUs, else 8.0, 8.6, 8.9, 9.0 and PTX
    CXX, CUDA_HOME         another C++ compiler, another CUDA toolkit

Without any C++ compiler the package is installed without the library; a line says so. With one, an error of it is one.
torch must be there when it is built: `pip install --no-build-isolation .`. Configs, tools and data sets are used from a
checkout.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
SOURCES = "vis/csrc"
COMMANDS = {"bdist_wheel", "editable_wheel", "build", "build_ext", "develop", "install"}  # those of setup.py that build
ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
# Not -march: the library must run on other machines; its kernels choose their instructions when it is loaded.
# Without traps of comparisons, and errno, loops with selections are vectorised; no result differs.
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fno-trapping-math", "-fno-math-errno", "-Wno-unknown-pragmas"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-diag-suppress", "3189"]


def runtime_requirements() -> list[str]:
    """requirements.txt down to its development part."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("# Development")[0]
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else one of the usual names on the PATH."""
    asked = os.environ.get("CXX")
    if asked:
        if shutil.which(asked.split()[0]) is None:
            raise SystemExit(f"CXX is {asked!r}, which is not there")
        return asked
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_toolkit() -> None:
    """Sets CUDA_HOME to where nvcc says that its toolkit is: on the PATH it may be a script that calls another."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    listed = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    home = re.search(r"^#\$ TOP=(.*)$", listed.stderr, re.M)
    if home is not None:
        os.environ["CUDA_HOME"] = os.path.realpath(home[1])


def why_no_cuda(nvcc_home: str | None) -> str:
    """What the CUDA part lacks here; "" if nothing. A GPU is not needed to build it."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if nvcc_home is None:
        return "nvcc is not found (PATH, CUDA_HOME)"
    nvcc = Path(nvcc_home) / "bin" / "nvcc"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", text)
    if release is None or release[1] != torch.version.cuda.partition(".")[0]:
        found = f"release {release[1]}" if release else "of an unknown release"
        return f"{nvcc} is {found}, torch was built with CUDA {torch.version.cuda}"
    return ""


def wants_cuda(nvcc_home: str | None) -> bool:
    """What VIS_BUILD_CUDA says, and the machine."""
    asked = os.environ.get("VIS_BUILD_CUDA") or "auto"
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"VIS_BUILD_CUDA is {asked!r}, expected auto, 0 or 1")
    if asked == "0":
        return False
    reason = why_no_cuda(nvcc_home)
    if asked == "1" and reason:
        raise SystemExit(f"VIS_BUILD_CUDA is 1, but {reason}")
    if not reason and asked == "auto":
        import torch

        reason = "" if torch.cuda.is_available() else "no GPU is visible"
    if reason:
        say(f"vis._C is built without CUDA kernels: {reason}")
    return not reason


def say(line: str) -> None:
    print(f"-- {line}", file=sys.stderr, flush=True)


def extension() -> tuple[Any, type] | None:
    """The library and the command that builds it; None, and a line that says why, where it cannot be built."""
    compiler = find_compiler()
    missing = "no C++ compiler is found (c++, g++, clang++ or $CXX)" if compiler is None else ""
    find_toolkit()  # before torch looks for it
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ModuleNotFoundError:
        missing = missing or "torch is not in the environment that builds; use pip's --no-build-isolation"
    if missing:
        if os.environ.get("VIS_BUILD_CUDA") == "1":
            raise SystemExit(f"VIS_BUILD_CUDA is 1, but {missing}")
        say(f"vis._C is not built: {missing}. Deformable attention runs on Triton or PyTorch")
        return None
    os.environ.setdefault("CXX", str(compiler))
    cuda = wants_cuda(CUDA_HOME)
    endings = (".cpp", ".cu") if cuda else (".cpp",)
    kind = CUDAExtension if cuda else CppExtension
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS} if cuda else {"cxx": CXX_FLAGS}
    files = sorted(path for path in (ROOT / SOURCES).iterdir())
    library = kind(
        "vis._C",
        [f"{SOURCES}/{path.name}" for path in files if path.suffix in endings],
        depends=[f"{SOURCES}/{path.name}" for path in files if path.suffix in (".h", ".cuh")],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp", "-s"],
    )
    library.libraries = [name for name in library.libraries if name != "torch_python"]  # nothing of Python is in it
    if cuda:
        add_cuda_settings(library)
    return library, BuildExtension.with_options(no_python_abi_suffix=True)


def add_cuda_settings(library: Any) -> None:
    """Headers of the pip packages, behind the toolkit's, and the architectures."""
    import torch

    packages = Path(torch.__file__).resolve().parents[1] / "nvidia"
    library.include_dirs += [str(folder) for folder in sorted(packages.glob("cu*/include"))]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        visible = {torch.cuda.get_device_capability(i) for i in range(count)}
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a}.{b}" for a, b in sorted(visible)) or ARCHITECTURES


def build_settings() -> dict[str, Any]:
    """What setup() needs to build the library; nothing, and no import of torch, where a command builds nothing."""
    if not COMMANDS & set(sys.argv):
        return {}
    found = extension()
    if found is None:
        if {"editable_wheel", "develop"} & set(sys.argv):
            (ROOT / "vis" / "_C.so").unlink(missing_ok=True)  # an old one would pass for one of these sources
        return {}
    return {"ext_modules": [found[0]], "cmdclass": {"build_ext": found[1]}}


setup(
    name="vis",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "vis/__init__.py").read_text(encoding="utf-8"), re.M)[1],
    description="One framework for video instance segmentation: MinVIS, DVIS, VITA, IDOL, IAI",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["vis", "vis.*"], exclude=["vis.csrc"]),
    include_package_data=False,
    package_data={"vis.visualization.report": ["*.html", "*.css", "*.js"]},
    # detectron2 is needed as well: tools/install_detectron2.py
    install_requires=runtime_requirements(),
    **build_settings(),
)
