"""The straightforward training that ours is timed against has the same losses, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vis.engine.benchmarks import Settings, plain_train
from vis.engine.benchmarks.plain import plain
from vis.engine.benchmarks.plain_vita import PlainVitaCriterion, PlainVitaModule
from vis.engine.benchmarks.train import Training
from vis.modeling.criterions.vita import VitaCriterion
from vis.modeling.transformer_decoders.vita import VitaModule, VitaOutput
from vis.structures import ClipTargets

DEPTH, COPIES, CLIPS, FRAMES, QUERIES, FRAME_QUERIES, CLASSES, WIDTH, MASK, HEIGHT, SIDE = (
    2,
    3,
    2,
    4,
    6,
    5,
    7,
    10,
    8,
    5,
    9,
)


def settings(root: Path, config: str, *, frames: int = 3, opts: tuple[str, ...] = ()) -> Settings:
    return Settings(
        config_file=str(root / "configs" / config),
        opts=("MODEL.WEIGHTS", "", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "200", *opts),
        input_size=(64, 96),
        frames=(frames,),
        warmup=0,
        repeats=2,
    )


def clip(labels: list[int], first_id: int) -> ClipTargets:
    """The second instance is absent in the first frame."""
    ids = torch.arange(len(labels))[:, None].expand(-1, FRAMES).clone() * 3 + first_id
    if len(labels) > 1:
        ids[1, 0] = -1
    masks = torch.rand(len(labels), FRAMES, 4 * HEIGHT, 4 * SIDE) > 0.5
    return ClipTargets(torch.tensor(labels, dtype=torch.int64), ids, masks & (ids != -1)[..., None, None])


@pytest.mark.parametrize("labels", [([3, 1, 5], [2]), ([], [4, 4]), ([], []), ([1] * 8, [0])])
def test_losses_of_tracklets_are_ours(labels: tuple[list[int], list[int]]) -> None:
    """On the same predictions, with clips without an instance, and with more instances than queries."""
    torch.manual_seed(1)
    shape = (DEPTH, COPIES, CLIPS, QUERIES)
    video = VitaOutput(
        pred_logits=torch.randn(*shape, CLASSES + 1, requires_grad=True),
        mask_embeds=torch.randn(*shape, MASK, requires_grad=True),
        clip_embeds=torch.randn(COPIES, CLIPS, QUERIES, WIDTH, requires_grad=True),
        frame_embeds=torch.randn(COPIES, CLIPS, FRAMES, FRAME_QUERIES, WIDTH, requires_grad=True),
    )
    features = torch.randn(CLIPS, FRAMES, MASK, HEIGHT, SIDE, requires_grad=True)
    targets = [clip(own, 11 + 4000 * b) for b, own in enumerate(labels)]
    counts = [int((target.ids[:, t] != -1).sum()) for target in targets for t in range(FRAMES)]
    pairs = [[(torch.randperm(FRAME_QUERIES)[:n], torch.arange(n)[:FRAME_QUERIES])] * (COPIES + 1) for n in counts]
    found: list[tuple[dict[str, Tensor], tuple[Tensor, ...]]] = []
    leaves = [*vars(video).values(), features]
    for criterion in (VitaCriterion, PlainVitaCriterion):
        built = criterion(
            num_classes=CLASSES,
            class_weight=2.0,
            mask_weight=5.0,
            dice_weight=3.0,
            no_object_weight=0.1,
            num_points=40,
            oversample_ratio=3.0,
            importance_ratio=0.75,
            sim_weight=0.5,
            sim_use_clip=True,
        )
        torch.manual_seed(2)
        losses = built(video, features, targets, pairs)
        found.append((losses, torch.autograd.grad(sum(losses.values(), torch.zeros(())), leaves)))
    (ours, gradients), (theirs, others) = found
    assert list(ours) == list(theirs)
    for name, loss in ours.items():
        torch.testing.assert_close(theirs[name], loss, rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("window", "frames"), [(6, 4), (6, 6), (6, 15), (5, 13), (0, 7)])
def test_windows_are_ours(window: int, frames: int, training: bool, pre_norm: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 2, "num_frame_queries": 3, "num_queries": 4, "in_dim": 20}
    options |= {"feature_dim": 5, "hidden_dim": 16, "mask_dim": 6, "num_heads": 2, "feedforward_dim": 24}
    options |= {"num_encoder_layers": 4, "num_decoder_layers": 1, "window_size": window, "shift_in_training": False}
    module = VitaModule(**options, dropout=0.0, pre_norm=pre_norm, enforce_input_proj=True, deep_supervision=True)
    module.train(training)
    queries = torch.randn(2, 3, frames, 3, 20)
    expected = module.encode(queries)
    with plain(module, {VitaModule: PlainVitaModule}):
        assert isinstance(module, PlainVitaModule)
        found = module.encode(queries)
    assert type(module) is VitaModule
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "losses"),
    [("demo/vita_synthetic.yaml", 19), ("_base_/models/minvis_tiny.yaml", 12)],
    ids=["vita", "minvis"],
)
def test_losses_and_gradients_of_the_whole_are_ours(project_root: Path, config: str, losses: int) -> None:
    opts = () if "vita" in config else ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "8")
    training = Training(settings(project_root, config, opts=opts))
    types = [type(module) for module in training.model.modules()]
    torch.manual_seed(0)
    with torch.no_grad():  # offsets of deformable attention begin at whole cells, where their gradient jumps
        for parameter in training.model.sem_seg_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    apart = plain_train.compare(training)
    assert apart["losses"] == losses
    assert apart["loss"] < 1e-3
    assert apart["gradient"] < 2e-2
    assert [type(module) for module in training.model.modules()] == types


@pytest.mark.slow
def test_figures(project_root: Path) -> None:
    result = plain_train.measure_train_against_plain(settings(project_root, "demo/vita_synthetic.yaml"))
    for name in ("ours", "plain"):
        assert len(result[name]["seconds_per_step"]["runs"]) == 2
        assert result[name]["seconds_per_step"]["cpu"] > 0
        assert result[name]["peak_mib"] > 100
    for key, figure in (("total", "median"), ("cpu", "cpu")):
        ratio = result["plain"]["seconds_per_step"][figure] / result["ours"]["seconds_per_step"][figure]
        assert result["times"][key] == pytest.approx(ratio)
    assert "losses differ by at most" in "\n".join(plain_train.lines(result))
