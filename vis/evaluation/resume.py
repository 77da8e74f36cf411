"""Which evaluation the parts on disk are of, and whether a new one may continue it.

An evaluation continues after the last finished video where everything that its results depend on is equal: the data
set's json, the configuration of model and frames, the weights, the code, the kind of device. Weights are compared by
content, so evaluations at two iterations of a training never mix, a file may be moved, and the evaluation after the
last iteration equals that of ``model_final.pth``. The frames are not read for this: after a damaged one is replaced the
evaluation goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor, nn

import vis
from vis.evaluation.results_writer import (
    RUN_FILE,
    DamagedPart,
    ResultsWriteError,
    explain,
    part_files,
    part_header,
    parts_folder,
    remove_temporary_files,
    write_json,
)

logger = logging.getLogger(__name__)

_FORMAT = "1"  # of the parts
_ROOT = Path(vis.__file__).parent
# What turns frames into results; the rest of the project trains, measures or draws.
_FOLDERS = ("config", "csrc", "data", "layers", "modeling", "structures")
_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")
# Keys without influence on results. Weights and device are compared by what they are, not by how they were named.
_WITHOUT = {
    "MODEL": ("WEIGHTS", "WEIGHTS_ALLOW_MISSING", "DEVICE"),
    "TEST": ("EVAL_PERIOD", "RESUME", "PREFETCH_FRAMES", "MULTI_SCALE"),
}
_INPUT = ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST")
_SHOWN = 5  # changed keys that are named in the log


@dataclass(frozen=True)
class Identity:
    """What the results of an evaluation depend on.

    Attributes:
        facts: name -> value; hashes, and words that a log line can show.
        config: the keys of the configuration that matter, ``MODEL.X.Y`` -> value as text.
    """

    facts: Mapping[str, str]
    config: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for equal evaluations: 16 hexadecimal digits, which are also in every part."""
        text = json.dumps([dict(self.facts), dict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """What is other than in the ``run.json`` of an earlier evaluation, in words."""
        facts, config = earlier.get("identity"), earlier.get("config")
        if not isinstance(facts, dict) or not isinstance(config, dict):
            return [f"its {RUN_FILE} does not say of which one"]
        found = [_change(name, facts.get(name), self.facts.get(name)) for name in _changed(facts, self.facts)]
        keys = _changed(config, self.config)
        found += [_change(name, config.get(name), self.config.get(name)) for name in keys[:_SHOWN]]
        return found + ([f"{len(keys) - _SHOWN} more keys of the config"] if len(keys) > _SHOWN else [])

    def content(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        return {"key": self.key, "identity": dict(self.facts), "config": dict(self.config)}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def _change(name: str, old: Any, new: Any) -> str:
    return f"{name}: {old} -> {new}"


def identity_of(cfg: CfgNode, dataset_name: str, model: nn.Module) -> Identity:
    """The identity of an evaluation of ``model``, as it is now, on a data set.

    Raises:
        FileNotFoundError: the data set's json is not on disk.
    """
    config = {key: cfg.get(key) for key in ("MODEL", "TEST", "IMPORTS")}
    config["INPUT"] = {key: cfg.INPUT[key] for key in _INPUT}
    facts = {
        "format": _FORMAT,
        "data set": dataset_name,
        "json": _dataset_hash(dataset_name),
        "weights": weights_hash(model),
        "code": _code_hash(cfg.get("IMPORTS") or ()),
        "software": f"vis {vis.__version__}, detectron2 {detectron2.__version__}, torch {torch.__version__}",
        "device": next((tensor.device.type for tensor in model.state_dict().values()), "cpu"),
        # the one variable of the environment that chooses among implementations
        "VIS_MS_DEFORM_ATTN": os.environ.get("VIS_MS_DEFORM_ATTN", ""),
    }
    return Identity(facts, dict(_leaves(config)))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in sorted(tree.items()):
        if key in _WITHOUT.get(prefix.rstrip("."), ()):
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits of the content of a model's state, wherever it lies; 0.5 to 1 s per gigabyte."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # a module's extra state
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _dataset_hash(name: str) -> str:
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    digest = hashlib.sha256(repr(metadata.get("video_ids")).encode())
    if json_file is not None:
        digest.update(Path(json_file).read_bytes())
    else:  # records of other code
        keys = ("video_id", "height", "width", "length", "file_names")
        for record in DatasetCatalog.get(name):
            digest.update(repr([record.get(key) for key in keys]).encode())
    return digest.hexdigest()[:16]


def _source_hash() -> str:
    """Of the source that results depend on: whoever changes a model and evaluates again must not see old results."""
    files = [path for folder in _FOLDERS for path in (_ROOT / folder).rglob("*") if path.suffix in _SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted([*files, *_ROOT.glob("_C*")]):
        digest.update(f"{path.relative_to(_ROOT)}\n".encode())
        with contextlib.suppress(FileNotFoundError):  # an editor's file that was there for a moment
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# When this is imported, not when an evaluation begins: a training of days runs the source of its start. Takes 10 ms.
_SOURCE = _source_hash()


def _code_hash(imports: Sequence[str]) -> str:
    """Of this project's source and of the parts that ``IMPORTS`` names."""
    digest = hashlib.sha256(_SOURCE.encode())
    for name in imports:
        source = name if name.endswith(".py") else getattr(sys.modules.get(name), "__file__", None)
        digest.update(f"{name}\n".encode())
        digest.update(Path(source).read_bytes() if source else b"")
    return digest.hexdigest()[:16]


def prepare_parts(output_dir: str | Path, identity: Identity | None, *, resume: bool = True) -> frozenset[int]:
    """Make the folder of parts ready: keep those of the same evaluation, remove all others. For one process, before any
    other writes.

    Args:
        output_dir: folder of the evaluation.
        identity: of the evaluation that begins; None keeps nothing.
        resume: False starts anew whatever is there.

    Returns:
        Ids of the videos that are finished.

    Raises:
        ResultsWriteError: the folder cannot be made or changed.
    """
    folder = parts_folder(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(folder)
        remove_temporary_files(folder.parent)
        if identity is not None and resume and _continues(folder, identity):
            finished = frozenset(_finished(folder, identity.key))
            if finished:
                same = "same data set, config, weights and code; TEST.RESUME False starts anew"
                logger.info("%s holds %d finished videos of this evaluation (%s)", folder, len(finished), same)
            return finished
        for path in part_files(folder).values():
            path.unlink()
        write_json(folder / RUN_FILE, {"key": ""} if identity is None else identity.content())
    except ResultsWriteError:
        raise
    except OSError as error:
        raise ResultsWriteError(explain(error, f"{folder} cannot be prepared", "Nothing was computed yet.")) from error
    return frozenset()


def _continues(folder: Path, identity: Identity) -> bool:
    earlier: Any = None
    with contextlib.suppress(FileNotFoundError, ValueError):  # not there, or damaged: it says nothing
        earlier = json.loads((folder / RUN_FILE).read_bytes())
    earlier = earlier if isinstance(earlier, dict) else {}
    if earlier.get("key") == identity.key:
        return True
    if parts := len(part_files(folder)):
        why = "; ".join(identity.differences(earlier))
        logger.info("starting anew: the %d finished videos in %s are of another evaluation (%s)", parts, folder, why)
    return False


def _finished(folder: Path, key: str) -> Iterator[int]:
    """Videos whose part is whole and of this evaluation; other parts are removed."""
    for video_id, path in part_files(folder).items():
        try:
            if part_header(path).get("run") == key:
                yield video_id
                continue
            logger.warning("%s is of another evaluation: video %d is computed again", path, video_id)
        except DamagedPart:
            logger.warning("%s is damaged: video %d is computed again", path, video_id)
        path.unlink()
