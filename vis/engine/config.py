"""``load_cfg``: one frozen configuration from defaults, declared keys, a method's defaults, yaml files and overrides.

Order of merging, later wins: detectron2's and vis' shared defaults < the keys each part declares < ``DEFAULTS`` of the
meta-architecture < ``_BASE_`` files (in the order given) < the yaml < the command line.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.modeling import META_ARCH_REGISTRY

from vis.config import CfgNode, closest, get_cfg
from vis.config.compat import translate

logger = logging.getLogger(__name__)

BASE_KEY = "_BASE_"
# Packages whose import declares the keys of their parts.
_PARTS = ("vis.data", "vis.modeling", "vis.solver", "vis.evaluation", "vis.checkpoint", "vis.visualization")
_ENGINE_PARTS = ("vis.engine.nonfinite", "vis.engine.ema", "vis.engine.best_checkpoint")

Tree = dict[str, Any]


def load_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read ``config_file`` with its bases, apply ``opts`` (``KEY VALUE KEY VALUE ...``) and return a frozen tree.

    Raises:
        FileNotFoundError: the file or one of its bases does not exist.
        ValueError: a file is not plain yaml, a key is unknown (the message names the closest one), a value has the
            wrong type, ``opts`` is not pairs, or bases form a circle.
    """
    tree = read_yaml_tree(config_file)
    for module in (*_PARTS, *_ENGINE_PARTS):
        importlib.import_module(module)
    tree, messages = translate(tree)
    overrides, more = translate(_tree_of_opts(opts))
    for message in dict.fromkeys([*messages, *more]):
        logger.info("%s: %s", config_file, message)
    _import_parts(overrides.get("IMPORTS", tree.get("IMPORTS", [])))

    cfg = get_cfg()
    name = _value(overrides, "MODEL", "META_ARCHITECTURE") or _value(tree, "MODEL", "META_ARCHITECTURE")
    _merge(cfg, _method_defaults(name or cfg.MODEL.META_ARCHITECTURE), f"DEFAULTS of {name}")
    _merge(cfg, tree, str(config_file))
    _merge(cfg, overrides, "the command line")
    _follow_data_sets(cfg, explicit=_has_num_classes(tree) or _has_num_classes(overrides))
    cfg.freeze()
    return cfg


def read_yaml_tree(path: str | os.PathLike[str], _chain: tuple[Path, ...] = ()) -> Tree:
    """The nested dict of a yaml file, merged over its ``_BASE_`` files (one or a list, relative to the file)."""
    file = Path(path).expanduser()
    if not file.is_file():
        via = f" (named as {BASE_KEY} in {_chain[-1]})" if _chain else ""
        raise FileNotFoundError(
            f"config file {str(path)!r} does not exist{via}; configs/ holds the ones of this project"
        )
    file = file.resolve()
    if file in _chain:
        raise ValueError(f"{BASE_KEY} goes in a circle: {' -> '.join(str(f) for f in (*_chain, file))}")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as plain yaml (python tags are refused): {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds a {type(tree).__name__}, expected a tree of KEY: value")
    if isinstance(tree.get("IMPORTS"), list):  # a file means the same wherever a yaml is used as a base
        tree["IMPORTS"] = [_beside(file, name) for name in tree["IMPORTS"]]
    bases = tree.pop(BASE_KEY, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{file}: {BASE_KEY} must be a file name or a list of them, found {bases!r}")
    merged: Tree = {}
    for base in bases:
        base_path = Path(os.path.expanduser(base))
        _update(merged, read_yaml_tree(file.parent / base_path, (*_chain, file)))
    _update(merged, tree)
    return merged


def _beside(file: Path, name: Any) -> Any:
    return str(file.parent / Path(name).expanduser()) if isinstance(name, str) and name.endswith(".py") else name


def _update(into: Tree, tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(into.get(key), dict) and (value is None or isinstance(value, Mapping)):
            _update(into[key], value or {})  # None: a group that is named without a key in it
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _value(tree: Any, *path: str) -> Any:
    """The value at ``path``, None where the tree has none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _tree_of_opts(opts: Sequence[str]) -> Tree:
    if len(opts) % 2:
        raise ValueError(
            f"overrides must be pairs KEY VALUE KEY VALUE ..., got an odd number: {' '.join(map(str, opts))}"
        )
    tree: Tree = {}
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if str(key).startswith("-"):
            raise ValueError(
                f"{key!r} stands where a config KEY is expected: give options (--...) before the KEY VALUE pairs"
            )
        nested = _decode(value)
        for part in reversed(str(key).split(".")):
            nested = {part: nested}
        _update(tree, nested)
    return tree


def _decode(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _import_parts(modules: Any) -> None:
    """Import modules by name, and ``.py`` files by path, once each however often a configuration is loaded."""
    names = modules if isinstance(modules, (list, tuple)) else [modules]
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong or names is not modules:
        raise ValueError(f"IMPORTS must be a list of module names or .py files, found {modules!r}")
    for name in names:
        if not name.endswith(".py"):
            importlib.import_module(name)
            continue
        file = Path(name).resolve()
        if not file.is_file():
            raise FileNotFoundError(f"IMPORTS names {name!r}, but {file} does not exist")
        module = f"vis_imports_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
        if module not in sys.modules:
            _run_file(file, module)


def _run_file(file: Path, module: str) -> None:
    spec = importlib.util.spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"IMPORTS names {file}, which Python cannot load as a module")
    sys.modules[module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[module])
    except BaseException:
        del sys.modules[module]
        raise


def _method_defaults(name: str) -> Tree:
    known = [key for key, _ in META_ARCH_REGISTRY]
    if name not in known:
        raise ValueError(f"MODEL.META_ARCHITECTURE {name!r} is not known.{closest(name, known)} Known: {sorted(known)}")
    return getattr(META_ARCH_REGISTRY.get(name), "DEFAULTS", {})


def _merge(cfg: CfgNode, tree: Tree, source: str) -> None:
    leaves = [
        (path, value)
        for path, value in _leaves(tree)
        if value is not None or not isinstance(_value(cfg, *path), CfgNode)
    ]  # without groups that are named and empty
    for path, value in leaves:
        _check_key(cfg, path, value, source)
    for path, value in leaves:
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(_value(cfg, *path), float):
            value = float(value)  # `BASE_LR: 1` is a number like any other to whoever writes yaml
        try:
            cfg.merge_from_list([".".join(path), value])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _check_key(cfg: CfgNode, path: tuple[str, ...], value: Any, source: str) -> None:
    node: Any = cfg
    for depth, key in enumerate(path):
        dotted = ".".join(path[: depth + 1])
        if not isinstance(node, CfgNode):
            raise ValueError(
                f"{source}: {'.'.join(path[:depth])} is a value, not a group of keys, so {dotted} cannot be set"
            )
        if key not in node:
            raise ValueError(f"{source}: unknown config key {dotted}.{closest(key, node)}")
        node = node[key]
    if value is None and node is not None:
        raise ValueError(f"{source}: {'.'.join(path)} has no value; give one like {node!r}, or leave the key out")
    if isinstance(node, CfgNode):
        raise ValueError(f"{source}: {'.'.join(path)} is a group of keys, it cannot be set to {value!r}")


def _has_num_classes(tree: Tree) -> bool:
    return bool(_value(tree, "MODEL", "SEM_SEG_HEAD", "NUM_CLASSES"))


def _follow_data_sets(cfg: CfgNode, explicit: bool) -> None:
    """Register the data sets that the yaml describes, and take the number of classes from the data where it is free."""
    from vis.data.custom import num_classes_of, register_custom

    custom = {entry["NAME"] for entry in cfg.DATASETS.CUSTOM if isinstance(entry, Mapping) and "NAME" in entry}
    register_custom(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    names = [*cfg.DATASETS.TRAIN[-1:], *cfg.DATASETS.TEST[:1]]
    if not names or (explicit and names[0] not in custom):
        return
    found = num_classes_of(names[0])
    if explicit and found != head.NUM_CLASSES:
        logger.warning("NUM_CLASSES %d is replaced by %d: %s has %d", head.NUM_CLASSES, found, names[0], found)
    head.NUM_CLASSES = found
