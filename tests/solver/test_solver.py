"""Parameter groups, clipping and schedules of the released family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vis.config import CfgNode, get_cfg
from vis.solver import GradientClipper, build_gradient_clipper, build_lr_scheduler, build_optimizer, parameter_groups


class Block(nn.Module):
    """One of each kind of parameter that has a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.relative_position_bias_table = nn.Parameter(torch.ones(7, 2))


class Model(nn.Module):
    """A backbone and a head that shares a layer with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Block()
        self.head = nn.Linear(5, 2)
        self.shared = self.head
        self.query_feat = nn.Embedding(4, 5)
        self.level_embed = nn.Parameter(torch.ones(3, 5))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.group_norm = nn.GroupNorm(1, 5)


def rules(groups: list[dict], model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_released_groups() -> None:
    model = Model()
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.05, backbone_multiplier=0.1)
    assert rules(groups, model) == {
        "level_embed": (1.0, 0.05),
        "backbone.relative_position_bias_table": (0.1, 0.0),
        "backbone.linear.weight": (0.1, 0.05),
        "backbone.linear.bias": (0.1, 0.05),
        "backbone.norm.weight": (0.1, 0.0),
        "backbone.norm.bias": (0.1, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.05),
        "query_feat.weight": (1.0, 0.0),
        "group_norm.weight": (1.0, 0.0),
        "group_norm.bias": (1.0, 0.0),
    }
    assert len(groups) == 4, "one group for each pair of rate and decay"


def test_the_pyramid_around_a_backbone_is_no_backbone() -> None:
    """IAI: the ResNet inside the pyramid has a rate and a decay of its own; its release takes a head along."""
    model = nn.Module()
    model.backbone, model.cls_proj, model.cls_project = nn.Module(), nn.Linear(3, 4), nn.Linear(4, 3)
    model.backbone.bottom_up, model.backbone.fpn_lateral3 = Block(), nn.Linear(5, 2)
    options = {"base_lr": 1.0, "weight_decay": 0.1, "weight_decay_norm": 0.2, "backbone_multiplier": 0.5}
    found = rules(parameter_groups(model, backbone_decay_multiplier=0.5, **options), model)
    assert found["backbone.bottom_up.linear.weight"] == (0.5, 0.05)
    assert found["backbone.bottom_up.norm.bias"] == (0.5, 0.1)
    assert found["backbone.fpn_lateral3.weight"] == found["cls_proj.weight"] == (1.0, 0.1)
    found = rules(parameter_groups(model, backbone_also=["cls_proj"], **options), model)
    assert found["cls_proj.bias"] == (0.5, 0.1)
    assert found["cls_project.bias"] == (1.0, 0.1)
    with pytest.raises(ValueError, match="BACKBONE_ALSO names .'cls_pro'"):
        parameter_groups(model, backbone_also=["cls_pro"], **options)


def test_groups_keep_the_order_of_the_model() -> None:
    first, second = (parameter_groups(Model(), base_lr=1.0, weight_decay=0.1) for _ in range(2))
    assert [[tuple(p.shape) for p in group["params"]] for group in first] == [
        [tuple(p.shape) for p in group["params"]] for group in second
    ]


def test_bias_and_embedding_keys() -> None:
    model = Model()
    groups = parameter_groups(
        model, base_lr=1.0, weight_decay=0.1, weight_decay_embed=0.2, weight_decay_norm=0.3, bias_lr_factor=2.0
    )
    found = rules(groups, model)
    assert found["head.bias"] == (2.0, 0.1)
    assert found["query_feat.weight"] == (1.0, 0.2)
    assert found["group_norm.weight"] == (1.0, 0.3)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parameter_groups(nn.Linear(2, 3).requires_grad_(False), base_lr=1.0, weight_decay=0.0)


def test_frozen_parts_have_no_state(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"segmenter": nn.Linear(3, 4), "tracker": nn.Linear(4, 2)})
    model["segmenter"].requires_grad_(False)
    with caplog.at_level("INFO"):
        optimizer = build_optimizer(config(), model)
    assert "2 tensors, 0.00 M numbers are frozen" in caplog.text
    model["tracker"](model["segmenter"](torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert set(optimizer.state) == set(model["tracker"].parameters())


def config(**values: object) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([word for key, value in values.items() for word in (f"SOLVER.{key}", value)])
    return cfg


def test_released_defaults() -> None:
    solver = get_cfg().SOLVER
    assert (solver.OPTIMIZER, solver.BACKBONE_MULTIPLIER, solver.WEIGHT_DECAY_EMBED) == ("ADAMW", 0.1, 0.0)
    optimizer = build_optimizer(config(), Model())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["eps"] == 1e-8


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("OPTIMIZER", "ADAM", "Did you mean 'ADAMW'"),
        ("BASE_LR", 0.0, "BASE_LR must be greater than 0"),
        ("LR_SCHEDULER_NAME", "WarmupPoly", "Did you mean 'WarmupPolyLR'"),
        ("MAX_ITER", 0, "MAX_ITER must be at least 1"),
        ("STEPS", (20, 10), "must increase"),
        ("WARMUP_METHOD", "burnin", "WARMUP_METHOD"),
    ],
)
def test_unusable_values(key: str, value: object, message: str) -> None:
    cfg = config(**{key: value})
    with pytest.raises(ValueError, match=message):
        build_lr_scheduler(cfg, build_optimizer(cfg, Model()))


def test_adamw_does_what_torch_documents() -> None:
    """The fused update equals the plain one, so the released recipe means the same."""
    torch.manual_seed(0)
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_optimizer(config(BASE_LR=0.01, WEIGHT_DECAY=0.05), models[0])
    groups = parameter_groups(models[1], base_lr=0.01, weight_decay=0.05, backbone_multiplier=0.1)
    plain = torch.optim.AdamW(groups, lr=0.01, foreach=False, fused=False)
    for _ in range(3):
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours.step()
        plain.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def rates(cfg: CfgNode) -> list[float]:
    """The factor on the rate of every iteration."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"] / cfg.SOLVER.BASE_LR)
        optimizer.step()
        scheduler.step()
    return found


def test_steps_with_the_released_warmup() -> None:
    cfg = config(MAX_ITER=12, STEPS=(5, 9), GAMMA=0.1, WARMUP_FACTOR=1.0, WARMUP_ITERS=3)
    assert rates(cfg) == pytest.approx([1.0] * 5 + [0.1] * 4 + [0.01] * 3)


def test_linear_warmup() -> None:
    cfg = config(MAX_ITER=10, STEPS=(), WARMUP_FACTOR=0.2, WARMUP_ITERS=4)
    assert rates(cfg) == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6)


def test_steps_beyond_the_end_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert rates(config(MAX_ITER=6, STEPS=(4, 30000), WARMUP_ITERS=0)) == pytest.approx([1.0] * 4 + [0.1] * 2)
    assert "only [4] lie inside" in caplog.text


def test_poly_follows_its_formula() -> None:
    cfg = config(
        **{"LR_SCHEDULER_NAME": "WarmupPolyLR", "MAX_ITER": 8, "WARMUP_ITERS": 2, "WARMUP_FACTOR": 0.5},
        POLY_LR_CONSTANT_ENDING=0.3,
    )
    poly = [(1 - i / 8) ** 0.9 for i in range(8)]
    expected = [0.5 * poly[0], 0.75 * poly[1], *(max(value, 0.3) for value in poly[2:])]
    assert rates(cfg) == pytest.approx(expected)
    assert rates(cfg)[-1] == pytest.approx(0.3)


def test_cosine_ends_at_its_end() -> None:
    found = rates(
        config(LR_SCHEDULER_NAME="WarmupCosineLR", MAX_ITER=20, WARMUP_ITERS=0, BASE_LR=0.01, BASE_LR_END=0.001)
    )
    assert found[0] == pytest.approx(1.0)
    assert found[10] == pytest.approx(0.55)
    assert found == sorted(found, reverse=True)


def gradients(*values: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(value))) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    return [*parameters, nn.Parameter(torch.zeros(2))]


def test_full_model_clipping_bounds_the_norm_of_all_together() -> None:
    parameters = gradients([3.0, 0.0], [0.0, 4.0, 12.0])
    clipper = build_gradient_clipper(
        config(
            **{
                "CLIP_GRADIENTS.ENABLED": True,
                "CLIP_GRADIENTS.CLIP_TYPE": "full_model",
                "CLIP_GRADIENTS.CLIP_VALUE": 0.01,
            }
        )
    )
    assert clipper is not None
    assert float(clipper(parameters)) == pytest.approx(13.0)
    found = torch.cat([p.grad for p in parameters if p.grad is not None])
    assert float(found.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(found[0] / found[4]) == pytest.approx(3 / 12)


def test_clipping_by_parameter_and_by_value() -> None:
    parameters = gradients([3.0, 4.0], [0.3, 0.4])
    assert float(GradientClipper(clip_type="norm", clip_value=1.0)(parameters)) == pytest.approx(25.25**0.5)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.3, 0.4]))
    GradientClipper(clip_type="value", clip_value=0.5)(parameters)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(("kind", "value"), [("all", 1.0), ("norm", 0.0)])
def test_clipping_refuses(kind: str, value: float) -> None:
    with pytest.raises(ValueError, match="SOLVER.CLIP_GRADIENTS"):
        GradientClipper(clip_type=kind, clip_value=value)
