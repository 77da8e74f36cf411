"""Small yaml files of our own (sweeps, recipes): read safely, unknown keys refused with the closest known one."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from vis.config import closest

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._=+,-]*$")


def read_plain_yaml(path: str | Path, known: Collection[str], what: str) -> dict[str, Any]:
    """The mapping in a yaml file.

    Args:
        known: the keys that it may have.
        what: what the file is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not plain yaml, not a mapping, or has an unknown key.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as plain yaml (python tags are refused): {error}") from error
    return check_keys(tree, known, f"{file}")


def check_keys(tree: Any, known: Collection[str], where: str) -> dict[str, Any]:
    """``tree``, which must be a mapping with known keys only.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected KEY: value pairs, found {tree!r}")
    for key in tree:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}.{closest(str(key), known)} Known here: {', '.join(sorted(known))}"
            )
    return dict(tree)


def check_type(value: Any, wanted: type | tuple[type, ...], where: str, words: str) -> Any:
    """``value``, which must be of a type; ``words`` say which.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in _types(wanted)):
        raise ValueError(f"{where} must be {words}, found {value!r}")
    return value


def _types(wanted: type | tuple[type, ...]) -> tuple[type, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)


def check_name(name: Any, where: str) -> str:
    """``name``, which becomes the name of a folder.

    Raises:
        ValueError: it holds other characters than a folder's name should.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise ValueError(f"{where}: {name!r} becomes a folder: use letters, digits and . _ = + , - only")
    return name


def beside(file: Path, name: Any, where: str) -> Path:
    """A file that ``file`` names relative to itself, as ``_BASE_`` does.

    Raises:
        ValueError: the name is not text. FileNotFoundError: there is no such file.
    """
    path = file.parent / Path(check_type(name, str, where, "a file name")).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{where}: {name!r} does not exist (looked for {path}; it is relative to {file.name})")
    return path


def override_words(overrides: Any, where: str) -> list[str]:
    """``KEY VALUE KEY VALUE ...`` of a mapping of dotted or nested keys, as the command line takes them.

    Raises:
        ValueError: it is not a mapping, or a key has no value.
    """
    words: list[str] = []
    for key, value in check_type(overrides or {}, Mapping, where, "a mapping KEY: value").items():
        if isinstance(value, Mapping):
            inner = override_words(value, f"{where}.{key}")
            words += [word if i % 2 else f"{key}.{word}" for i, word in enumerate(inner)]
            continue
        if value is None:
            raise ValueError(f'{where}: {key} has no value; an empty text is written ""')
        words += [str(key), _word(value)]
    return words


def _word(value: Any) -> str:
    """Text that the command line reads back as ``value``."""
    if not isinstance(value, str):
        return repr(value)
    try:
        literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)  # the text "1" is not the number
