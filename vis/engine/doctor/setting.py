"""What a configuration asks for: data sets, classes, room on the disk, weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from vis.checkpoint import build_class_map, load_weights
from vis.config import CfgNode
from vis.data.categories import class_names
from vis.data.custom import num_classes_of
from vis.data.registration import get_dataset
from vis.data.ytvis_check import check_ytvis_json
from vis.engine.doctor.findings import Finding, bad, good, note

GIB = 2**30
_SHOWN = 3


def check_data(cfg: CfgNode) -> Iterator[Finding]:
    """Every data set that is named: on disk, and everything that ``tools/check_dataset.py`` checks."""
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        yield _data_set(name, trained=name in cfg.DATASETS.TRAIN)


def _data_set(name: str, trained: bool) -> Finding:
    what = "data"
    try:
        dataset = get_dataset(name)
        json_file, image_root = dataset.json_file, dataset.image_root
    except FileNotFoundError as error:
        made = "python datasets/prepare_synthetic.py makes it" if name.startswith("synthetic_") else ""
        return bad(what, f"{name}: {error}", made)
    except ValueError as error:
        return bad(what, f"{name}: {error}")
    report = check_ytvis_json(json_file, image_root, file_format=dataset.file_format, expected=dataset.expected)
    if report.errors:
        shown = "\n".join(f"- {problem}" for problem in report.errors[:_SHOWN])
        more = len(report.errors) - _SHOWN
        return bad(
            what,
            f"{name}: {len(report.errors)} problems in {json_file}\n{shown}" + (f"\n... {more} more" * (more > 0)),
            f"python tools/check_dataset.py {name} lists all of them",
        )
    tracks = sum(report.instances.values())
    text = f"{name}: {len(report.lengths)} videos, {sum(report.lengths)} frames, {tracks} instances"
    if trained and not tracks:
        return bad(what, text, "there is nothing to train on: DATASETS.TRAIN needs annotations")
    if not report.annotated:
        return note(what, f"{text}; no annotations", "no AP is computed on it: the results are written for a server")
    if report.warnings:
        return note(what, f"{text}; {len(report.warnings)} warnings, the first: {report.warnings[0]}")
    return good(what, text)


def check_classes(cfg: CfgNode) -> Iterator[Finding]:
    """NUM_CLASSES against the data sets, and those against one another."""
    own = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    lists: dict[str, list[str]] = {}
    for name in [*cfg.DATASETS.TRAIN[-1:], *cfg.DATASETS.TEST]:
        try:
            lists[name] = class_names(get_dataset(name).known_categories())
        except (FileNotFoundError, ValueError):
            continue  # said by check_data
        found = num_classes_of(name)
        if found != own:
            yield bad(
                "classes",
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {own}, {name} has {found}",
                f"set MODEL.SEM_SEG_HEAD.NUM_CLASSES {found}, or leave the key out: it follows the data",
            )
            return
    if len({tuple(names) for names in lists.values()}) > 1:
        yield bad(
            "classes",
            f"the class lists of {' and '.join(lists)} differ",
            "a model is tested on the classes that it is trained on: name data sets of one list",
        )
    elif lists:
        yield good("classes", f"{own}, as in {', '.join(lists)}")


def check_disk(cfg: CfgNode, state_bytes: int) -> Finding:
    """Room in OUTPUT_DIR for checkpoints, and the right to write there.

    Args:
        state_bytes: of one checkpoint.
    """
    what, folder = "disk", Path(cfg.OUTPUT_DIR).absolute()
    present = next(place for place in (folder, *folder.parents) if place.exists())
    if not present.is_dir():
        return bad(what, f"{present} is a file, and OUTPUT_DIR {folder} would be in it", "choose another OUTPUT_DIR")
    try:
        with tempfile.NamedTemporaryFile(dir=present, prefix=".vis_doctor_"):
            pass
    except OSError as error:
        return bad(what, f"nothing can be written to {present}: {error}", "choose another OUTPUT_DIR")
    free = shutil.disk_usage(present).free
    solver = cfg.SOLVER
    count = solver.MAX_ITER // solver.CHECKPOINT_PERIOD
    count = (min(count, solver.CHECKPOINT_KEEP + 1) if solver.CHECKPOINT_KEEP else count) + 1
    text = f"{free / GIB:.1f} GiB free for {count} checkpoints of {state_bytes / GIB:.2f} GiB in {folder}"
    if free < 2 * state_bytes:  # one is written whole before another is replaced
        return bad(what, text, "make room, or choose an OUTPUT_DIR on another disk")
    if free < count * state_bytes:
        fit = max(int(free // state_bytes) - 2, 1)
        return note(what, text, f"SOLVER.CHECKPOINT_KEEP {fit} keeps only the last {fit}, which fit")
    return good(what, text)


def check_weights(cfg: CfgNode, model: nn.Module, *, download: bool = False) -> Finding:
    """MODEL.WEIGHTS: there, whole, and of a stage that this training starts from; they are loaded into ``model``."""
    what, path = "weights", cfg.MODEL.WEIGHTS
    if not path:
        return note(what, "MODEL.WEIGHTS is empty: training starts from initial weights")
    if "://" in path and not download:
        return note(what, f"{path} is fetched when the training starts", "--download fetches and checks it now")
    allowed = tuple(cfg.MODEL.WEIGHTS_ALLOW_MISSING)
    try:
        report = load_weights(model, path, allow_missing=allowed, class_map=build_class_map(cfg))
    except FileNotFoundError as error:
        return bad(what, str(error), "MODEL_ZOO.md says where weights come from")
    except ValueError as error:
        return bad(what, str(error), "MODEL_ZOO.md says which weights each stage starts from")
    broken = [name for name, value in model.state_dict().items() if not _finite(value)]
    if broken:
        return bad(what, f"{path} holds numbers that are not finite: {', '.join(broken[:5])}", "take another file")
    return good(what, report.summary())


def _finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def checkpoint_bytes(model: nn.Module, optimizer: str) -> int:
    """Bytes of a checkpoint: weights, and what the optimizer keeps of each trained parameter."""
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return state + trained * (2 if optimizer == "ADAMW" else 1)
