"""IAI's association and identities against a second implementation of loops, ``iai_oracle.py``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vis.engine.parity import formula_weight, read_manifest
from vis.layers.hybrid_association import HybridAssociationLayer, Memory
from vis.layers.position_encoding import sine_position_encoding
from vis.modeling.criterions.iai import clip_identities, paint
from vis.modeling.inference.growing import GrowingTracks, ResultRules
from vis.modeling.trackers.association import Association, AssociationMemory, stored_frames
from vis.modeling.trackers.identity import IdentityState, IdentityTracker, exclusive, identity_map, visible_parts

NO_CHANNEL = 255


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("iai_oracle", Path(__file__).with_name("iai_oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["iai_oracle"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter drawn, in float64: gates and offsets that start as nothing too."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def close(found: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    difference = np.abs(found.detach().numpy() - expected).max() / np.abs(expected).max()
    assert difference < tolerance, difference


# Position encoding and gate are computed in float32: what depends on the first agrees to 1e-5, on the second to 1e-7.
PARTS = [{}, {"use_self": False}, {"use_local": False}, {"use_global": False, "use_self": False}]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize(("size", "radius"), [((3, 5), 1), ((4, 3), 7), ((2, 6), 2)])
def test_block(size: tuple[int, int], radius: int, parts: dict[str, bool], oracle: ModuleType) -> None:
    """Windows that cut into the map and windows larger than it, 0 to 2 stored frames."""
    dim, tokens = 16, size[0] * size[1]
    options = {"dim": dim, "self_heads": 4, "attn_heads": 2, "ffn_dim": 64, "window_radius": radius}
    layer = randomised(HybridAssociationLayer(**options, drop_path=0.1, **parts), seed=radius)
    names = {"use_self": "self_attention"}
    block = oracle.Block(
        arrays(layer), size, 4, 2, radius, **{names.get(name, name): value for name, value in parts.items()}
    )
    rng = np.random.default_rng(tokens)
    x, empty, *memory = rng.normal(size=(9, tokens, dim))
    stored = [(memory[0], memory[1]), (memory[2], memory[3])]
    pos = sine_position_encoding(*size, dim, torch.device("cpu"), first=0).flatten(2)[0].T.double()
    close(pos, oracle.sine_encoding(*size, dim))
    seen, normed, keys = layer.look(torch.from_numpy(x)[None], pos)

    def entry(frames: list[tuple[np.ndarray, np.ndarray]]) -> Memory:
        return Memory(*(torch.from_numpy(np.concatenate([frame[i] for frame in frames]))[None] for i in (0, 1)))

    tolerance = 1e-7 if parts.get("use_self") is False else 1e-5
    for near, far in ((None, []), ((memory[4], memory[5]), stored[:1]), ((memory[4], memory[5]), stored)):
        expected, key, u = block(x, near, far, empty)
        close(keys[0], key, tolerance)
        close(normed[0], u, tolerance)
        values = layer.values(normed, torch.from_numpy(empty)[None])
        close(values[0], block.value(u, empty), tolerance)
        itself = Memory(keys, values)
        before, frames = (itself, itself) if near is None else (entry([near]), entry(far))
        close(layer.read(seen, keys, frames, before, size)[0], expected, tolerance)


def test_a_video_through_the_association(oracle: ModuleType) -> None:
    """Seven frames in turns and as one clip: projections, identity bank, memories, replaced features."""
    channels, dim, num_ids, interval, grid, length = 45, 16, 6, 3, (2, 3), 7
    new = [True, False, False, True, False, False, True]
    layer = {"self_heads": 2, "attn_heads": 4, "ffn_dim": 32, "window_radius": 1}
    module = Association(
        channels=channels,
        num_ids=num_ids,
        dim=dim,
        num_layers=1,
        global_interval=interval,
        max_global_frames=-1,
        **layer,
    )
    module = randomised(module, seed=3)
    weights = arrays(module)
    part = {name.removeprefix("layers.0."): value for name, value in weights.items() if name.startswith("layers.0.")}
    block = oracle.Block(part, grid, 2, 4, 1)
    rng = np.random.default_rng(5)
    res5 = rng.normal(size=(length, channels, *grid))
    labels = rng.integers(num_ids + 1, size=(length, 8, 12)).repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    labels[2, 10:30, 20:70] = NO_CHANNEL

    def project(name: str, frame: np.ndarray) -> np.ndarray:
        kernel, bias = weights[f"{name}.weight"][:, :, 0, 0], weights[f"{name}.bias"]
        return np.stack([kernel @ column + bias for column in frame.reshape(channels, -1).T])

    bank = weights["id_bank.weight"], weights["id_bank.bias"]
    kept = oracle.stored_frames(new, interval)
    assert kept == [0, 2, 3, 6]
    entries: list[tuple[np.ndarray, np.ndarray]] = []
    expected = []
    for t in range(length):
        tokens = project("enc_proj", res5[t])
        empty = np.tile(bank[1], (len(tokens), 1))
        stored = [entries[s] for s in kept if s < t]
        out, key, u = block(tokens, entries[-1] if entries else None, stored, empty)
        out = oracle.layer_norm(out, weights, "norms.0")
        entries.append((key, block.value(u, oracle.id_embedding(labels[t], num_ids + 1, *bank))))
        rows = np.concatenate([tokens, out, project("cls_proj", res5[t])], axis=1)
        expected.append(rows.T.reshape(channels, *grid))
    memory = AssociationMemory()
    for t in range(length):
        found, current = module.read(torch.from_numpy(res5[t])[None], memory)
        close(found[0], expected[t])
        memory = module.write(current, torch.from_numpy(labels[t])[None], memory, new=new[t])
        assert memory.before is not None
        close(memory.before.layers[0].values[0], entries[t][1])
    schedule = stored_frames(torch.tensor(new), interval)[None]
    whole = module(torch.from_numpy(res5)[None], torch.from_numpy(labels)[None], schedule)
    close(whole[0], np.stack(expected))


def test_stored_frames(oracle: ModuleType) -> None:
    rng = np.random.default_rng(0)
    nothing = [False] * 14
    assert oracle.stored_frames(nothing, 3) == [0, 2, 5, 8, 11]
    assert oracle.stored_frames([i == 4 for i in range(14)], 3) == [0, 2, 4, 7, 10, 13]
    assert oracle.stored_frames(nothing[:5], 5) == [0, 4]
    for trial in range(60):
        length, interval = int(rng.integers(1, 20)), int(rng.integers(1, 6))
        new = [True, *(rng.random(length - 1) < (trial % 4) / 8).tolist()]
        kept = oracle.stored_frames(new, interval)
        table = stored_frames(torch.tensor(new), interval)
        assert [table[t].nonzero()[:, 0].tolist() for t in range(length)] == [
            [s for s in kept if s < t] for t in range(length)
        ]


def present(rng: np.random.Generator, length: int, count: int) -> dict[int, np.ndarray]:
    """{annotation id: in which frames}; ids beyond 8 and out of order."""
    names = rng.permutation(40)[:count]
    return {int(name): rng.random(length) < 0.6 for name in names}


def gt_ids(frames: dict[int, np.ndarray], length: int) -> Tensor:
    columns = [np.where(seen, name, -1) for name, seen in frames.items()]
    return torch.from_numpy(np.stack(columns, axis=1)) if columns else torch.zeros(length, 0, dtype=torch.int64)


@pytest.mark.parametrize("shuffled", [False, True])
def test_ids_of_a_clip(shuffled: bool, oracle: ModuleType) -> None:
    rng = np.random.default_rng(int(shuffled))
    for trial in range(80):
        length, num_ids = int(rng.integers(1, 6)), int(rng.integers(7, 12))
        frames = present(rng, length, int(rng.integers(0, 6)))
        annotated = [[name for name, seen in frames.items() if seen[t]] for t in range(length)]
        labels, channel = oracle.head_labels(annotated, num_ids)
        generator = torch.Generator().manual_seed(trial) if shuffled else None
        found = clip_identities(gt_ids(frames, length), num_ids, generator)
        moved = {}
        for row, name in enumerate(frames):
            assert (int(found.channels[row]) >= 0) == (name in channel)
            if name in channel:
                moved[channel[name]] = int(found.channels[row])
        assert len(set(moved.values())) == len(moved)
        assert all(0 <= each < num_ids - 1 for each in moved.values()), "the last channel is 'new'"
        if not shuffled:
            assert all(a == b for a, b in moved.items())
        moved[num_ids - 1] = num_ids - 1
        for t in range(length):
            visible = {name: row for row, name in enumerate(frames) if found.visible[t, row]}
            assert {name: int(found.head[t, row]) for name, row in visible.items()} == {
                name: moved[label] for name, label in labels[t].items()
            }
            assert bool(found.new[t]) == (num_ids - 1 in labels[t].values())


def test_the_example_of_the_description(oracle: ModuleType) -> None:
    labels, channel = oracle.head_labels([[7, 31], [7, 9, 31], [9], [7, 9]], 20)
    assert labels == [{7: 19, 31: 19}, {7: 0, 9: 19, 31: 2}, {9: 1}, {7: 0, 9: 1}]
    assert channel == {7: 0, 9: 1, 31: 2}


def test_a_clip_with_more_objects_than_ids(oracle: ModuleType) -> None:
    """Those that are left have the labels that they would have alone."""
    rng = np.random.default_rng(4)
    for _ in range(30):
        frames = present(rng, 5, 9)
        found = clip_identities(gt_ids(frames, 5), 6)
        rows = [row for row in range(9) if found.channels[row] >= 0]
        names = [name for row, name in enumerate(frames) if row in rows]
        seen = [sum(seen) for seen in frames.values() if sum(seen)]
        assert len(rows) == min(5, len(seen))
        labels, channel = oracle.head_labels([[n for n in names if frames[n][t]] for t in range(5)], 6)
        assert [int(found.channels[row]) for row in rows] == [channel[name] for name in names]
        for t in range(5):
            assert {
                n: int(found.head[t, r]) for n, r in zip(names, rows, strict=True) if found.visible[t, r]
            } == labels[t]
        assert not found.visible[:, [row for row in range(9) if row not in rows]].any()


def random_masks(rng: np.random.Generator, count: int, size: tuple[int, int] = (7, 9)) -> np.ndarray:
    """Boxes that overlap, some empty, some equal to another."""
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        top, left = rng.integers(size[0]), rng.integers(size[1])
        mask[top : top + rng.integers(0, 5), left : left + rng.integers(0, 6)] = True
    for row in range(1, count):
        if rng.random() < 0.2:
            masks[row] = masks[row - 1]
    return masks


def test_masks(oracle: ModuleType) -> None:
    """Maps of ground truth, visible parts, maps of what is found."""
    rng = np.random.default_rng(2)
    for _ in range(150):
        count, num_ids = int(rng.integers(0, 7)), 8
        masks = random_masks(rng, count)
        channels = rng.permutation(num_ids)[:count]
        painted = paint(torch.from_numpy(masks), torch.from_numpy(channels), num_ids)
        assert np.array_equal(painted.numpy(), oracle.label_map(masks, channels.tolist(), num_ids))
        share = float(rng.choice([0.1, 0.5, 0.25]))
        kept, visible = visible_parts(torch.from_numpy(masks), share)
        expected_kept, expected = oracle.visible_parts(masks, share)
        assert kept.tolist() == expected_kept
        assert np.array_equal(visible.numpy(), expected)
        assert np.array_equal(exclusive(torch.from_numpy(masks)).numpy(), expected)
        ids = rng.integers(-1, 4, size=len(expected_kept)).tolist()
        found = identity_map(visible[kept], ids, num_ids)
        assert np.array_equal(found.numpy(), oracle.frame_map(expected[expected_kept], ids, num_ids, NO_CHANNEL))


@pytest.mark.parametrize("released", [False, True])
def test_identities_of_videos(released: bool, oracle: ModuleType) -> None:
    """Random scores; frames without detections, the first too; more objects than ids; two that want the same id."""
    rng = np.random.default_rng(int(released))
    seen = {"overflow": 0, "empty": 0, "same": 0, "old": 0}
    for trial in range(25):
        num_ids = int(rng.integers(2, 6))
        tracker = IdentityTracker(num_ids=num_ids, released_overflow=released, released_unassigned=released)
        state, truth = IdentityState(), oracle.Identities(num_ids, released)
        for frame in range(7):
            count = int(rng.integers(0, 5)) if frame or trial % 3 else 0
            scores = rng.random((count, num_ids)).astype(np.float32)
            if count > 1 and rng.random() < 0.5:
                scores[:2, 0] += 1  # both want identity 0
                seen["same"] += 1
            if rng.random() < 0.3:
                scores[:, -1] += 0.5
            free = truth.following
            expected, new = truth.step(scores.astype(np.float64))
            found, state = tracker.step(torch.from_numpy(scores), state)
            assert (found.ids, found.new, state.next_id) == (expected, new, truth.following), (trial, frame)
            seen["empty"] += not count
            seen["old"] += any(0 <= each < free for each in expected)
            seen["overflow"] += -1 in expected or (released and free == num_ids - 2 in expected)
            kept = [each for each in expected if each >= 0]
            assert max(kept, default=0) < num_ids - 1
            assert released or len(set(kept)) == len(kept)
    assert min(seen.values()) > 5, seen


def test_results_of_a_video(oracle: ModuleType) -> None:
    rng = np.random.default_rng(8)
    for _ in range(30):
        length, classes, most = int(rng.integers(1, 9)), 3, int(rng.integers(1, 6))
        tracks = GrowingTracks(ResultRules(score_type="video", threshold=0.05, max_num=most, drop_noise=False))
        frames: list[dict[int, Any]] = []
        for _ in range(length):
            ids = rng.permutation(5)[: rng.integers(0, 4)].tolist()
            scores = rng.random((len(ids), classes)) ** 3
            frames.append(dict(zip(ids, scores, strict=True)))
            tracks.add(ids, torch.from_numpy(scores), [None] * len(ids))
        found, labels, ids = tracks.results()
        expected = oracle.video_scores(frames, 0.05, most)
        assert list(zip(ids.tolist(), labels.tolist(), strict=True)) == [(who, c) for _, who, c in expected]
        assert np.allclose(found, [score for score, _, _ in expected], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parity
def test_the_loops_equal_the_release(shared_dir: Path, oracle: ModuleType) -> None:
    """What everything above is compared with, against the recording of the release: one block, the identity bank."""
    recorded = np.load(shared_dir / "parity" / "iai_r50.npz")
    manifest = read_manifest(shared_dir / "parity" / "iai_r50.manifest.json.gz")

    def weights(prefix: str) -> dict[str, np.ndarray]:
        entries = {name: entry for name, entry in manifest.items() if name.startswith(prefix)}
        return {
            name.removeprefix(prefix): formula_weight(name, entry["shape"], *entry["fill"]).astype(np.float64)
            for name, entry in entries.items()
        }

    def given(name: str, tokens: int) -> np.ndarray:
        """An input made from its name, (tokens, 256); maps are given channel by channel."""
        name = f"hab.in.{name}"
        shape = (256, tokens) if name.endswith(("cur", "local_k", "local_v")) else (tokens, 256)
        drawn = formula_weight(name, shape, 0.0, 1.0).astype(np.float64)
        drawn *= round(float(recorded[f"check.{name}"][0] / drawn.flat[0]), 3)
        assert np.allclose(drawn.flat[:8], recorded[f"check.{name}"], atol=1e-6)
        return drawn.T if shape[0] == 256 else drawn

    def agrees(name: str, found: np.ndarray) -> None:
        expected = recorded[name].reshape(-1)
        stride = int(recorded[f"{name}.stride"])
        assert np.abs(found.reshape(-1)[::stride] - expected).max() < 2e-6 * np.abs(expected).max(), name

    size = (12, 20)
    block = oracle.Block(weights("lstt.LSTT.layers.0."), size, self_heads=4, attn_heads=2, radius=7)
    local, stored = (given("local_k", 240), given("local_v", 240)), [(given("global_k", 720), given("global_v", 720))]
    out, key, u = block(given("cur", 240), local, stored, np.zeros((240, 256)))
    agrees("hab.out", oracle.layer_norm(out, weights("lstt.LSTT.decoder_norms."), "0").T)
    agrees("hab.cur_k", key)
    agrees("hab.mem_v", block.value(u, given("id_emb", 240)))
    bank = weights("lstt.patch_wise_id_bank.")
    agrees("bank.out", oracle.id_embedding(recorded["bank.labels"], 21, bank["weight"], bank["bias"]))
