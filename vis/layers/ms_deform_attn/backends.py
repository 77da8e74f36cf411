"""Which backend of the op runs: chosen once for each kind of device, and logged with the reason.

``auto`` takes the first that is there: compiled kernels (``vis._C``), Triton (CUDA only), PyTorch. The environment
variable ``VIS_MS_DEFORM_ATTN``, else :func:`set_backend` (the configuration's ``MODEL.MS_DEFORM_ATTN_BACKEND``), forces
one; one that is not there is an error. An error of a kernel is never a reason to try another backend.
"""

from __future__ import annotations

import difflib
import logging
import os

import torch

from vis.layers.ms_deform_attn import library, triton_kernels

logger = logging.getLogger(__name__)

#: In the order in which `auto` tries them.
BACKENDS = ("compiled", "triton", "torch")
VARIABLE = "VIS_MS_DEFORM_ATTN"

_configured = "auto"
_chosen: dict[tuple[str, str], str] = {}  # (what is asked for, kind of device) -> backend


def set_backend(name: str, device_type: str | None = None) -> None:
    """Set what runs from now on unless the environment says otherwise: "auto" or one of ``BACKENDS``.

    Args:
        device_type: where given, the backend is looked for there now ("cpu", "cuda"), not at the first call.

    Raises:
        ValueError: there is no such backend, or it is not there.
    """
    global _configured
    _configured = _known(name, "MODEL.MS_DEFORM_ATTN_BACKEND")
    if device_type is not None and asked() != "auto":
        choose(device_type)


def asked() -> str:
    """What the environment, else the configuration, asks for."""
    name = os.environ.get(VARIABLE)
    return _known(name, VARIABLE) if name else _configured


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        close = difflib.get_close_matches(name, ("auto", *BACKENDS), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{source} is {name!r}, expected auto, {', '.join(BACKENDS)}.{hint}")
    return name


def problem(backend: str, device_type: str) -> str:
    """Why a backend cannot run on a kind of device; "" if it can."""
    if backend == "compiled":
        return library.problem(device_type)
    if backend == "triton":
        there, why = triton_kernels.available()
        if not there:
            return why
        wanted = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
        return "" if device_type == wanted else f"Triton runs on {wanted} tensors here"
    return ""


@torch.compiler.assume_constant_result  # a compiler asks once, and does not look into this
def choose(device_type: str) -> str:
    """The backend for tensors on a kind of device.

    Raises:
        ValueError: the one that is asked for is not there.
    """
    wanted = asked()
    found = _chosen.get((wanted, device_type))
    if found is None:
        found = _chosen[wanted, device_type] = _choose(wanted, device_type)
    return found


def _choose(wanted: str, device_type: str) -> str:
    if wanted != "auto":
        reason = problem(wanted, device_type)
        source = VARIABLE if os.environ.get(VARIABLE) else "MODEL.MS_DEFORM_ATTN_BACKEND"
        if reason:
            raise ValueError(f"{source} asks for the backend {wanted!r}, which is not there: {reason}")
        logger.info("Deformable attention on %s: %s, as %s asks", device_type, wanted, source)
        return wanted
    reasons = []
    for name in BACKENDS:
        if name == "triton" and device_type != "cuda":
            continue  # its interpreter is for tests
        reason = problem(name, device_type)
        if not reason:
            break
        reasons.append(f"not {name}: {reason}")
    slow = name == "torch" and device_type in ("cpu", "cuda")
    text = "; ".join(reasons) or "first choice"
    logger.log(
        logging.WARNING if slow else logging.INFO, "Deformable attention on %s: %s (%s)", device_type, name, text
    )
    return name
