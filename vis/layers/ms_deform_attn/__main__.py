"""``python -m vis.layers.ms_deform_attn``: the backends of this machine, the one that runs, a self-test of each."""

from __future__ import annotations

import logging
import sys

import torch
from torch import Tensor

from vis.layers.ms_deform_attn import backends, library, reference
from vis.layers.ms_deform_attn.op import RUN

SHAPES = [(7, 11), (1, 5), (3, 2)]
STARTS = [0, 77, 82]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def main() -> int:
    """Prints the report; 1 if a self-test failed or what is asked for is not there."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}; vis._C: {library.LIBRARY if library.LIBRARY.is_file() else 'not built'}")
    good = True
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name in backends.BACKENDS:
            reason = backends.problem(name, device)
            passed, text = (True, f"not there: {reason}") if reason else self_test(name, device)
            good &= passed
            print(f"{device:<5} {name:<9} {text}")
        try:
            print(f"{device:<5} runs      {backends.choose(device)}", flush=True)
        except ValueError as error:
            good = False
            print(f"{device:<5} runs      nothing: {error}")
    return 0 if good else 1


def self_test(name: str, device: str) -> tuple[bool, str]:
    """Output and gradients against ``grid_sample`` in float64: whether they agree, and the errors in words."""
    errors = {}
    types = list(TOLERANCE) if device == "cuda" else [torch.float32, torch.float64]
    for dtype in types:
        inputs = _inputs(dtype, device)
        found = _with_gradients(RUN[name], inputs)
        exact = _with_gradients(reference.by_grid_sample, [x.double() for x in inputs])
        errors[dtype] = max(
            float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)
        )
    passed = all(error <= TOLERANCE[dtype] for dtype, error in errors.items())  # False for NaN as well
    text = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.0e}" for dtype, error in errors.items())
    return passed, f"self-test {'passed' if passed else 'FAILED'}, relative errors {text}"


def _inputs(dtype: torch.dtype, device: str) -> list[Tensor]:
    position = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(2, 88, 3, 40, device=device).to(dtype)
    locations = torch.rand(2, 9, 3, len(SHAPES), 4, 2, device=device).to(position) * 1.4 - 0.2
    return [value, locations, torch.rand(2, 9, 3, len(SHAPES), 4, device=device).to(position)]


def _with_gradients(run: object, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(leaves[0], SHAPES, STARTS, *leaves[1:])  # type: ignore[operator]
    weight = torch.arange(out.numel(), device=out.device).view(out.shape).cos().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


if __name__ == "__main__":
    sys.exit(main())
