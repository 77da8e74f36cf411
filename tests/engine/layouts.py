"""Trainings of a few iterations in any number of processes and steps, of the tiny models of the demonstrations.

``python layouts.py RESULT OPTIONS...`` is one process of several under torchrun; :func:`run` forks them itself.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 2

_MASK_FORMER = [
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
    "1",
    "MODEL.MASK_FORMER.DEC_LAYERS",
    "3",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
    "48",
]
#: Method -> its configuration and what makes it faster.
METHODS: dict[str, list[str]] = {
    "minvis": ["configs/demo/minvis_synthetic.yaml", *_MASK_FORMER, "MODEL.HEADS", "['QualityHead']"],
    "ctvis": [
        "configs/demo/minvis_synthetic.yaml",
        *_MASK_FORMER,
        *["MODEL.META_ARCHITECTURE", "CTVIS", "MODEL.MASK_FORMER.REID_BRANCH", "True", "INPUT.SAMPLING_FRAME_NUM", "3"],
    ],
    "dvis_online": ["configs/demo/dvis_online_synthetic.yaml", *_MASK_FORMER, "INPUT.SAMPLING_FRAME_NUM", "3"],
    "dvis_offline": ["configs/demo/dvis_offline_synthetic.yaml", *_MASK_FORMER, "INPUT.SAMPLING_FRAME_NUM", "3"],
    "vita": [
        "configs/demo/vita_synthetic.yaml",
        *_MASK_FORMER,
        *["MODEL.VITA.LAST_LAYER_NUM", "2", "INPUT.SAMPLING_FRAME_NUM", "3"],
    ],
    "idol": ["configs/demo/idol_synthetic.yaml", "MODEL.IDOL.ENC_LAYERS", "1", "MODEL.IDOL.DEC_LAYERS", "2"],
    "iai": ["configs/demo/iai_synthetic.yaml", "INPUT.SAMPLING_FRAME_NUM", "2"],
    "masktrack": ["configs/demo/masktrack_synthetic.yaml"],
}


def options(method: str, folder: Path, *more: str) -> list[str]:
    """``load_cfg``'s arguments: plain gradient descent on six clips of one size, from initial weights."""
    return [
        *METHODS[method],
        *["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0"],
        *["INPUT.MIN_SIZE_TRAIN", "(48,)", "SEED", "5", "OUTPUT_DIR", str(folder)],
        *["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.OPTIMIZER", "SGD"],
        *["SOLVER.BASE_LR", "0.01", "SOLVER.WARMUP_ITERS", "0", "SOLVER.CHECKPOINT_PERIOD", "100"],
        *more,
    ]


def train(arguments: list[str], *, resume: bool = False) -> dict[str, Any]:
    """Train in this process: weights, the losses of each iteration, the gradient of the first one."""
    from vis.engine import load_cfg
    from vis.engine.trainer import Trainer

    torch.set_num_threads(1)
    cfg = load_cfg(str(ROOT / arguments[0]), arguments[1:])
    torch.manual_seed(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    gradients: dict[str, torch.Tensor] = {}
    update = trainer.step._update

    def kept(*args: Any) -> None:
        if not gradients:
            gradients.update(
                {name: p.grad.clone() for name, p in trainer.module.named_parameters() if p.grad is not None}
            )
        update(*args)

    trainer.step._update = kept  # type: ignore[method-assign]
    trainer.train()
    losses = trainer.storage.history("total_loss").values()
    return {"weights": trainer.module.state_dict(), "gradients": gradients, "losses": losses}


@contextmanager
def group(rank: int, world_size: int, meeting: Path) -> Iterator[None]:
    """This process as one of several."""
    from detectron2.utils import comm

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    comm.create_local_process_group(world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _process(rank: int, world_size: int, meeting: Path, work: Callable[[], Any]) -> None:
    with group(rank, world_size, meeting):
        result = work()
    if rank == 0:
        torch.save(result, f"{meeting}.result")
    sys.stdout.flush()
    os._exit(0)


def run(world_size: int, meeting: Path, work: Callable[[], Any]) -> Any:
    """``work()`` in so many forked processes; what it gives in the first of them."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_process, args=(rank, world_size, meeting, work)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world_size, f"exit codes {codes}"
    return torch.load(f"{meeting}.result", weights_only=False)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def difference(one: dict[str, Any], other: dict[str, Any], what: str = "weights") -> float:
    """The largest difference of a tensor, as a share of the largest number in it (or of 1, if that is less)."""
    worst = 0.0
    assert one[what].keys() == other[what].keys()
    for name, value in one[what].items():
        if value.is_floating_point() and "running" not in name:
            scale = max(float(value.abs().max()), 1e-3)
            worst = max(worst, float((value - other[what][name]).abs().max()) / scale)
    return worst


if __name__ == "__main__":
    from vis.engine.launch import launch

    def _main() -> None:
        result = train(sys.argv[2:])
        if dist.get_rank() == 0:
            torch.save(result, sys.argv[1])

    launch(_main, device="cpu")
