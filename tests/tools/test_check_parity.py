"""The parity check accepts a faithful model and notices every way of not being one."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from vis.engine.parity import Check, check_parity, fill_weights, formula_weight, left_out, read_manifest
from vis.engine.parity.outputs import check_outputs, relative_error
from vis.structures import ClipSample, VideoPrediction

FRAMES, CLIP, HEIGHT, WIDTH, CLASSES, SLOTS = 4, 3, 10, 14, 7, 2


class Stub(nn.Module):
    """A model with a shared weight, a constant, random losses and results whose order changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, CLASSES)
        self.tied = nn.Linear(5, CLASSES)
        self.tied.weight = self.head.weight
        self.drop = nn.Dropout(0.0)
        self.calls = 0

    def _features(self, sample: ClipSample) -> Tensor:
        return self.norm(self.first(torch.stack(list(sample["image"])).float() / 255))

    def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
        features = self._features(sample)
        return {"backbone.res2": features, "pred_cls": self.head(features.mean((2, 3))), "extra": features[0]}

    def forward(self, samples: list[ClipSample]) -> Any:
        sample = samples[0]
        if self.training:
            features = self.drop(self._features(sample))
            assert features.shape[0] == CLIP
            masks = sum(instances.gt_masks.tensor.float().mean() for instances in sample["instances"])
            ids = sum(float(instances.gt_ids.sum()) for instances in sample["instances"])
            noise = 1 + 0.01 * torch.randn(())
            return {"loss_ce": features.square().mean() + masks + ids, "loss_mask": features.abs().mean() * noise}
        features = self._features(sample)
        labels = torch.tensor([2, 0, 2])
        scores = torch.softmax(features.mean((0, 2, 3)), 0)[:3]
        masks = [[self._rle(features[t, n] > 0.2) for t in range(len(features))] for n in range(3)]
        self.calls += 1
        order = [(k + self.calls) % 3 for k in range(3)]
        return [
            VideoPrediction(
                scores=scores[order],
                labels=labels[order],
                track_ids=torch.arange(3),
                masks=[masks[k] for k in order],
                height=HEIGHT,
                width=WIDTH,
                length=len(features),
            )
        ]

    @staticmethod
    def _rle(mask: Tensor) -> Any:
        if not mask.any():
            return None
        rle = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Files in the recorded format, made from the stub with the formula's weights."""
    model = Stub()
    manifest: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        constant = name.endswith("num_batches_tracked")
        manifest[name] = {
            "shape": list(tensor.shape),
            "dtype": "int64" if constant else "float32",
            "fill": None if constant else [1.0, 0.05] if name.endswith("running_var") else [0.0, 0.3],
        }
    manifest["tied.weight"]["shared_with"] = "head.weight"
    (tmp_path / "m.manifest.json.gz").write_bytes(gzip.compress(json.dumps(manifest).encode()))
    fill_weights(model, manifest)

    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (FRAMES, 3, HEIGHT, WIDTH), dtype=np.uint8)
    sample = ClipSample(image=[torch.from_numpy(f) for f in frames], height=HEIGHT, width=WIDTH)
    model.eval()
    with torch.no_grad():
        outputs, result = model.parity_outputs(sample), model([sample])[0]
    res2 = outputs["backbone.res2"].numpy()
    areas = [[0 if rle is None else int(coco_mask.area(rle)) for rle in track] for track in result.masks]
    np.savez(
        tmp_path / "m.npz",
        **{
            "input": frames,
            "backbone.res2": res2.reshape(-1)[::3],
            "backbone.res2.shape": np.array(res2.shape),
            "backbone.res2.stride": np.array(3),
            "pred_cls": outputs["pred_cls"].numpy(),
            "scores": result.scores.numpy().astype(np.float64),
            "labels": result.labels.numpy(),
            "areas": np.array(areas, dtype=np.float32),
        },
    )
    masks = np.zeros((SLOTS, CLIP, HEIGHT, WIDTH), dtype=bool)
    masks[0, :, 2:6, 3:8] = True
    masks[1, 1, 5:, 7:] = True
    clip = rng.integers(0, 256, (CLIP, 3, HEIGHT, WIDTH), dtype=np.uint8)
    np.savez(
        tmp_path / "m.train.npz",
        input=clip,
        gt_masks=np.packbits(masks),
        gt_masks_shape=np.array(masks.shape),
        gt_classes=np.array([1, 4]),
        gt_ids=np.array([[0, 0, 0], [-1, 1, -1]]),
    )
    model.train()
    features = model._features(ClipSample(image=[torch.from_numpy(f) for f in clip])).detach()
    loss_ce = float(features.square().mean()) + masks.mean((0, 2, 3)).sum() + (0 - 1) + (0 + 1) + (0 - 1)
    losses = {"loss_ce": [loss_ce, 0.0], "loss_mask": [float(features.abs().mean()), 0.01]}
    (tmp_path / "m.train.json").write_text(json.dumps({"frames": CLIP, "seeds": 8, "loss": losses}))
    return tmp_path


def run(model: nn.Module, folder: Path) -> dict[str, Check]:
    checks = check_parity(model, folder / "m.manifest.json.gz", folder / "m.npz", folder / "m.train.json")
    return {check.name: check for check in checks}


def rewrite(file: Path, **changes: Any) -> None:
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays.update(changes)
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})


def failures(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.ok}


def test_formula_is_that_of_the_recordings() -> None:
    import zlib

    name = "backbone.norm.running_var"
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal((2, 3)).astype(np.float32) * 0.05
    assert np.array_equal(formula_weight(name, [2, 3], 1.0, 0.05), np.float32(1.0 + np.abs(noise)))
    assert formula_weight("scalar", [], 0.5, 2.0).shape == ()
    assert formula_weight("scalar", [], 0.5, 2.0).dtype == np.float32


def test_a_faithful_model_passes_whatever_the_order_of_its_results(recording: Path) -> None:
    model = Stub()
    for _ in range(3):
        checks = run(model, recording)
        assert failures(checks) == set()
    assert {"backbone.res2", "pred_cls", "scores", "labels", "areas", "loss_ce", "loss_mask"} <= set(checks)
    assert "every 3. element" in str(checks["backbone.res2"])


def untie(model: Stub) -> None:
    model.tied.weight = nn.Parameter(model.tied.weight.clone())


def tie_biases(model: Stub) -> None:
    model.tied.bias = model.head.bias


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.register_parameter("new", nn.Parameter(torch.zeros(2))), "keys the release does not have"),
        (lambda m: delattr(m, "norm"), "keys missing in the model"),
        (lambda m: setattr(m, "first", nn.Conv2d(3, 5, 1)), "shapes"),
        (lambda m: m.first.double(), "dtypes"),
        (untie, "shared tensors"),
        (tie_biases, "shared tensors"),
    ],
)
def test_state_dicts_must_agree(recording: Path, change: Callable[[Stub], Any], name: str) -> None:
    model = Stub()
    change(model)
    assert {name, "outputs and losses"} <= failures(run(model, recording))


def test_a_wrong_output_fails_and_only_that_one(recording: Path) -> None:
    class Wrong(Stub):
        def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
            outputs = super().parity_outputs(sample)
            outputs["pred_cls"][0, 1] += 1e-3 * outputs["pred_cls"].abs().max()
            return outputs

    assert failures(run(Wrong(), recording)) == {"pred_cls"}


def test_arrays_that_cannot_be_compared_are_failures(recording: Path) -> None:
    rewrite(recording / "m.npz", **{"tracker.pred_logits": np.ones((2, 3), np.float32), "names": np.array(["a"])})
    checks = run(Stub(), recording)
    assert failures(checks) == {"tracker.pred_logits", "names"}
    assert "unknown array" in checks["tracker.pred_logits"].detail


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone.res2.shape", np.array([FRAMES, 5, WIDTH, HEIGHT])),
        ("backbone.res2.stride", np.array(4)),
        ("backbone.res2.shape", None),
    ],
)
def test_a_wrong_shape_or_stride_fails(recording: Path, name: str, value: Any) -> None:
    rewrite(recording / "m.npz", **{name: value})
    assert "backbone.res2" in failures(run(Stub(), recording))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scores", lambda a: a * 1.001),
        ("labels", lambda a: a + (a == 0)),
        ("areas", lambda a: a + (a == a.max())),
        ("areas", lambda a: a[:, ::-1]),
        ("areas", lambda a: a[:, :-1]),
    ],
)
def test_results_are_compared(recording: Path, name: str, change: Callable[[Any], Any]) -> None:
    with np.load(recording / "m.npz") as archive:
        value = change(archive[name])
    rewrite(recording / "m.npz", **{name: value})
    assert name in failures(run(Stub(), recording))


def test_results_without_scores_or_of_another_number_fail(recording: Path) -> None:
    with np.load(recording / "m.npz") as archive:
        scores = archive["scores"]
    rewrite(recording / "m.npz", scores=scores[:2])
    assert failures(run(Stub(), recording)) == {"scores, labels, areas"}
    rewrite(recording / "m.npz", scores=None)
    assert failures(run(Stub(), recording)) == {"scores, labels, areas"}


@pytest.mark.parametrize(
    ("name", "entry", "failed"),
    [
        ("loss_ce", [100.0, 0.0], {"loss_ce"}),
        ("loss_mask", None, {"loss_mask"}),
        ("loss_other", [1.0, 0.0], {"loss_other"}),
    ],
)
def test_losses_are_compared_by_name_and_value(recording: Path, name: str, entry: Any, failed: set[str]) -> None:
    file = recording / "m.train.json"
    recorded = json.loads(file.read_text())
    recorded["loss"][name] = entry
    recorded["loss"] = {key: value for key, value in recorded["loss"].items() if value is not None}
    file.write_text(json.dumps(recorded))
    assert failures(run(Stub(), recording)) == failed


def test_active_dropout_and_another_clip_length_fail(recording: Path) -> None:
    model = Stub()
    model.drop.p = 0.1
    assert failures(run(model, recording)) == {"dropout and drop path"}
    file = recording / "m.train.json"
    file.write_text(file.read_text().replace(f'"frames": {CLIP}', '"frames": 5'))
    assert any("5 frames" in check.detail for check in run(Stub(), recording).values() if not check.ok)


def test_a_model_without_the_protocol_fails(recording: Path) -> None:
    class Silent(Stub):
        parity_outputs = None  # type: ignore[assignment]

    assert any("no parity_outputs" in check.detail for check in run(Silent(), recording).values() if not check.ok)


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0], [0.0], 0.0),
        ([1e-9], [0.0], float("inf")),
        ([np.nan, 1.0], [1.0, 1.0], float("inf")),
        ([-np.inf, 1.0], [-np.inf, 2.0], 0.5),
        ([0.0, 1.0], [-np.inf, 2.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_relative_error(found: list[float], expected: list[float], error: float) -> None:
    assert relative_error(np.array(found), np.array(expected)) == error


@pytest.mark.parametrize(
    "content",
    [b"", b"not gzip", gzip.compress(b"{}"), gzip.compress(b'{"a": {"shape": [1]}}')],
    ids=["empty", "not gzip", "no keys", "no dtype"],  # gzip writes the time: by content, every process has other names
)
def test_a_broken_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.manifest.json.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="manifest"):
        read_manifest(file)


def test_missing_and_broken_recordings_are_refused(recording: Path) -> None:
    manifest = recording / "m.manifest.json.gz"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_parity(Stub(), manifest, recording / "nowhere.npz")
    (recording / "m.npz").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match=r"m\.npz"):
        check_parity(Stub(), manifest, recording / "m.npz")
    rewrite(recording / "m.train.npz", input=None)
    with pytest.raises(ValueError, match="input"):
        check_parity(Stub(), manifest, None, recording / "m.train.json")


def load_tool(project_root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", project_root / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
@pytest.mark.slow
def test_released_minvis(project_root: Path, shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared_dir / "parity"
    arguments = ["--config-file", str(project_root / "configs/minvis/ytvis19_r50.yaml")]
    arguments += [
        "--manifest",
        str(folder / "minvis_r50.manifest.json.gz"),
        "--outputs",
        str(folder / "minvis_r50.npz"),
    ]
    arguments += ["--losses", str(folder / "minvis_r50.train.json")]
    status = load_tool(project_root, "check_parity").main(arguments)
    assert status == 0, capsys.readouterr().out


def test_a_part_alone(recording: Path) -> None:
    """``only``: the backbone of a model whose head is another, on more frames than were recorded."""
    frames = 3
    model = Stub()
    manifest = read_manifest(recording / "m.manifest.json.gz")
    renamed = {name.replace("first.", "backbone."): entry for name, entry in manifest.items() if "first" in name}
    renamed["head.weight"] = manifest["head.weight"]

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model.first
            self.other = nn.Linear(2, 3)

        def parity_outputs(self, sample: ClipSample) -> dict[str, Tensor]:
            return {"backbone.res2": self.backbone(torch.stack(list(sample["image"])).float() / 255)}

    part = Part()
    file = recording / "part.manifest.json.gz"
    file.write_bytes(gzip.compress(json.dumps(renamed).encode()))
    fill_weights(part, renamed, ["backbone."])
    with np.load(recording / "m.npz") as archive:
        image = torch.from_numpy(archive["input"]).float() / 255
    with torch.no_grad():
        full = part.backbone(image[:frames]).numpy()
    rewrite(recording / "m.npz", **{"backbone.res2": full, "backbone.res2.shape": None, "backbone.res2.stride": None})
    before = part.other.weight.clone()
    checks = check_parity(part, file, recording / "m.npz", only=["backbone."])
    assert {check.name for check in checks if not check.ok} == set()
    assert len(checks) == 6
    assert f"({frames}, 5, {HEIGHT}, {WIDTH})" in checks[-1].detail
    assert torch.equal(part.other.weight, before)
    named = "\n".join(left_out(part, file, recording / "m.npz", ["backbone."]))
    assert "1 keys of the release and 2 of the model" in named
    assert "pred_cls, scores, labels, areas" in named
    assert left_out(part, file, recording / "m.npz", []) == []
    assert any(not check.ok for check in check_parity(part, file, recording / "m.npz"))
    with pytest.raises(ValueError, match=r"no key of the manifest begins with 'backbon_'; they begin with backbone\."):
        check_parity(part, file, recording / "m.npz", only=["backbon_"])
    with pytest.raises(ValueError, match="begins with head"):
        check_outputs(part, recording / "m.npz", ["head."])
    with pytest.raises(ValueError, match="leave out --only"):
        check_parity(part, file, None, recording / "m.train.json", only=["backbone."])
