"""What a training is beside its weights: random states, the configuration it ran with, the files it left.

Everything here is stored as tensors and plain containers, so that a checkpoint loads with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vis.checkpoint import write_text_atomic
from vis.config import CfgNode

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
FINAL = "model_final.pth"
METRICS = "metrics.json"
_PERIODIC = re.compile(r"^model_(\d{7})\.pth$")


def random_state() -> dict[str, Any]:
    """The state of every global random generator of this process: Python, NumPy, torch, and the current CUDA device."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back into a state that :func:`random_state` gave."""
    python, array = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    keys = array["keys"].numpy().astype(np.uint32)
    np.random.set_state((array["name"], keys, array["position"], array["has_gauss"], array["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever draws random numbers inside changes nothing for what comes after."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def plain_config(cfg: CfgNode) -> str:
    """The configuration as yaml text, which is kept in checkpoints and written to ``config.yaml``."""
    return cfg.dump()


def config_hash(text: str) -> str:
    """Short fingerprint of a configuration (sha256, 16 hexadecimal digits)."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def config_changes(before: str, now: str) -> list[str]:
    """``KEY: old -> new`` for every key that differs between two yaml texts of :func:`plain_config`."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(now))
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def checkpoint_name(iteration: int) -> str:
    """The name of the checkpoint after the iteration with this index (the first one is 0), as detectron2 counts."""
    return f"model_{iteration:07d}.pth"


def periodic_checkpoints(folder: str | Path) -> list[Path]:
    """The periodic checkpoints in a folder, oldest first."""
    return sorted(path for path in Path(folder).glob("model_*.pth") if _PERIODIC.match(path.name))


def all_checkpoints(folder: str | Path) -> list[Path]:
    """Periodic checkpoints and the final one, where they exist."""
    final = Path(folder) / FINAL
    return [*periodic_checkpoints(folder), *([final] if final.is_file() else [])]


def iteration_of(path: Path) -> int:
    """The index of the iteration in the name of a periodic checkpoint."""
    match = _PERIODIC.match(path.name)
    assert match is not None, path
    return int(match.group(1))


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` names, None where there is no such file.

    Raises:
        FileNotFoundError: it names a file that is gone.
        ValueError: it names something that is not a file of this folder.
    """
    pointer = Path(folder) / LAST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not name or Path(name).name != name:
        raise ValueError(f"{pointer} holds {name!r}, expected the name of a checkpoint in the same folder")
    path = pointer.parent / name
    if not path.is_file():
        present = ", ".join(item.name for item in all_checkpoints(folder)) or "no checkpoint"
        raise FileNotFoundError(
            f"{pointer} names {name}, which is not there (the folder holds {present}). "
            f"Write the name of the one to continue from into {pointer}, or start without --resume"
        )
    return path


def set_last_checkpoint(path: Path) -> None:
    """Let ``last_checkpoint`` name ``path``, after it is complete."""
    write_text_atomic(path.name, path.parent / LAST)


def set_earlier_run_aside(folder: Path) -> None:
    """Before a new training in a used folder: say so, and keep the old curve and pointer from mixing with the new ones.

    ``metrics.json`` and ``last_checkpoint`` get other names; checkpoints stay, and those of the same name will be
    overwritten.
    """
    present = all_checkpoints(folder)
    if present:
        logger.warning(
            "OUTPUT_DIR %s already holds checkpoints (%s ... %s) and training starts anew at iteration 0: files of the "
            "same name will be overwritten. To continue that training, stop this one, rename %s.<n> back to %s and use "
            "--resume; to keep both, take another OUTPUT_DIR",
            *(folder, present[0].name, present[-1].name, LAST, LAST),
        )
    for name in (METRICS, LAST):
        path = folder / name
        if path.is_file():
            number = 1
            while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
                number += 1
            path.rename(aside)
            logger.warning("%s of an earlier run is now %s", path, aside.name)


def drop_metrics_from(path: Path, iteration: int) -> None:
    """Take out of ``metrics.json`` what a killed run wrote after the checkpoint from which training continues."""
    if not path.is_file():
        return
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["iteration"] < iteration
        except (json.JSONDecodeError, KeyError, TypeError):
            keep = False  # a line that was cut off by the kill
        kept += [line] if keep else []
        dropped += not keep
    if dropped:
        write_text_atomic("".join(line + "\n" for line in kept), path)
        logger.info("%s: %d lines from iteration %d on, of the stopped run, were dropped", path, dropped, iteration)
