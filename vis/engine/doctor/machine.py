"""torch, the GPU and the op: whether they fit together, tried out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from vis.engine.doctor.findings import Finding, bad, good, note
from vis.layers.ms_deform_attn import backends
from vis.layers.ms_deform_attn.__main__ import self_test

_DRIVER = Path("/proc/driver/nvidia/version")
_REBUILD = "rm -rf build vis/_C.so; pip install --no-build-isolation -e .   (VIS_BUILD_CUDA=1 for GPUs, with nvcc)"


def check_machine() -> Iterator[Finding]:
    """CUDA as torch sees it, and what the driver says."""
    if torch.cuda.is_available():
        yield from (_gpu(index) for index in range(torch.cuda.device_count()))
        return
    driver = _driver()
    if torch.version.cuda is None and driver:
        yield bad(
            "CUDA",
            f"torch {torch.__version__} is built without CUDA, and this machine has an NVIDIA driver ({driver})",
            "install the torch for your CUDA (https://pytorch.org/get-started), then build vis again",
        )
    elif torch.version.cuda is not None and driver:
        yield bad(
            "CUDA",
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but cannot use the driver ({driver})",
            "nvidia-smi says which CUDA the driver knows: update the driver, or install a torch for that CUDA. In a "
            "container, pass the GPUs (docker run --gpus all). CUDA_VISIBLE_DEVICES must not be empty",
        )
    else:
        yield note("CUDA", f"no NVIDIA driver here: torch {torch.__version__} runs on the CPU")


def _driver() -> str:
    """The driver in words, "" where there is none."""
    if _DRIVER.is_file():
        return _DRIVER.read_text(encoding="utf-8").splitlines()[0]
    return "nvidia-smi is there" if shutil.which("nvidia-smi") else ""


def _gpu(index: int) -> Finding:
    name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    built = torch.cuda.get_arch_list()
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
    text = f"{name}, sm_{major}{minor}, {free:.1f} of {total:.1f} GiB free; CUDA {torch.version.cuda}"
    if not fits((major, minor), built):
        return bad(
            f"GPU {index}",
            f"{text}; this torch has kernels for {', '.join(built)}",
            "no kernel image would be found: install a torch that is built for this GPU",
        )
    return good(f"GPU {index}", text)


def fits(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether one of torch's architectures ("sm_86", "compute_90") runs on a GPU of this capability."""
    for name in built:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        version = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and version[0] == capability[0] and version[1] <= capability[1]:
            return True
        if kind == "compute" and version <= capability:
            return True
    return not built


def check_op(device: str, backend: str = "auto") -> Iterator[Finding]:
    """Deformable attention: the backend that would run, forward and backward against torch's ``grid_sample``.

    Args:
        device: kind of device, "cpu" or "cuda".
        backend: ``MODEL.MS_DEFORM_ATTN_BACKEND``.
    """
    what = f"op on {device}"
    try:
        backends.set_backend(backend)
        chosen = backends.choose(device)
    except ValueError as error:
        yield bad(what, str(error), f"{_REBUILD}\nor let MODEL.MS_DEFORM_ATTN_BACKEND be auto")
        return
    try:
        passed, text = self_test(chosen, device)
    except RuntimeError as error:  # torch's, of a kernel
        wrong = "is built for other GPUs" if "no kernel image" in str(error) else "fails"
        yield bad(what, f"{chosen} {wrong}: {str(error).splitlines()[0]}", _REBUILD)
        return
    if not passed:
        yield bad(what, f"{chosen}: {text}", f"its results are wrong. {_REBUILD}")
    elif chosen == "torch":
        yield note(what, f"{chosen} ({text})", f"slower than compiled: {backends.problem('compiled', device)}")
    else:
        yield good(what, f"{chosen} ({text})")
