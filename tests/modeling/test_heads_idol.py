"""Heads and the second stream in a whole IDOL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from vis.checkpoint import load_weights
from vis.engine.config import load_cfg
from vis.layers.batch_former import BatchFormer
from vis.modeling import build_model
from vis.structures import ClipSample

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 6,
    "MODEL.IDOL.HIDDEN_DIM": 32,
    "MODEL.IDOL.NUM_OBJECT_QUERIES": 20,
    "MODEL.IDOL.ENC_LAYERS": 2,
    "MODEL.IDOL.DEC_LAYERS": 2,
}
HEADS = {"MODEL.HEADS": ["BoundaryHead", "QualityHead"]}
STREAMS = {"MODEL.BATCH_FORMER.ENABLED": True, "MODEL.BATCH_FORMER.DROPOUT": 0.0}


@pytest.fixture(scope="module")
def idol(project_root: Path) -> Callable[..., Any]:
    """``idol({KEY: value})``: the same weights for the same parts."""

    def build(changes: dict[str, Any] | None = None) -> Any:
        torch.manual_seed(0)
        opts = [part for pair in {**SMALL, **(changes or {})}.items() for part in pair]
        model = build_model(load_cfg(str(project_root / "configs/_base_/models/idol_tiny.yaml"), opts))
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if parameter.dim() > 1 and not name.startswith("heads.") and ".bf." not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.08)
        return model

    return build


def pair(seed: int, present: list[list[bool]], size: tuple[int, int] = (40, 72)) -> ClipSample:
    """Two frames of noise; ``present[t][n]``: whether instance n is in frame t."""
    rng = torch.Generator().manual_seed(seed)
    frames = [torch.randint(0, 256, (3, *size), generator=rng, dtype=torch.uint8) for _ in present]
    instances = []
    for here in present:
        masks = torch.zeros(len(here), *size, dtype=torch.bool)
        for n, visible in enumerate(here):
            masks[n, 4 + 7 * n : 20 + 7 * n, 6 + 11 * n : 30 + 11 * n] = visible
        labels = Instances(size, gt_masks=BitMasks(masks), gt_classes=torch.arange(len(here)))
        labels.gt_boxes = labels.gt_masks.get_bounding_boxes()
        labels.gt_ids = torch.tensor([n if visible else -1 for n, visible in enumerate(here)], dtype=torch.int64)
        instances.append(labels)
    return ClipSample(image=frames, instances=instances, height=57, width=101, video_id=3, length=len(frames))


BATCH = [pair(1, [[True, True], [True, False]]), pair(2, [[False, True], [True, True]], (48, 56))]


@pytest.mark.parametrize("batch", [BATCH, [pair(3, [[], []])]])
def test_losses_and_gradients(idol: Callable[..., Any], batch: list[ClipSample]) -> None:
    model = idol({**HEADS, **STREAMS, "MODEL.BATCH_FORMER.POSITION": "before"}).train()
    losses = model(batch)
    assert {"loss_boundary", "loss_quality", "loss_ce", "loss_reid"} <= set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("position", ["before", "after"])
def test_two_equal_streams_are_one(idol: Callable[..., Any], position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the block changes nothing, neither do the losses: pictures, padding and targets are doubled alike."""
    changes = {**HEADS, "MODEL.BATCH_FORMER.POSITION": position}
    plain, model = idol(changes).train(), idol({**changes, **STREAMS}).train()
    model.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(BATCH)
    seen = []

    def same(self: BatchFormer, x: Tensor, shapes: Any) -> Tensor:
        seen.append(len(x))
        return x

    monkeypatch.setattr(BatchFormer, "forward", same)
    found = model(BATCH)
    assert seen == [4]  # key and reference frames of both pairs
    assert set(found) == set(expected)
    for name, loss in expected.items():
        rtol = 0.02 if name == "loss_reid_aux" else 1e-4  # its negatives are drawn
        torch.testing.assert_close(found[name], loss, rtol=rtol, atol=1e-5, msg=lambda m, name=name: f"{name} {m}")


@torch.no_grad()
def test_nothing_changes_at_test_time(idol: Callable[..., Any]) -> None:
    plain, full = idol().eval(), idol({**HEADS, **STREAMS}).eval()
    extra = set(full.state_dict()) - set(plain.state_dict())
    assert all(name.startswith(("heads.", "detr.detr.transformer.bf.")) for name in extra)
    full.load_state_dict(plain.state_dict(), strict=False)
    (expected,), (found,) = plain(BATCH[:1]), full(BATCH[:1])
    assert torch.equal(found.scores, expected.scores)
    assert found.masks == expected.masks


def test_weights_with_them_serve_a_model_without(
    idol: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, full = idol().eval(), idol({**HEADS, **STREAMS}).eval()
    torch.save({"model": full.state_dict()}, tmp_path / "full.pth")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.fill_(9.0)
    with caplog.at_level("INFO", logger="vis"):
        report = load_weights(plain, tmp_path / "full.pth", training=False)
    assert "parts for training alone" in caplog.text
    assert report.missing == []
    wanted = full.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in plain.state_dict().items())


@torch.no_grad()
def test_quality_in_the_scores(idol: Callable[..., Any]) -> None:
    plain, model = idol(HEADS).eval(), idol({**HEADS, "MODEL.QUALITY_HEAD.SCORE_POWER": 1.0}).eval()
    for each in (plain, model):
        each.select_threshold, each.box_iou, each.mask_iou = 0.0, 1.1, 1.1  # every query is a detection
    images, size = model.normalizer(BATCH[0]["image"][:1]), (40, 72)
    model.load_state_dict(plain.state_dict())
    quality = model.heads["quality"]({"pred_embeds": model.detr(images, [size]).layers[-1].queries})["pred_quality"][0]
    (before, *_), (after, *_) = next(plain._detect(images, size)), next(model._detect(images, size))
    wanted = plain.detr.detr.class_logits(plain.detr(images, [size]).layers[-1], -1)[0].sigmoid() * quality[:, None]
    assert len(before) == len(after) == 20
    torch.testing.assert_close(after.flatten().sort()[0], wanted.flatten().sort()[0], rtol=1e-4, atol=1e-6)


def test_losses_fall(idol: Callable[..., Any]) -> None:
    model = idol({**HEADS, **STREAMS, "MODEL.BATCH_FORMER.POSITION": "before"}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(5):
        losses = model(BATCH)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < totals[0]
