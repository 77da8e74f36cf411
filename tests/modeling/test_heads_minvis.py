"""Heads and the second stream in a whole MinVIS: training with them, test time without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Instances

from vis.checkpoint import load_weights
from vis.layers.batch_former import BatchFormer
from vis.modeling import build_model
from vis.structures import ClipSample

HEIGHT, WIDTH = 40, 72
HEADS = {"MODEL.HEADS": ["BoundaryHead", "QualityHead"]}
STREAMS = {"MODEL.BATCH_FORMER.ENABLED": True, "MODEL.BATCH_FORMER.DROPOUT": 0.0}
BF = "sem_seg_head.pixel_decoder.transformer.bf."


def sample(seed: int, present: list[list[bool]], size: tuple[int, int] = (HEIGHT, WIDTH)) -> ClipSample:
    """Noise with boxes; ``present[t][n]``: whether instance n is in frame t."""
    rng = torch.Generator().manual_seed(seed)
    frames = [torch.randint(0, 256, (3, *size), generator=rng, dtype=torch.uint8) for _ in present]
    instances = []
    for frame, here in zip(frames, present, strict=True):
        masks = torch.zeros(len(here), *size, dtype=torch.bool)
        for n, visible in enumerate(here):
            masks[n, 4 + 7 * n : 20 + 7 * n, 6 + 11 * n : 30 + 11 * n] = visible
            frame[:, masks[n]] = 40 + 90 * n
        labels = Instances(size, gt_masks=BitMasks(masks), gt_classes=torch.arange(len(here)))
        labels.gt_ids = torch.tensor([n if visible else -1 for n, visible in enumerate(here)], dtype=torch.int64)
        instances.append(labels)
    return ClipSample(image=frames, instances=instances, height=57, width=101, video_id=3, length=len(frames))


BATCH = [sample(1, [[True, True], [True, False]]), sample(2, [[False], [True]], (48, 56))]


@pytest.mark.parametrize("batch", [BATCH, [sample(3, [[False], [False]])]])
def test_losses_and_gradients(tiny_model: Callable[..., Any], batch: list[ClipSample]) -> None:
    model = tiny_model({**HEADS, **STREAMS}).train()
    losses = model(batch)
    assert {"loss_boundary", "loss_quality", "loss_ce", "loss_mask_2", "loss_dice"} <= set(losses)
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_heads_do_not_change_the_other_losses(tiny_model: Callable[..., Any]) -> None:
    found, models = [], [tiny_model().train(), tiny_model(HEADS).train()]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    for model in models:
        torch.manual_seed(4)
        found.append(model(BATCH))
    for name, loss in found[0].items():
        torch.testing.assert_close(found[1][name], loss)


def test_losses_are_means_over_both_streams(tiny_model: Callable[..., Any]) -> None:
    """Each stream's own losses on the matches of both, with the random points given."""
    model = tiny_model({**STREAMS, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 9000}).train()
    both = model(BATCH)
    segment = model.segment
    single = []
    for stream in range(2):

        def half(images: torch.Tensor, stream: int = stream) -> Any:
            out = segment(images)
            n = len(images)
            assert len(out["pred_logits"]) == 2 * n
            rows = slice(stream * n, (stream + 1) * n)
            aux = [{name: x[rows] for name, x in layer.items()} for layer in out["aux_outputs"]]
            return {**{name: x[rows] for name, x in out.items() if name != "aux_outputs"}, "aux_outputs": aux}

        model.segment = half
        single.append(model(BATCH))
    for name, loss in both.items():
        mean = (single[0][name] + single[1][name]) / 2
        torch.testing.assert_close(loss, mean, rtol=0.03, atol=0.01)  # other points
    assert any(abs(float((single[0][name] - single[1][name]).detach())) > 0.02 for name in both)


CTVIS = {"MODEL.META_ARCHITECTURE": "CTVIS", "MODEL.MASK_FORMER.REID_BRANCH": True}


def test_the_segmenter_of_dvisplus_takes_them_too(tiny_model: Callable[..., Any]) -> None:
    """Clips of two frames; an instance out of sight has a query, but no boundary and no quality to learn."""
    model = tiny_model({**CTVIS, **HEADS, **STREAMS}).train()
    seen = []
    model.heads["quality"].register_forward_hook(lambda _, inputs, out: seen.append(len(out["pred_quality"])))
    losses_of_quality, pairs = model.heads["quality"].losses, []
    model.heads["quality"].losses = lambda out, targets: pairs.extend(targets.pairs) or losses_of_quality(out, targets)
    losses = model([BATCH[0], sample(7, [[False], [True]], (48, 56))])
    assert {"loss_boundary", "loss_quality", "loss_reid", "loss_aux_reid"} <= set(losses)
    assert seen == [2 * 2 * 2]
    assert [sorted(instances.tolist()) for _, instances in pairs] == 2 * [[0, 1], [0], [], [0]]
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


VITA = {
    "MODEL.META_ARCHITECTURE": "VITA",
    "MODEL.VITA.ENC_LAYERS": 2,
    "MODEL.VITA.DEC_LAYERS": 2,
    "MODEL.VITA.HIDDEN_DIM": 40,
    "MODEL.VITA.NHEADS": 4,
    "MODEL.VITA.NUM_OBJECT_QUERIES": 13,
    "MODEL.VITA.LAST_LAYER_NUM": 2,
}
CLIPS = [BATCH[0], sample(7, [[False], [True]], (48, 56))]


def test_the_segmenter_of_vita_takes_them_too(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model({**VITA, **HEADS, **STREAMS}).train()
    pairs: list[Any] = []
    losses_of_quality = model.heads["quality"].losses
    model.heads["quality"].losses = lambda out, targets: pairs.extend(targets.pairs) or losses_of_quality(out, targets)
    losses = model(CLIPS)
    assert {"loss_boundary", "loss_quality", "loss_vita_sim", "loss_vita_ce"} <= set(losses)
    assert [len(instances) for _, instances in pairs] == 2 * [2, 1, 0, 1]
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_two_equal_streams_of_vita_are_one(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the block changes nothing, neither do the losses: both streams have all targets of all clips."""
    points = {"MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 9000}
    plain, model = tiny_model({**VITA, **HEADS, **points}).train(), tiny_model({**VITA, **HEADS, **STREAMS, **points})
    model.train().load_state_dict(plain.state_dict(), strict=False)
    monkeypatch.setattr(BatchFormer, "forward", lambda self, x, shapes: x)
    expected, found = plain(CLIPS), model(CLIPS)
    assert set(found) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=0.03, atol=0.01, msg=lambda m, name=name: f"{name} {m}")


@torch.no_grad()
def test_nothing_changes_at_test_time(tiny_model: Callable[..., Any]) -> None:
    """Results are those of the model without them, whatever the new parameters are."""
    plain, full = tiny_model(), tiny_model({**HEADS, **STREAMS})
    extra = set(full.state_dict()) - set(plain.state_dict())
    assert all(name.startswith((BF, "heads.boundary.", "heads.quality.")) for name in extra)
    full.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in full.named_parameters():
        if name in extra:
            parameter.fill_(1e6)
    (expected,), (found,) = plain(BATCH[:1]), full(BATCH[:1])
    assert torch.equal(found.scores, expected.scores)
    assert found.masks == expected.masks


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2])
def test_quality_in_the_scores(tiny_model: Callable[..., Any], window: int) -> None:
    changes = {**HEADS, "MODEL.MASK_FORMER.TEST.WINDOW_SIZE": window}
    plain = tiny_model(changes)
    model = tiny_model({**changes, "MODEL.QUALITY_HEAD.SCORE_POWER": 2.0})
    clip = sample(5, [[True]] * 3)
    sessions = [each.open_tracks() for each in (plain, model)]
    for session in sessions:
        session.take(model.normalizer(clip["image"][:2]))
        session.take(model.normalizer(clip["image"][2:]))
    tracked, _ = model.tracker(model.segment(model.normalizer(clip["image"])), None)
    quality = (model.heads["quality"](tracked)["pred_quality"] ** 2).mean(dim=0)
    expected = sessions[0].probabilities() * quality[:, None]
    torch.testing.assert_close(sessions[1].probabilities(), expected, rtol=1e-4, atol=1e-6)
    assert quality.std() > 0
    assert len(model([clip])[0]) == model.max_num


def test_starts_from_weights_without_the_heads(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    plain, full = tiny_model(), tiny_model({**HEADS, **STREAMS})
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    torch.save({"model": full.state_dict()}, tmp_path / "full.pth")
    report = load_weights(full, tmp_path / "plain.pth", allow_missing=["heads.", BF])
    assert {name.split(".")[0] for name in report.missing} == {"heads", "sem_seg_head"}
    load_weights(full, tmp_path / "full.pth", training=False)
    with pytest.raises(ValueError, match=r"missing in the file(.|\n)*heads.boundary(.|\n)*WEIGHTS_ALLOW_MISSING"):
        load_weights(full, tmp_path / "plain.pth")


@pytest.mark.parametrize("training", [False, True])
def test_weights_with_the_heads_serve_a_model_without(
    tiny_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, training: bool
) -> None:
    plain, full = tiny_model(), tiny_model({**HEADS, **STREAMS})
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.01)
    torch.save({"model": full.state_dict()}, tmp_path / "full.pth")
    with caplog.at_level("INFO", logger="vis"):
        report = load_weights(plain, tmp_path / "full.pth", training=training)
    assert (report.missing, report.ignored) == ([], [])
    assert "parts for training alone" in caplog.text
    assert all(part in caplog.text for part in (f"{BF}*", "heads.boundary.*", "heads.quality.*"))
    wanted = full.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in plain.state_dict().items())
    # of those that the model has, none may be missing or of another size
    some = tiny_model({"MODEL.HEADS": ["QualityHead"], **STREAMS})
    load_weights(some, tmp_path / "full.pth", training=training)
    torch.testing.assert_close(
        some.heads["quality"].embed.layers[0].weight, wanted["heads.quality.embed.layers.0.weight"]
    )
    deeper = tiny_model({**STREAMS, "MODEL.BATCH_FORMER.NUM_LAYERS": 2})
    with pytest.raises(ValueError, match="transformer.bf"):
        load_weights(deeper, tmp_path / "full.pth", training=training)


def test_dvis_starts_from_a_segmenter_with_them(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"model": tiny_model({**HEADS, **STREAMS}).state_dict()}, tmp_path / "full.pth")
    report = load_weights(tiny_model({"MODEL.META_ARCHITECTURE": "DVISOnline"}), tmp_path / "full.pth")
    assert {name.split(".")[0] for name in report.missing} == {"tracker"}


@pytest.mark.parametrize("position", ["after", "parallel", "before"])
def test_two_iterations(tiny_model: Callable[..., Any], position: str) -> None:
    """Losses fall on a batch that is seen again and again."""
    model = tiny_model({**HEADS, **STREAMS, "MODEL.BATCH_FORMER.POSITION": position}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(6):
        torch.manual_seed(0)
        losses = model(BATCH)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[1] < totals[0]
    assert totals[-1] < 0.9 * totals[0]


def test_one_frame_has_one_stream(tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(STREAMS).train()
    with caplog.at_level("WARNING", logger="vis"):
        losses = model([sample(6, [[True]])])
    assert "one picture per process" in caplog.text
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL.HEADS": ["QualityHed"]}, "MODEL.HEADS is 'QualityHed'.*Did you mean 'QualityHead'"),
        ({"MODEL.HEADS": ["QualityHead", "QualityHead"]}, "names a head twice"),
        ({**HEADS, **VITA, "MODEL.VITA.FREEZE_DETECTOR": True}, "FREEZE_DETECTOR leaves as they are"),
        ({**HEADS, **VITA, "MODEL.QUALITY_HEAD.SCORE_POWER": 1.0}, "SCORE_POWER is 1.0.*those of videos: set it to 0"),
        ({**HEADS, "MODEL.META_ARCHITECTURE": "DVISOnline"}, "DVISOnline leaves the segmenter.*start DVISOnline from"),
        ({**STREAMS, "MODEL.BATCH_FORMER.LAYERS": [1]}, r"BATCH_FORMER.LAYERS is \[1\].*0..0"),
    ],
)
def test_what_cannot_be(tiny_cfg: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg(changes))
