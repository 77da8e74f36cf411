"""``manifest.json``: what a run was made of and what came of it, written when it starts and when it ends.

A training writes it to ``OUTPUT_DIR``, an evaluation to ``OUTPUT_DIR/inference``, so that neither replaces the other's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from vis.checkpoint import write_text_atomic
from vis.config import CfgNode
from vis.engine.hooks import peak_memory
from vis.engine.state import METRICS, config_hash, plain_config
from vis.layers.ms_deform_attn import backends

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
_PACKAGES: tuple[str, ...] = (
    "torch",
    "torchvision",
    "detectron2",
    "numpy",
    "scipy",
    "pycocotools",
    "pillow",
    "opencv-python-headless",
)
_PACKAGES += ("fvcore", "timm", "triton", "safetensors")


class Manifest:
    """The content of a run's ``manifest.json`` while the run lasts.

    Attributes:
        results: what an evaluation returned; set it before the end of the run.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content
        self.results: Mapping[str, Any] = {}

    def write(self) -> None:
        """Replace the file in one step, from the main process."""
        if comm.is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(json.dumps(self.content, indent=1, default=float) + "\n", self.path)

    def end(self, status: str, error: str | None, cuda: bool) -> None:
        """Fill in how the run ended, and write."""
        session = self.content["sessions"][-1]
        session.update(ended=now(), status=status, seconds=round(time.time() - session.pop("since"), 3))
        self.content.update(status=status, error=error, ended=session["ended"])
        self.content["seconds"] = round(sum(item.get("seconds") or 0.0 for item in self.content["sessions"]), 3)
        self.content["peak_memory_mib"] = round(peak_memory(cuda), 1)
        self.content["op_backend"] = op_backend("cuda" if cuda else "cpu")
        self.content["results"] = json.loads(json.dumps(self.results, default=float))
        if self.content["kind"] == "training":
            self.content["iterations"] = iterations(self.path.parent, self.content["iterations"]["total"])
        self.write()


@contextmanager
def run_manifest(
    cfg: CfgNode, *, kind: str, config_file: str = "", resume: bool = False, folder: str = ""
) -> Iterator[Manifest]:
    """Keep ``manifest.json`` for what happens inside; every process of the job enters.

    A run that ends by an error is "failed" with the error, one that is told to stop (Ctrl-C, preemption) "stopped"; one
    that is killed stays "running", since nobody is left to write.

    Args:
        kind: "training", or any other word for what is done.
        resume: the sessions of the run that is continued stay in the list.
        folder: where under ``OUTPUT_DIR``; "": a training in it, everything else in ``inference``.
    """
    training = kind == "training"
    path = Path(cfg.OUTPUT_DIR) / (folder or ("" if training else "inference")) / MANIFEST
    manifest = Manifest(path, _start(cfg, kind, config_file, path if resume or not training else None))
    manifest.write()
    cuda = torch.cuda.is_available() and str(cfg.MODEL.DEVICE) != "cpu"
    try:
        yield manifest
    except (KeyboardInterrupt, SystemExit) as error:
        manifest.end(STOPPED, f"{type(error).__name__} {error}".strip(), cuda)
        raise
    except BaseException as error:
        manifest.end(FAILED, f"{type(error).__name__}: {error}", cuda)
        raise
    manifest.end(FINISHED, None, cuda)
    if comm.is_main_process():
        logger.info("what this run was made of: %s", path)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The content of a manifest, None where there is none.

    Raises:
        ValueError: the file is not a manifest.
    """
    file = Path(path)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and the run counts as not finished") from error
    if not isinstance(content, dict) or "status" not in content:
        raise ValueError(f"{file} is not a manifest: it has no status")
    return content


def now() -> str:
    """The time with its zone, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _start(cfg: CfgNode, kind: str, config_file: str, earlier: Path | None) -> dict[str, Any]:
    text = plain_config(cfg)
    identity = config_hash(text)
    sets = [*(cfg.DATASETS.TRAIN if kind == "training" else ()), *cfg.DATASETS.TEST]
    session = {"started": now(), "since": time.time(), "status": RUNNING, "config_hash": identity}
    main = comm.is_main_process()  # the others write nothing, and do not read gigabytes for it
    content = {
        "format": 1,
        "kind": kind,
        "status": RUNNING,
        "error": None,
        "command": list(sys.argv),
        "working_folder": os.getcwd(),
        "git": git_state() if main else None,
        "config_file": config_file,
        "config_hash": identity,
        "config": text,
        "weights": cfg.MODEL.WEIGHTS,
        "data_sets": {name: data_set_files(name) for name in dict.fromkeys(sets)} if main else {},
        "seed": cfg.SEED,
        "op_backend": None,
        "versions": versions(),
        "hardware": hardware(),
        "processes": comm.get_world_size(),
        "started": session["started"],
        "ended": None,
        "seconds": None,
        "sessions": [*_sessions(earlier, identity), session],
        "peak_memory_mib": None,
        "results": {},
    }
    if kind == "training":
        content["iterations"] = {"done": 0, "total": cfg.SOLVER.MAX_ITER}
    return content


def _sessions(path: Path | None, identity: str) -> list[dict[str, Any]]:
    """Those of the run that is continued; one that was killed lasted until its folder was last written to."""
    before = read_manifest(path) if path is not None else None
    if path is None or before is None:
        return []
    if before.get("kind") != "training" and (before.get("config_hash") != identity or before["status"] == FINISHED):
        return []  # another evaluation in the same folder
    sessions = before.get("sessions", [])
    for session in sessions:
        since = session.pop("since", None)
        if since is not None:
            log = path.parent / "log.txt"
            last = log.stat().st_mtime if log.is_file() else path.stat().st_mtime
            session.update(status="killed", seconds=round(max(last - since, 0.0), 3))
    return sessions


def iterations(folder: Path, total: int) -> dict[str, Any]:
    """From ``metrics.json``: iterations done, seconds of one in the mean, and of all of them (``train_seconds``).

    Evaluations, starting and iterations that were done twice after a kill are not in these seconds.
    """
    done, times = 0, []
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run is still writing it, or was killed at it
        done = max(done, int(entry.get("iteration", -1)) + 1)
        times += [entry["time"]] if "time" in entry else []
    found: dict[str, Any] = {"done": min(done, total), "total": total}
    if times:
        mean = sum(times) / len(times)
        found |= {"seconds_each": round(mean, 6), "train_seconds": round(mean * found["done"], 3)}
    return found


def op_backend(device: str) -> dict[str, str]:
    """What was asked for as the backend of deformable attention, and what it comes to on a kind of device."""
    asked = backends.asked()
    there = asked == "auto" or not backends.problem(asked, device)
    return {"device": device, "asked": asked, "used": backends.choose(device) if there else "absent"}


def git_state(root: Path | None = None) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None where the code is not in a checkout of its own."""
    root = Path(__file__).resolve().parents[2] if root is None else root
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.rstrip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit, "dirty": bool(changed), "changed": [line[3:] for line in changed.splitlines()][:20]}


def data_set_files(name: str) -> dict[str, Any] | None:
    """The json file of a data set with its size and sha256; None where the set has no file, or it is not there."""
    file = MetadataCatalog.get(name).get("json_file")
    if not file or not Path(file).is_file():
        return None
    status = Path(file).stat()
    return {
        "json": str(file),
        "bytes": status.st_size,
        "sha256": _sha256(str(file), status.st_mtime_ns, status.st_size),
    }


@functools.lru_cache(maxsize=64)
def _sha256(file: str, _changed: int, _size: int) -> str:
    """Once per process and state of the file, which the other arguments tell."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on; nothing is imported for it."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "present" if importlib.util.find_spec(name.split("-")[0]) else "absent"
    return found


def hardware() -> dict[str, Any]:
    """The machine."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }
