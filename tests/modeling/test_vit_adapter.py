"""DINOv2 with the slim adapter, at a fraction of its size, against the formulas written out."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from vis.modeling.backbones import D2VitAdapterDinoV2, resize_patch_kernel
from vis.modeling.backbones.dinov2 import interpolate_positions
from vis.modeling.backbones.vit_adapter import SIZES, Extractor

DIM, DEPTH, HEADS, GRID = 32, 8, 4, 5


def build(**changes: Any) -> D2VitAdapterDinoV2:
    """Eight blocks of 32 channels, all weights spread so that every part shows in the result."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "pretrain_grid": GRID, **changes}
    model = D2VitAdapterDinoV2(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def total(features: dict[str, Tensor]) -> Tensor:
    """A number that every value of the features changes differently."""
    return torch.stack([(x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in features.values()]).sum()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


# --- names and shapes


def test_names_shapes_and_types_are_those_of_the_release(shared_dir: Path) -> None:
    file = shared_dir / "parity" / "dvisplus_online_vitl.manifest.json.gz"
    manifest = json.loads(gzip.decompress(file.read_bytes()))
    expected = {
        name.removeprefix("backbone."): (tuple(entry["shape"]), entry["dtype"])
        for name, entry in manifest.items()
        if name.startswith("backbone.")
    }
    with torch.device("meta"):
        model = D2VitAdapterDinoV2(**SIZES["vitl"])
    state = model.state_dict()
    assert {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in state.items()} == expected
    assert expected["vit_module.pos_embed"][0] == (1, 1370, 1024)
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert trained / 1e6 == pytest.approx(22.95, abs=0.01)


@pytest.mark.parametrize(("name", "channels", "blocks"), [("vits", 384, 12), ("vitb", 768, 12), ("vitl", 1024, 24)])
def test_sizes_by_name(tiny_cfg: Any, name: str, channels: int, blocks: int) -> None:
    with torch.device("meta"):
        model = D2VitAdapterDinoV2(tiny_cfg({"MODEL.VIT_ADAPTER.NAME": name}), ShapeSpec(channels=3))
    assert model.output_shape() == {f"res{i + 2}": ShapeSpec(channels=channels, stride=4 * 2**i) for i in range(4)}
    assert len(model.vit_module.blocks) == blocks
    assert model.vit_module.blocks[0].attn.num_heads == channels // 64
    extractors = [module for module in model.modules() if isinstance(module, Extractor)]
    assert [module.attn.num_heads for module in extractors] == [channels // 64] * 6
    assert model.size_divisibility == 32


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 160), (160, 160)])
def test_outputs(height: int, width: int) -> None:
    model = build().eval()
    with torch.no_grad():
        found = model(torch.randn(1, 3, height, width))
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    assert shapes == {f"res{i + 2}": (1, DIM, height // (4 * 2**i), width // (4 * 2**i)) for i in range(4)}


def test_sizes_that_are_no_multiples_are_refused() -> None:
    with pytest.raises(ValueError, match="48x96, expected multiples of 32"):
        build()(torch.randn(1, 3, 48, 96))


def test_user_errors(tiny_cfg: Any) -> None:
    with pytest.raises(ValueError, match=r"MODEL.VIT_ADAPTER.NAME is 'vitll', expected vits, vitb, vitl.*'vitl'"):
        D2VitAdapterDinoV2(tiny_cfg({"MODEL.VIT_ADAPTER.NAME": "vitll"}), ShapeSpec(channels=3))
    with pytest.raises(ValueError, match=r"FINETUNE_INDEXES names \[4\]; the stages are 0 to 3"):
        build(trained_stages=[1, 4])
    with pytest.raises(ValueError, match="10 blocks cannot be cut into 4"):
        build(depth=10)


# --- positions and patches


def test_positions_of_the_pre_training_are_kept() -> None:
    pos_embed = torch.randn(1, 1 + GRID * GRID, DIM)
    assert interpolate_positions(pos_embed, (GRID, GRID)) is pos_embed


@pytest.mark.parametrize("grid", [(3, 7), (8, 5), (4, 4), (25, 1)])
def test_positions_follow_the_formula(grid: tuple[int, int]) -> None:
    """A bicubic sum by hand: cell i looks at (i + 0.5) / scale - 0.5 with scale (h + 0.1) / n, edges repeated."""
    pos_embed = torch.randn(1, 1 + GRID * GRID, 6, dtype=torch.float64).float()

    def weights(size: int) -> Tensor:
        matrix = torch.zeros(size, GRID, dtype=torch.float64)
        for i in range(size):
            centre = (i + 0.5) * GRID / (size + 0.1) - 0.5
            first = int(torch.floor(torch.tensor(centre)))
            for cell in range(first - 1, first + 3):
                t, a = abs(centre - cell), -0.75
                near = (a + 2) * t**3 - (a + 3) * t**2 + 1
                far = a * (t**3 - 5 * t**2 + 8 * t - 4)
                matrix[i, min(max(cell, 0), GRID - 1)] += near if t <= 1 else far
        return matrix

    table = pos_embed[0, 1:].view(GRID, GRID, -1).double()
    expected = torch.einsum("ip,jq,pqc->ijc", weights(grid[0]), weights(grid[1]), table).flatten(0, 1)
    found = interpolate_positions(pos_embed, grid)
    assert found.shape == (1, 1 + grid[0] * grid[1], 6)
    assert torch.equal(found[:, 0], pos_embed[:, 0])
    torch.testing.assert_close(found[0, 1:].double(), expected, rtol=0, atol=2e-5)


def test_positions_are_computed_in_float32() -> None:
    pos_embed = torch.randn(1, 1 + GRID * GRID, 6).half()
    expected = interpolate_positions(pos_embed.float(), (3, 4))
    assert torch.equal(interpolate_positions(pos_embed, (3, 4)), expected)


def test_patch_kernel() -> None:
    kernel = torch.randn(5, 3, 14, 14)
    found = resize_patch_kernel(kernel, 16)
    assert found.shape == (5, 3, 16, 16)
    corners = (..., slice(None, None, 15), slice(None, None, 15))
    torch.testing.assert_close(found[corners], kernel[..., ::13, ::13])
    at = torch.linspace(0, 13, 16)
    low, part = at.long().clamp(max=12), at - at.long().clamp(max=12)
    rows = kernel[..., low, :] * (1 - part)[:, None] + kernel[..., low + 1, :] * part[:, None]
    expected = rows[..., low] * (1 - part) + rows[..., low + 1] * part
    torch.testing.assert_close(found, expected)
    flat = resize_patch_kernel(torch.ones(1, 1, 14, 14), 16)
    assert flat.sum() == pytest.approx(256)  # not normalised: 256 / 196 of before
    assert resize_patch_kernel(kernel.half(), 16).dtype == torch.float16
    assert resize_patch_kernel(kernel, 14) is kernel
    with pytest.raises(ValueError, match=r"shape \(5, 3, 14\)"):
        resize_patch_kernel(kernel[..., 0], 16)


# --- the frozen ViT


def test_a_frozen_vit_has_no_gradient_and_keeps_nothing(images: Tensor) -> None:
    model = build().train()
    assert not any(x.requires_grad for x in model.vit_module.parameters())
    inside, graph, saved = [False], [], []

    def enter(*_: Any) -> None:
        inside[0] = True

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> None:
        inside[0] = False
        graph.append(output.grad_fn)

    for block in model.vit_module.blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    patches = model.vit_module.patch_embed
    patches.register_forward_hook(lambda _m, _a, output: graph.append(output.grad_fn))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(inside[0]) or x, lambda x: x):
        features = model(images)
    assert len(graph) == DEPTH + 1
    assert set(graph) == {None}
    assert saved
    assert not any(saved)
    total(features).backward()
    assert all(x.grad is None for x in model.vit_module.parameters())
    assert all(x.grad is not None for name, x in model.named_parameters() if not name.startswith("vit_module."))


def test_a_frozen_vit_stays_in_evaluation_mode(images: Tensor) -> None:
    model = build()
    for mode in (True, False, True):
        model.train(mode)
        assert not any(module.training for module in model.vit_module.modules())
        assert model.spm.training is mode
    assert all(module.training for module in build(freeze_vit=False).train().modules())


def test_statistics_move_in_training_only(images: Tensor) -> None:
    model = build()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(names) == 10
    for mode in (False, True):
        model.train(mode)
        before = {name: model.get_submodule(name).running_mean.clone() for name in names}
        model(images)
        moved = {name: not torch.equal(model.get_submodule(name).running_mean, before[name]) for name in names}
        assert set(moved.values()) == {mode}


def test_a_trained_vit_learns_but_for_what_is_not_used(images: Tensor) -> None:
    model = build(freeze_vit=False).train()
    total(model(images)).backward()
    without = {name for name, x in model.named_parameters() if x.grad is None}
    assert without == {"vit_module.mask_token", "vit_module.norm.weight", "vit_module.norm.bias"}
    # Data-parallel training waits for the gradient of everything that asks for one.
    assert not any(model.get_parameter(name).requires_grad for name in without)


def test_chosen_stages_of_a_frozen_vit(images: Tensor) -> None:
    model = build(trained_stages=[1, 3]).train()
    total(model(images)).backward()
    learnt = {name.split(".")[2] for name, x in model.vit_module.named_parameters(prefix="v") if x.grad is not None}
    assert learnt == {"2", "3", "6", "7"}  # two blocks a stage
    assert {n.split(".")[1] for n, x in model.vit_module.named_parameters() if x.requires_grad} == learnt


def test_finetune_is_read_from_the_configuration(tiny_cfg: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = {}
    for finetune in (False, True):
        values = {"FINETUNE": finetune, "FINETUNE_INDEXES": [2], "NAME": "vits", "VIT_WEIGHT": "a.pth"}
        cfg = tiny_cfg({f"MODEL.VIT_ADAPTER.{key}": value for key, value in values.items()})
        with torch.device("meta"):
            model = D2VitAdapterDinoV2(cfg, ShapeSpec(channels=3))
        assert model.vit_weight == "a.pth"
        assert "VIT_WEIGHT a.pth is not read" in caplog.text
        found[finetune] = [i for i, b in enumerate(model.vit_module.blocks) if b.mlp.fc1.weight.requires_grad]
    assert found == {False: [], True: [6, 7, 8]}


# --- recomputation


@pytest.mark.parametrize("frozen", [True, False])
def test_recomputation_changes_no_gradient_but_keeps_less(images: Tensor, frozen: bool) -> None:
    results, kept = [], []
    for again in (False, True):
        model = build(freeze_vit=frozen, checkpoint_extractors=again, checkpoint_vit=again).train()
        saved: list[int] = []
        # What is kept of the convolutions and of the sums at the end is no matter of recomputation.
        model.spm.register_forward_hook(lambda *_, s=saved: s.clear())
        model.up.register_forward_pre_hook(lambda *_, s=saved: kept.append(sum(s)))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):
            value = total(model(images))
        value.backward()
        results.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert list(results[0]) == list(results[1])
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)
    assert kept[1] < 0.4 * kept[0]


# --- the formulas


def by_hand(model: D2VitAdapterDinoV2, images: Tensor) -> dict[str, Tensor]:
    """The slim adapter with weights by name and nothing but elementary operations, one picture at a time."""
    p = {name: x.detach().double() for name, x in model.state_dict().items()}

    def norm(name: str, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def batch_norm(name: str, x: Tensor) -> Tensor:
        scale = p[f"{name}.weight"] / (p[f"{name}.running_var"] + 1e-5).sqrt()
        return (x - p[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]

    def conv(name: str, x: Tensor, **options: Any) -> Tensor:
        return F.conv2d(x[None], p[f"{name}.weight"], p.get(f"{name}.bias"), **options)[0]

    def prior(image: Tensor) -> list[Tensor]:
        x = image
        for i, stride in ((0, 2), (3, 1), (6, 1)):
            x = batch_norm(f"spm.stem.{i + 1}", conv(f"spm.stem.{i}", x, stride=stride, padding=1)).relu()
        levels = [F.max_pool2d(x[None], 3, 2, 1)[0]]
        for i in (2, 3, 4):
            y = conv(f"spm.conv{i}.0", levels[-1], stride=2, padding=1)
            levels.append(batch_norm(f"spm.conv{i}.1", y).relu())
        return [conv(f"spm.fc{i}", x) for i, x in enumerate(levels, start=1)]

    def block(name: str, x: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).chunk(3, dim=-1)
        heads = []
        for h in range(HEADS):
            part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
            scores = q[:, part] @ k[:, part].T / (DIM / HEADS) ** 0.5
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + p[f"{name}.ls1.gamma"] * linear(f"{name}.attn.proj", torch.cat(heads, -1))
        y = linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))
        return x + p[f"{name}.ls2.gamma"] * y

    def look(name: str, query: Tensor, source: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        h, w = grids[1]
        value = linear(f"{name}.value_proj", source).T.view(HEADS, DIM // HEADS, h, w)
        offsets = linear(f"{name}.sampling_offsets", query).view(-1, HEADS, 4, 2)
        weight = linear(f"{name}.attention_weights", query).view(-1, HEADS, 4).softmax(-1)
        centres = [((j + 0.5) / n, (i + 0.5) / m) for m, n in grids for i in range(m) for j in range(n)]
        out = []
        for cell, (x, y) in enumerate(centres):
            at = torch.tensor([x, y]).double() + offsets[cell] / torch.tensor([w, h])  # (heads, points, 2)
            seen = F.grid_sample(value, (2 * at - 1)[:, None], align_corners=False)[
                :, :, 0
            ]  # (heads, channels, points)
            out.append((seen * weight[cell][:, None]).sum(-1).flatten())
        return linear(f"{name}.output_proj", torch.stack(out))

    def extract(name: str, c: Tensor, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        c = c + look(f"{name}.attn", norm(f"{name}.query_norm", c), norm(f"{name}.feat_norm", patches), grids)
        x, parts = linear(f"{name}.ffn.fc1", norm(f"{name}.ffn_norm", c)), []
        for part, (h, w) in zip(x.split([h * w for h, w in grids]), grids, strict=True):
            kernel = {"padding": 1, "groups": x.shape[1]}
            parts.append(conv(f"{name}.ffn.dwconv.dwconv", part.T.reshape(-1, h, w), **kernel).flatten(1).T)
        return c + linear(f"{name}.ffn.fc2", F.gelu(torch.cat(parts)))

    def resize(x: Tensor, scale: float) -> Tensor:
        return F.interpolate(x[None], scale_factor=scale, mode="bilinear", align_corners=False)[0]

    def one(image: Tensor) -> list[Tensor]:
        height, width = image.shape[1:]
        grids = [(height // s, width // s) for s in (8, 16, 32)]
        c1, *levels = prior(image)
        c = torch.cat([x.flatten(1).T + p["level_embed"][i] for i, x in enumerate(levels)])
        tokens = conv("vit_module.patch_embed.proj", image, stride=16).flatten(1).T
        tokens = torch.cat([p["vit_module.cls_token"][0], tokens])
        tokens = tokens + interpolate_positions(p["vit_module.pos_embed"].float(), grids[1])[0].double()
        features = []
        for stage in range(4):
            for i in range(stage * DEPTH // 4, (stage + 1) * DEPTH // 4):
                tokens = block(f"vit_module.blocks.{i}", tokens)
            names = ["extractor", *(["extra_extractors.0", "extra_extractors.1"] if stage == 3 else [])]
            for name in names:
                c = extract(f"interactions.{stage}.{name}", c, tokens[1:], grids)
            features.append(tokens[1:].T.reshape(DIM, *grids[1]))
        parts = c.split([h * w for h, w in grids])
        c2, c3, c4 = (x.T.reshape(DIM, *grid) for x, grid in zip(parts, grids, strict=True))
        c1 = c1 + F.conv_transpose2d(c2[None], p["up.weight"], p["up.bias"], stride=2)[0]
        sums = [
            c1 + resize(features[0], 4),
            c2 + resize(features[1], 2),
            c3 + features[2],
            c4 + resize(features[3], 0.5),
        ]
        return [batch_norm(f"norm{i}", x) for i, x in enumerate(sums, start=1)]

    pictures = [one(image.double()) for image in images]
    return {f"res{i + 2}": torch.stack([picture[i] for picture in pictures]) for i in range(4)}


def test_slim_adapter_by_hand(images: Tensor) -> None:
    model = build().eval()
    with torch.no_grad():
        found = model(images)
    for name, expected in by_hand(model, images).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of processes on the CPU, with this one alone in it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_batch_norm_is_synchronised_on_gpus_only(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().train()
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    # Torch refuses to distribute synchronised normalisation on CPUs, and waits for a gradient of every parameter.
    total(nn.parallel.DistributedDataParallel(model)(images)).backward()
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    synchronised = build()
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules()) == 10
    assert list(synchronised.state_dict()) == list(model.state_dict())


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu(images: Tensor) -> None:
    model = build(freeze_vit=False, checkpoint_extractors=True, checkpoint_vit=True).train()
    on_gpu = copy.deepcopy(model).cuda()
    expected = model(images)
    found = on_gpu(images.cuda())
    for name, x in expected.items():
        assert (found[name].cpu() - x).abs().max() < 1e-2 * x.abs().max(), name
    with torch.autocast("cuda", dtype=torch.float16):
        rough = on_gpu(images.cuda())
    total({name: x.float() for name, x in rough.items()}).backward()
    assert all(torch.isfinite(x.grad).all() for x in on_gpu.parameters() if x.grad is not None)


def test_half_precision_runs_near_to_float32(images: Tensor) -> None:
    model = build().eval()
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(images)
    for name, x in exact.items():
        assert (rough[name].float() - x).abs().max() < 0.1 * x.abs().max(), name


# --- the release


@pytest.mark.parity
@pytest.mark.slow
def test_backbone_of_the_release(shared_dir: Path, project_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vis.engine.config import load_cfg
    from vis.engine.parity import check_parity, parity_options
    from vis.modeling import build_model

    config = str(project_root / "configs/minvis/ovis_vitl.yaml")
    small = ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1, "MODEL.MASK_FORMER.DEC_LAYERS", 2]
    model = build_model(load_cfg(config, [*parity_options(load_cfg(config), None), *small]))
    recording = shared_dir / "parity" / "dvisplus_online_vitl"
    files = recording.with_suffix(".manifest.json.gz"), recording.with_suffix(".npz")
    checks = check_parity(model, *files, only=["backbone."])
    assert [str(check) for check in checks if not check.ok] == []
    assert {f"backbone.res{i}" for i in range(2, 6)} < {check.name for check in checks}
