"""The library with CUDA kernels builds where nvcc is, and registers them; neither needs a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

CODE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in ("vis::ms_deform_attn", "vis::ms_deform_attn_backward"):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
assert not torch.cuda.is_initialized()
print("registered")
"""


@pytest.fixture(scope="module")
def library(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that ``VIS_CUDA_LIBRARY`` names (.ci/run builds it), else one built here for one architecture."""
    named = os.environ.get("VIS_CUDA_LIBRARY")
    if named:
        return Path(named)
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("no nvcc, or a torch without CUDA")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {torch.version.cuda.partition('.')[0]}." not in version:
        pytest.skip(f"nvcc is not of the CUDA release that torch was built with, {torch.version.cuda}")
    folder = tmp_path_factory.mktemp("cuda_build")
    variables = {"VIS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "tmp")]
    done = subprocess.run(
        command, cwd=project_root, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "vis" / "_C.so"


def test_library_registers_cuda_kernels(library: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "registered" in done.stdout


def test_library_contains_the_kernels(library: Path) -> None:
    content = library.read_bytes()
    for kernel in (b"forward_vector", b"backward_vector", b"forward_generic", b"backward_generic"):
        assert kernel in content
