"""Training IDOL by its demo configuration, on two videos: resuming is exact, and results come out of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from vis.config import CfgNode
from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.engine.trainer import Trainer


@pytest.fixture
def demo(project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CfgNode]:
    """``demo(folder, KEY, value, ...)``: the demo of a smaller network, four iterations."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate("synthetic_ovis", tmp_path, seed=3, num_videos={"train": 2, "val": 1})
    network = ["MODEL.DEVICE", "cpu", "MODEL.IDOL.ENC_LAYERS", 1, "MODEL.IDOL.DEC_LAYERS", 2]
    training = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2, "TEST.EVAL_PERIOD", 0]

    def load(folder: str, *options: Any, config: str = "idol_synthetic.yaml") -> CfgNode:
        config = str(project_root / "configs/demo" / config)
        sizes = ["INPUT.MIN_SIZE_TRAIN", (48, 56), "INPUT.MIN_SIZE_TEST", 48]
        return load_cfg(config, [*network, *training, *sizes, "OUTPUT_DIR", str(tmp_path / folder), *options])

    return load


def train(cfg: CfgNode) -> Trainer:
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


def test_training(demo: Callable[..., CfgNode], tmp_path: Path) -> None:
    whole = train(demo("whole", "MODEL.IDOL.INIT_SCORE", 0.0))  # a network that knows nothing reports something
    train(demo("parts", "DATASETS.TEST", ()))
    parts = tmp_path / "parts"
    for file in parts.glob("model_0000003*"):
        file.unlink()
    (parts / "model_final.pth").unlink()
    (parts / "last_checkpoint").write_text("model_0000001.pth")
    resumed = train(demo("parts", "DATASETS.TEST", ()))
    assert resumed.start_iter == 2
    expected = whole.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.module.state_dict().items())
    results = json.loads((tmp_path / "whole/inference/results.json").read_text())
    assert results
    length = json.loads((tmp_path / "synthetic_ovis/val.json").read_text())["videos"][0]["length"]
    assert {len(result["segmentations"]) for result in results} == {length}


ABLATIONS = {
    "baseline": ([], False),
    "quality": (["QualityHead"], False),
    "boundary": (["BoundaryHead"], False),
    "batchformer": ([], True),
    "quality_boundary": (["QualityHead", "BoundaryHead"], False),
    "all": (["QualityHead", "BoundaryHead"], True),
}


def test_ablations_differ_in_their_parts_alone(demo: Callable[..., CfgNode]) -> None:
    def plain(name: str) -> tuple[Any, Any, str]:
        cfg = demo("x", config=f"idol_ablation_{name}.yaml").clone()
        cfg.defrost()
        parts = (list(cfg.MODEL.HEADS), cfg.MODEL.BATCH_FORMER.ENABLED)
        assert not cfg.MODEL.BATCH_FORMER.ENABLED or cfg.MODEL.BATCH_FORMER.POSITION == "before"
        cfg.MODEL.HEADS, cfg.MODEL.BATCH_FORMER.ENABLED, cfg.MODEL.BATCH_FORMER.POSITION = [], False, ""
        return *parts, cfg.dump()

    rows = {name: plain(name) for name in ABLATIONS}
    assert {name: row[:2] for name, row in rows.items()} == ABLATIONS
    assert len({row[2] for row in rows.values()}) == 1


@pytest.mark.parametrize("name", ["all", "batchformer"])
def test_ablations_train(demo: Callable[..., CfgNode], name: str) -> None:
    steps = ["SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()]
    trained = train(demo(name, *steps, config=f"idol_ablation_{name}.yaml"))
    assert len(trained.module.heads) == len(ABLATIONS[name][0])


def test_overfit_trains_and_tests_on_the_same(demo: Callable[..., CfgNode], tmp_path: Path) -> None:
    generate("synthetic_ytvis", tmp_path, seed=3, num_videos={"train": 4, "val": 1})
    cfg = demo("x", config="idol_overfit.yaml")
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == ("idol_four_clips",)
    assert cfg.DATASETS.CUSTOM[0]["VIDEOS"] == [1, 2, 3, 4]
    assert cfg.MODEL.WEIGHTS == "configs/demo/minvis_synthetic.pth"  # its backbone
