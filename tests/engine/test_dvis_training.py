"""Training DVIS: only the new stage learns, and a resumed training goes on in the phase it was stopped in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from vis.data.synthetic import generate
from vis.engine import load_cfg
from vis.engine.trainer import Trainer

ITERATIONS, STOP = 6, 4


@pytest.fixture
def train(project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """``train(folder, stop=...)`` trains the tiny model of the demonstration on two videos; gives the trainer."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate("synthetic_ovis", tmp_path, seed=3, splits=("train",), num_videos={"train": 2})
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": str(project_root / "configs/demo/minvis_synthetic.pth"),
        "MODEL.TRACKER.DECODER_LAYERS": 2,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 96,
        "DATASETS.TEST": (),
        "INPUT.SAMPLING_FRAME_NUM": 3,
        "INPUT.SAMPLING_FRAME_RANGE": 1,
        "INPUT.MIN_SIZE_TRAIN": (48, 56),
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }

    def run(folder: str, stop: int = -1) -> Trainer:
        values = {**options, "OUTPUT_DIR": str(tmp_path / folder)}
        config = str(project_root / "configs/demo/dvis_online_synthetic.yaml")
        cfg = load_cfg(config, [part for pair in values.items() for part in pair])
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        step = trainer.run_step

        def stopped() -> None:
            if trainer.iter == stop:
                raise KeyboardInterrupt
            step()

        monkeypatch.setattr(trainer, "run_step", stopped)
        trainer.train()
        return trainer

    return run


def test_resuming_goes_on_in_the_same_phase(train: Callable[..., Trainer]) -> None:
    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("parts", stop=STOP)
    parts = train("parts")
    assert parts.start_iter == STOP  # past the guided half
    expected, found = whole.module.state_dict(), parts.module.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

    before = torch.load(whole.cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    moved = {
        name.split(".")[0] for name, value in expected.items() if name not in before or (value != before[name]).any()
    }
    assert moved == {"tracker"}
    held = {name for name, parameter in whole.module.named_parameters() if parameter in whole.optimizer.state}
    assert held == {name for name in expected if name.startswith("tracker.")}


def test_the_phase_follows_the_iteration(train: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    from vis.modeling.criterions.clip_criterion import TrackerCriterion

    phases: list[bool] = []
    forward = TrackerCriterion.forward

    def noted(self: TrackerCriterion, *args: Any, guided: bool) -> Any:
        phases.append(guided)
        return forward(self, *args, guided=guided)

    monkeypatch.setattr(TrackerCriterion, "forward", noted)
    with pytest.raises(KeyboardInterrupt):
        train("parts", stop=STOP)
    train("parts")
    assert phases == [True] * 3 + [False] * 3
