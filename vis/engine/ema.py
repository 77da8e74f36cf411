"""The average of the weights over a training, which often does better than the last ones (Polyak and Juditsky, 1992).

An exponential moving average: after the n-th update every averaged number moves by ``1 - decay`` of the way to the
number in the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from vis.checkpoint import LoadReport, load_state, read_weights, save_weights
from vis.config import CfgNode, declare

logger = logging.getLogger(__name__)

FINAL = "model_final_ema.pth"
#: Its name among the parts of a checkpoint.
PART = "model_ema"


@declare
def add_config(cfg: CfgNode) -> None:
    """The moving average of the weights."""
    node = cfg.SOLVER.EMA = CfgNode()
    node.ENABLED = False
    # What the average keeps of itself per update: it is one over the last 1 / (1 - DECAY) updates or so.
    node.DECAY = 0.9998
    # Fewer in the beginning: min(DECAY, (1 + n) / (10 + n)) after n updates.
    node.WARMUP = True
    # Evaluate the average, in the training and by --eval-only of a checkpoint; False: the weights themselves.
    node.EVALUATE = True


class WeightAverage(HookBase):
    """The average over the updates of a model's weights: a hook of the trainer, and a part of its checkpoints.

    Averaged are parameters that are trained, and buffers with a decimal point (running statistics); everything else is
    as it is in the model. Until the first update the average is the weights with which the training begins.

    Args:
        module: the model.
        folder: OUTPUT_DIR, where ``model_final_ema.pth`` goes after the training.
        decay, warmup: ``SOLVER.EMA``.

    Raises:
        ValueError: ``decay`` is not in 0..1.
    """

    def __init__(self, module: nn.Module, *, folder: Path, decay: float, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY is {decay}, expected a number from 0 to below 1, like 0.9998")
        self.module, self.folder, self.decay, self.warmup = module, folder, decay, warmup
        self.updates = 0
        self._sources = _averaged(module)
        self._average: dict[str, Tensor] = {}

    def before_train(self) -> None:
        """Begin with the weights as they are, unless a checkpoint had an average."""
        if not self._average:
            self._average = {name: value.detach().clone() for name, value in self._sources.items()}

    def after_step(self) -> None:
        """Take in the weights, where the step changed them."""
        if self.trainer.step.updated:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        self.before_train()
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        current = [value.detach() for value in self._sources.values()]
        torch._foreach_lerp_(list(self._average.values()), current, 1 - decay)
        self.updates += 1

    def after_train(self) -> None:
        """Write ``model_final_ema.pth`` of a training that came to its end."""
        finished = self.trainer.iter >= self.trainer.max_iter or self.trainer.stop_reason
        if finished and self._average and comm.is_main_process():
            with self.applied():
                save_weights(self.module.state_dict(), self.folder / FINAL, iteration=self.trainer.iter)
            logger.info("Saved the average over %d updates to %s", self.updates, self.folder / FINAL)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, to the bit."""
        self.before_train()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, own in self._sources.items():
            before = own.detach().clone()
            own.copy_(self._average[name])
            self._average[name].copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """The averaged numbers by their names in the model, and how many updates are in them."""
        self.before_train()
        return {"model": dict(self._average), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an average.

        Raises:
            ValueError: it is of another model.
        """
        found = state["model"]
        if differ := sorted(found.keys() ^ self._sources.keys()):
            raise ValueError(
                f"the average of the weights in the checkpoint is of other parameters than are trained here: "
                f"{', '.join(differ[:5])}. SOLVER.EMA.ENABLED False continues without it"
            )
        self._average = {name: found[name].to(own.device, own.dtype).clone() for name, own in self._sources.items()}
        self.updates = state["updates"]


def _averaged(module: nn.Module) -> dict[str, Tensor]:
    """What is averaged, by name; a parameter under two names once."""
    state = module.state_dict(keep_vars=True)
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if id(value) not in seen and value.is_floating_point() and (name in buffers or value.requires_grad):
            seen.add(id(value))
            found[name] = value
    return found


def build_average(cfg: CfgNode, module: nn.Module) -> WeightAverage | None:
    """The one that ``SOLVER.EMA`` describes, None where it is switched off."""
    node = cfg.SOLVER.EMA
    if not node.ENABLED:
        return None
    logger.info("averaging the weights (SOLVER.EMA.DECAY %g)", node.DECAY)
    return WeightAverage(module, folder=Path(cfg.OUTPUT_DIR), decay=node.DECAY, warmup=node.WARMUP)


def load_for_evaluation(cfg: CfgNode, model: nn.Module, path: str | Path) -> LoadReport:
    """Load weights strictly; of a checkpoint the average, where ``SOLVER.EMA`` says that it is evaluated.

    Raises:
        FileNotFoundError, ValueError: see :func:`vis.checkpoint.load_weights`.
    """
    weights = read_weights(path)
    node = cfg.SOLVER.EMA
    parts = weights.content.get("parts")
    average = parts.get(PART) if isinstance(parts, dict) else None
    if isinstance(average, dict) and node.ENABLED and node.EVALUATE:
        logger.info("%s: the average over %s updates is evaluated (SOLVER.EMA)", path, average.get("updates"))
        weights.state.update(average["model"])
    elif isinstance(average, dict):
        logger.info("%s has an average of the weights too, which SOLVER.EMA does not ask for", path)
    elif node.ENABLED and node.EVALUATE:
        logger.info("%s has no average of the weights beside them (SOLVER.EMA): its weights are evaluated", path)
    return load_state(model, weights, str(path), training=False)
