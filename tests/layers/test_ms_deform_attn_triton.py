"""The Triton backend: its kernels interpreted on the CPU, compiled for two architectures, and imported late.

No test here needs a GPU. Both kernels on one are tested with the other backends, behind the marker `gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vis.layers.ms_deform_attn import triton_kernels

HERE = Path(__file__).parent
THERE = importlib.util.find_spec("triton") is not None
OLD = triton_kernels.available()[1] if THERE else "no Triton here"
needs_triton = pytest.mark.skipif(not THERE or "is older than" in OLD, reason=OLD)


def run(arguments: list[str], root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("checks", "interpret"), [("interpreted_triton_checks", "1"), ("compiled_triton_checks", "0")])
def test_kernels(checks: str, interpret: str, project_root: Path) -> None:
    """In a process of its own, since each file puts something into Triton's place."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"{checks}.py")]
    done = run(arguments, project_root, TRITON_INTERPRET=interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_triton_is_imported_late(project_root: Path) -> None:
    """By us: torchvision brings in torch's compiler, and that Triton, where they are recent."""
    code = (
        "import sys, vis.layers.ms_deform_attn, vis.layers.ms_deform_attn.triton_kernels\n"
        "assert 'vis.layers.ms_deform_attn.triton_source' not in sys.modules  # the one module that imports it\n"
    )
    done = run(["-c", code], project_root)
    assert done.returncode == 0, done.stderr


def test_without_triton_there_is_a_reason(project_root: Path) -> None:
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'triton': raise ModuleNotFoundError('triton is blocked')\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from vis.layers.ms_deform_attn import triton_kernels, triton_source\n"
        "assert triton_kernels.available() == (False, 'Triton cannot be imported: triton is blocked')\n"
        "assert not hasattr(torch.ops.vis, 'ms_deform_attn_triton')\n"
        "try: triton_kernels.triton_ms_deform_attn(*[None] * 5)\n"
        "except RuntimeError as error: assert 'not installed' in str(error)\n"
        "else: raise AssertionError\n"
    )
    done = run(["-c", code], project_root)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_cpu_tensors_are_refused_outside_of_the_interpreter() -> None:
    import torch

    value, locations, weights = torch.ones(1, 6, 1, 4), torch.ones(1, 2, 1, 1, 1, 2), torch.ones(1, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="value is on cpu, but the Triton kernels need a CUDA device"):
        triton_kernels.triton_ms_deform_attn(value, [2, 3], [0], locations, weights)
