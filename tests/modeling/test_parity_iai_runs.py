"""Replays of IAI's runs, also of those whose recordings are at hand in words alone: every array is compared."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vis.engine.config import load_cfg
from vis.engine.parity import fill_weights, iai, iai_parts, iai_training, parity_options, read_manifest
from vis.engine.parity.common import read_npz
from vis.engine.parity.compared import Comparison
from vis.engine.parity.weights import in_our_names
from vis.layers.linear import torch_products
from vis.modeling import build_model
from vis.modeling.heads.fcos import rows
from vis.modeling.meta_arch.iai import IAI
from vis.modeling.trackers.association import AssociationMemory

HEIGHT, WIDTH, NUM_IDS, CLASSES, DIM = 64, 96, 5, 40, 32
INPUTS = ("input", "pad.input", "gt.masks.bits", "gt.masks.dims")
LOSSES = ("loss_bbox", "loss_centerness", "loss_cls", "loss_id", "loss_mask")


class Asked(dict[str, Any]):
    """Recorded inputs; of what is not there an answer that lets a replay go on."""

    def __missing__(self, name: str) -> np.ndarray:
        return np.zeros(0, dtype=np.int64)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).endswith(("det.num", "det.assigned_column", "margin.assign"))


class Recorder(Comparison):
    """Keeps what a model gives in place of comparing it."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        super().__init__(Asked(inputs))
        self.found: dict[str, np.ndarray] = {}

    def _sides(self, name: str, found: Tensor, order: Any) -> None:
        self.found[name] = found.detach().cpu().numpy()

    def note(self, name: str, ok: bool, detail: str) -> None:
        assert ok or name not in self.recorded, detail


def record(model: IAI, inputs: dict[str, np.ndarray], runs: tuple[str, ...], steps: tuple[str, ...]) -> dict[str, Any]:
    recorder = Recorder({**inputs, **{f"{step}names": np.array(LOSSES) for step in steps}})
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda compared, name, found, *_: compared.close(name, found, 0.0)  # noqa: E731
        patch.setattr(iai, "compare_margins", keep)
        patch.setattr(iai_training, "_close", keep)
        patch.setattr(iai_training, "STEPS", {step: iai_training.STEPS[step] for step in steps})
        model.eval()
        with torch_products():
            with torch.no_grad():
                for prefix in runs:
                    iai._replay(model, prefix, iai.RUNS[prefix], recorder)
                iai_parts.check_parts(model, recorder)
            if steps:
                state = {name: value.clone() for name, value in model.state_dict().items()}
                masks = iai.recorded_masks(inputs)
                iai_training.check_training(model, recorder, masks, lambda: model.load_state_dict(state) and None)
                model.load_state_dict(state)
    return recorder.found


@pytest.fixture(scope="module")
def model(project_root: Path) -> IAI:
    config = str(project_root / "configs/_base_/models/iai_tiny.yaml")
    changes = {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "MODEL.IAI.NUM_IDS": NUM_IDS,
        "MODEL.IAI.DIM": DIM,
        "MODEL.IAI.FFN_DIM": 64,
        "MODEL.DETECTOR.NORM_EVAL": True,
    }
    opts = [part for pair in changes.items() for part in pair]
    torch.manual_seed(2)
    built = build_model(load_cfg(config, [*opts, *parity_options(load_cfg(config), None)]))
    assert isinstance(built, IAI)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "fcos_head" in name and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            if name.endswith(("cls_logits.weight", "id_logits.weight")):
                parameter.mul_(3.0)
            if name.endswith(("cls_logits.bias", "id_logits.bias", "ctrness.bias")):
                parameter.fill_(1.0)
    return built


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    masks = np.zeros((3, 6, HEIGHT, WIDTH), dtype=bool)
    for t in range(6):
        masks[0, t, 5:40, 4 + 3 * t : 40 + 3 * t] = True
        masks[1, t, 20:60, 50:90] = t != 4
        masks[2, t, 30:50, 30 : 70 - t] = t != 0
    return {
        "input": rng.integers(0, 255, (6, 3, HEIGHT, WIDTH)).astype(np.uint8),
        "pad.input": rng.integers(0, 255, (6, 3, HEIGHT - 9, WIDTH - 7)).astype(np.uint8),
        "gt.masks.bits": np.packbits(masks),
        "gt.masks.dims": np.array(masks.shape),
    }


def block_inputs(prefix: str, batch: int, frames: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """First values of the inputs of a recorded block, and the shape of its output."""
    maps, tokens = (batch, DIM, *size), size[0] * size[1]
    shapes = {"cur": maps, "local_k": maps, "local_v": maps, "id_emb": (tokens, batch, DIM)}
    shapes |= dict.fromkeys(("global_k", "global_v"), (frames * tokens, batch, DIM))
    made: dict[str, np.ndarray] = {f"{prefix}out": np.zeros(maps)}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(f"{prefix}in.{name}".encode())).standard_normal(shape)
        made[f"check.{prefix}in.{name}"] = (noise * 0.5).astype(np.float32).reshape(-1)[:8]
    return made


def strided(arrays: dict[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """Arrays above the limit as every so many-th element."""
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        out[name] = array
        if array.size > limit and "idmap" not in name and name not in INPUTS:
            stride = array.size // limit | 1
            out[name] = array.reshape(-1)[::stride]
            out[f"{name}.shape"], out[f"{name}.stride"] = np.array(array.shape), np.array(stride)
    return out


def altered(name: str, array: np.ndarray) -> np.ndarray:
    """One element of an array changed by what no tolerance allows; of maps and areas more."""
    array = array.copy()
    flat = array.reshape(-1)
    if ".margin." in f".{name}":
        usable = np.flatnonzero(np.isfinite(flat) & (np.abs(flat) < 0.9))
        flat[usable[:1]] += 0.05
    elif "idmap" in name:
        flat[:60] = (flat[:60].astype(int) + 1) % 4
    elif "area" in name:
        flat[-1:] += 300
    elif array.dtype.kind == "f":
        flat[-1:] += 0.02 * max(np.abs(flat).max(initial=0), 1e-3)
    else:
        flat[-1:] += 1
    return array


#: As they are described; the fixture below has thresholds of its own for the tiny model.
DESCRIBED = dict(iai.RUNS)
RUNS = ("", "strict.", "sparse.", "pad.", "long.")
STEPS = ("train.bn_batch.b2.",)


@pytest.fixture(scope="module")
def recording(model: IAI, inputs: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The run "sparse." has the thresholds that leave its first frame empty."""
    blocks = block_inputs("hab.", 1, 3, (4, 5)) | block_inputs("hab_b2.", 2, 2, (3, 7))
    images = model.eval().normalizer(list(torch.from_numpy(inputs["input"])))
    with pytest.MonkeyPatch.context() as patch:
        with torch_products(), torch.no_grad():
            features = model.image_model.bottom_up(images[:1])
            replaced, _ = model.association.read(features["res5"], AssociationMemory())
            outputs = model.image_model.head(model.image_model.top_down({**features, "res5": replaced}))
        classes, ids = (rows(maps)[0].sigmoid().amax(dim=1) for maps in (outputs.logits, outputs.ids))
        limit = float(torch.minimum(classes, ids).max())
        patch.setitem(iai.RUNS, "sparse.", replace(iai.RUNS["sparse."], thresholds=(limit, limit)))
        found = record(model, {**inputs, **blocks}, RUNS, STEPS)
        found["norm"] = images.numpy()
        yield {**inputs, **blocks, **found, **{f"{step}names": np.array(LOSSES) for step in STEPS}}


def replay(model: IAI, arrays: dict[str, np.ndarray], file: Path) -> dict[str, bool]:
    np.savez(file, **arrays)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    checks = iai.replay(model, file, lambda: model.load_state_dict(state) and None)
    return {check.name: check.ok for check in checks}


def test_every_array_of_every_run_is_compared(model: IAI, recording: dict[str, np.ndarray], tmp_path: Path) -> None:
    arrays = strided(recording, 2000)
    with torch_products():
        found = replay(model, arrays, tmp_path / "own.npz")
        assert [name for name, ok in found.items() if not ok] == []
        for name in ("strict.res.areas", "sparse.det.box", "long.det.assigned_column", "hab_b2.part.short_weights"):
            assert name in found
        assert {"train.bn_batch.b2.per_frame", "train.bn_batch.b2.target.num_pos", "pad.frame.idmap"} <= set(found)
        given = (*INPUTS, *(name for name in arrays if name.startswith("check.") or name.endswith("names")))
        changed = {
            name: array if name in given or name.endswith((".shape", ".stride")) else altered(name, array)
            for name, array in arrays.items()
        }
        found = replay(model, changed, tmp_path / "altered.npz")
    passed = {name for name, ok in found.items() if ok} - set(given)
    assert {name for name in passed if not np.array_equal(changed[name], arrays[name], equal_nan=True)} == set()
    assert {name for name in passed if arrays[name].size and ".margin." not in f".{name}"} == set()


def test_recorded_rows_may_be_longer_than_any_frame(
    model: IAI, recording: dict[str, np.ndarray], tmp_path: Path
) -> None:
    arrays = {name: recording[name] for name in (*INPUTS, "norm")}
    arrays |= {name: array for name, array in recording.items() if name.startswith("sparse.")}
    for name in ("box", "id", "cls", "pad_area", "out_area", "assigned_column"):
        narrow = arrays[f"sparse.det.{name}"]
        wider = np.full((len(narrow), 7, *narrow.shape[2:]), -1, dtype=narrow.dtype)
        wider[:, : narrow.shape[1]] = narrow
        arrays[f"sparse.det.{name}"] = wider
    with torch_products():
        assert [name for name, ok in replay(model, arrays, tmp_path / "wide.npz").items() if not ok] == []


def test_what_runs_record(recording: dict[str, np.ndarray]) -> None:
    """The meaning of arrays, by a description of them."""
    for prefix in RUNS:
        of_run = {name.removeprefix(prefix): array for name, array in recording.items() if name.startswith(prefix)}
        counts = of_run["det.num"]
        for name in ("box", "id", "cls", "pad_area", "out_area"):
            for count, row in zip(counts, of_run[f"det.{name}"], strict=True):
                assert (row[count:] == -1).all()
                assert (row[:count] != -1).any(axis=-1).all() if row.ndim > 1 else (row[:count] >= 0).all()
        assert len(of_run["det.assigned_column"]) == (counts[1:] > 0).sum() == len(of_run["margin.assign"])
        following = of_run["frame.new_next"][:, 1]
        assert (np.diff(following) >= 0).all()
        assert following[-1] <= NUM_IDS - 2
        areas, channels = of_run["frame.idarea"], of_run["frame.idmap"]
        assert areas.shape[1] == NUM_IDS + 1
        for t, labels in enumerate(channels):
            assert areas[t].tolist() == [(labels == channel).sum() for channel in range(NUM_IDS + 1)]
        assert not of_run["frame.cls"][:, :, -1].any()
        for track, row in zip(of_run["res.track"], of_run["res.areas"], strict=True):
            assert ((row == -1) == (track >= following)).all()
    sparse, long = (
        {n.removeprefix(p): a for n, a in recording.items() if n.startswith(p)} for p in ("sparse.", "long.")
    )
    assert sparse["det.num"][0] == 0, "the weights of this test are to leave the first frame empty"
    assert sparse["frame.new_next"][0].tolist() == [0, 0]
    assert (sparse["frame.idmap"][0] == NUM_IDS).all()
    assert sparse["det.num"].max() <= 5
    assert recording["strict.det.num"].max() <= 6
    assert long["frame.new_next"][-1].tolist() == [0, NUM_IDS - 2], "identities run out"
    steps = [long[f"f{t}.mem.steps"].tolist() for t in range(18)]
    assert [t for t, (step, last) in enumerate(steps) if step == last or t == 0] == [0, 2, 5, 8, 11, 14, 17]
    assert [long[f"f{t}.mem.sizes"][0] // 6 for t in (0, 1, 2, 17)] == [1, 1, 2, 7]
    assert recording["train.bn_batch.b2.num_gt"].tolist() == [2, 1, 3, 2, 3, 2, 3, 2, 2, 2]


#: Losses that the release gives for two clips (its recording says so in words): names in the order of LOSSES, the sum.
TWO_CLIPS = (0.957213, 0.779418, 29.993984, 26.920109, 0.860515, 59.511242)
#: Of a run the smallest distance to a threshold, gap of ranks and distance of an overlap that the release states.
MARGINS = {"strict.": (8e-5, 1.7e-3, None), "sparse.": (6e-5, 4.7e-3, None), "long.": (None, 3.4e-5, 6.6e-4)}


@pytest.mark.slow
@pytest.mark.parity
def test_runs_that_are_described_but_not_given(
    project_root: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(iai.RUNS, "sparse.", DESCRIBED["sparse."])
    config = str(project_root / "configs/iai/ytvis19_r50.yaml")
    model = build_model(load_cfg(config, parity_options(load_cfg(config), None)))
    assert isinstance(model, IAI)
    manifest = in_our_names(model, read_manifest(shared_dir / "parity/iai_r50.manifest.json.gz"))
    fill_weights(model, manifest)
    arrays = read_npz(shared_dir / "parity/iai_r50.npz")
    found = record(model, {name: arrays[name] for name in INPUTS}, tuple(MARGINS), STEPS)
    for prefix, stated in MARGINS.items():
        least = found[f"{prefix}margin.thr_rank_nms"].min(axis=0)
        for ours, theirs in zip(least, stated, strict=True):
            assert theirs is None or ours == pytest.approx(theirs, rel=0.08)
    assert found["sparse.det.num"][0] == 0
    assert found["sparse.det.num"].max() == 5
    assert found["strict.det.num"].max() == 6
    assert found["long.frame.new_next"][-1, 1] == 18
    losses = [*found["train.bn_batch.b2.losses"], found["train.bn_batch.b2.total"]]
    np.testing.assert_allclose(losses, TWO_CLIPS, rtol=1e-5)
