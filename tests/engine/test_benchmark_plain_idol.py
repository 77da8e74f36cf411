"""What IDOL is timed against gives the same results from masks of all queries; memory and sizes of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vis.engine.benchmarks import Settings, against_plain, memory
from vis.engine.benchmarks.common import MovingFrames, build, video
from vis.engine.benchmarks.plain_idol import PlainIDOL, disagreement, grouped_masks, pairwise_mask_nms
from vis.modeling.heads.dynamic_mask import dynamic_masks
from vis.modeling.inference.detections import mask_nms
from vis.modeling.meta_arch.idol import IDOL

FRAMES = 6
SMALL = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5", "MODEL.IDOL.ENC_LAYERS", "1", "MODEL.IDOL.DEC_LAYERS", "2")


@pytest.fixture(scope="module")
def settings(project_root: Path) -> Settings:
    return Settings(
        config_file=str(project_root / "configs/_base_/models/idol_tiny.yaml"),
        opts=(*SMALL, "MODEL.MASK_FORMER.TEST.WINDOW_SIZE", "4"),
        input_size=(64, 120),
        output_size=(70, 110),
        frames=(FRAMES,),
        warmup=0,
        repeats=1,
    )


def test_masks_of_grouped_convolutions() -> None:
    torch.manual_seed(0)
    features, parameters, points = torch.rand(8, 7, 11), torch.randn(5, 169), torch.rand(5, 2) * 80
    ours = dynamic_masks(features, parameters, points)
    torch.testing.assert_close(grouped_masks(features, parameters, points), ours, rtol=1e-3, atol=1e-3)
    for iou in (0.2, 0.4, 0.7):
        assert torch.equal(pairwise_mask_nms(ours, iou), mask_nms(ours, iou))


def test_the_released_way_gives_the_same(settings: Settings) -> None:
    """Of a model that was never trained, but finds and tracks things."""
    _, model = build(settings)
    sample = video(settings, FRAMES)
    results = []
    for kind in (IDOL, PlainIDOL):
        model.__class__ = kind
        with torch.no_grad():
            results += model([sample])
    apart = disagreement(*results)
    assert apart["in_both"] == apart["results"][0] == apart["results"][1] > 5
    assert apart["scores_apart"] < 1e-5
    assert apart["pixels_apart"] <= 1e-3 * apart["pixels"]
    assert apart["pixels"] > 0
    longest = max(sum(rle is not None for rle in masks) for masks in results[0].masks)
    assert longest > 2, "tracks are linked"


def test_figures(settings: Settings) -> None:
    result = against_plain.measure_against_plain(settings)
    for name in ("ours", "all masks", "plain"):
        assert 0 < result[name]["network"]["median"] < result[name]["seconds_per_frame"]["median"]
    assert result["logits_apart"] < 1e-3
    assert set(result["disagreement"]) == {"all masks", "plain"}
    text = "\n".join(against_plain.lines(result))
    assert "all masks and selecting afterwards" in text
    assert text.count("in both of") == 2


def test_memory_of_a_video(settings: Settings) -> None:
    """What is measured in a process of its own: results grow with the video, and say so."""
    found: list[dict[str, Any]] = [
        memory.run_once(Settings(**{**vars(settings), "frames": (length,)})) for length in (2, 8)
    ]
    assert found[0]["tracks"] > 0
    assert found[1]["result_mib"] > found[0]["result_mib"] > 0


def test_frames_repeat() -> None:
    frames = MovingFrames(length=3, size=(8, 12))
    assert torch.equal(frames[2], frames[2])
