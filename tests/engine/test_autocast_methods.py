"""Every method trains in half precision: no two formats meet where torch refuses it, and the numbers are float32's.

The models have layer norms in their ResNets: batch norms over the few cells of tiny pictures, from initial weights,
turn any rounding into other gradients.
"""

from __future__ import annotations

from typing import Any

import method_steps
import pytest
import torch

_LAYER_NORM = ("MODEL.RESNETS.NORM", "LN")
# The others take longer; together these have every kind of detector, decoder and head.
_QUICK = {"minvis", "idol", "iai", "masktrack"}
_QUICK_FIRST = sorted(method_steps.METHODS, key=lambda name: name not in _QUICK)


def agree(method: str, device: str, dtype: torch.dtype) -> None:
    """A step under autocast and one in float32: total within 3 %, direction of the gradient within cosine 0.95."""
    model, frames = method_steps.build(method, *_LAYER_NORM)
    full = method_steps.step(model, frames, device)
    half = method_steps.step(model, frames, device, dtype)
    assert {loss.dtype for loss in half.losses.values()} == {torch.float32}
    assert half.losses.keys() == full.losses.keys()
    assert all(loss.isfinite() for loss in half.losses.values())
    assert half.total == pytest.approx(full.total, rel=0.03)
    assert half.total != full.total, "nothing was computed in half precision"
    without = [name for name, gradient in half.gradients.items() if gradient is None]
    assert not without, "parameters that the losses do not reach"
    assert half.gradient.isfinite().all()
    assert torch.cosine_similarity(full.gradient, half.gradient, dim=0) > 0.95


@pytest.mark.parametrize(
    "method", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in _QUICK_FIRST]
)
def test_bfloat16_on_the_cpu(method: str) -> None:
    agree(method, "cpu", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*_QUICK, "vita"} - {"minvis"}))
def test_float16_on_the_cpu(method: str) -> None:
    """Trainings use it on GPUs alone; here it tells what would overflow, or be of another format, there."""
    agree(method, "cpu", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("method", _QUICK_FIRST)
def test_half_precision_on_a_gpu(method: str, dtype: torch.dtype) -> None:
    agree(method, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("method", _QUICK_FIRST)
def test_a_gpu_evaluates_as_the_cpu(method: str) -> None:
    """Labels and tracks equal, scores to 1e-3: convolutions in TF32 would be further away."""
    model = evaluable(method)
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        there = method_steps.evaluated(model, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    here = method_steps.evaluated(model, "cpu")
    assert len(here) > 0, "nothing was found, so nothing was compared"
    assert torch.equal(there.labels.cpu(), here.labels)
    assert torch.equal(there.track_ids.cpu(), here.track_ids)
    torch.testing.assert_close(there.scores.cpu(), here.scores, atol=1e-3, rtol=0)


def evaluable(method: str) -> Any:
    """A model from initial weights that finds something."""
    more = ("MODEL.DETECTOR.CLS_THR", "0.0", "MODEL.DETECTOR.ID_THR", "0.0", "MODEL.IAI.TEST.VIDEO_SCORE_THR", "0.0")
    model, _ = method_steps.build(method, *_LAYER_NORM, *more)
    if method == "idol":
        method_steps.enliven_idol(model)
    return model


@pytest.mark.parametrize("method", ["idol", "iai", "condinst_track"])
def test_models_of_the_comparison_find_something(method: str) -> None:
    assert len(method_steps.evaluated(evaluable(method), "cpu", length=3)) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_boxes_are_not_rounded_before_pooling(dtype: torch.dtype) -> None:
    """In a picture of 1280 pixels bfloat16 has every eighth alone."""
    model, _ = method_steps.build("masktrack")
    heads = model.image_model.roi_heads
    torch.manual_seed(0)
    levels = {f"p{i}": torch.randn(1, 64, 256 >> i, 1280 >> i).to(dtype) for i in range(2, 6)}
    boxes = torch.tensor([[1001.0, 9.0, 1031.0, 52.0], [1109.0, 31.0, 1262.0, 175.0]])
    whole = heads.pool_boxes({name: x.float() for name, x in levels.items()}, [boxes])
    torch.testing.assert_close(heads.pool_boxes(levels, [boxes]), whole, atol=0, rtol=0)
    labels = torch.tensor([2, 4])
    one, other = (heads.mask_crops(x, boxes, labels) for x in (levels, {name: x.float() for name, x in levels.items()}))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
