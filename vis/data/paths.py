"""Where data sets lie, and paths from a json that must not leave their folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

ROOT_VARIABLE = "DETECTRON2_DATASETS"


def datasets_root() -> str:
    """The folder of all data sets: ``DETECTRON2_DATASETS``, default ``./datasets``. Read anew at every call."""
    return os.path.abspath(os.path.expanduser(os.environ.get(ROOT_VARIABLE) or "datasets"))


def expand(path: str) -> str:
    """An absolute path: ``~`` and ``$VARIABLES`` replaced, a relative one is relative to :func:`datasets_root`.

    Raises:
        ValueError: the path is empty, or a variable in it is not set.
    """
    if not path:
        raise ValueError("an empty path; give a file or folder, absolute or relative to $DETECTRON2_DATASETS")
    expanded = os.path.expanduser(os.path.expandvars(path))
    missing = re.search(r"\$\{?(\w+)\}?", expanded)
    if missing:
        raise ValueError(
            f"the path {path!r} uses the environment variable {missing.group(1)}, which is not set; set it"
        )
    return os.path.normpath(os.path.join(datasets_root(), expanded))


def first_existing(candidates: Sequence[str], *, what: str, name: str, folder: bool) -> str:
    """The first candidate that exists, as an absolute path.

    Args:
        candidates: paths as :func:`expand` takes them, the preferred one first.
        what: what is looked for, for the message ("annotation file").
        name: name of the data set, for the message.
        folder: look for a folder rather than a file.

    Raises:
        FileNotFoundError: none exists; the message lists all that were tried.
    """
    tried = [expand(candidate) for candidate in candidates]
    for path in tried:
        if os.path.isdir(path) if folder else os.path.isfile(path):
            return path
    places = "".join(f"\n  {path}" for path in tried)
    raise FileNotFoundError(
        f"data set {name!r}: found no {what}. Tried:{places}\n"
        f"Data sets are looked for under {datasets_root()} (set {ROOT_VARIABLE} to change it); "
        "datasets/README.md describes where each data set comes from and how its folder must look."
    )


def unsafe_reason(name: str) -> str | None:
    """Why a file name from a json may not be used below an image root, or None where it may."""
    if not name or "\0" in name:
        return "is empty or holds a zero byte"
    if os.path.isabs(name):
        return "is absolute; names must be relative to the image root"
    if ".." in name.replace("\\", "/").split("/"):
        return "holds '..'; names must stay inside the image root"
    return None


class ImageFolder:
    """Answers quickly whether files named by a json exist below an image root and stay inside it.

    Every folder is listed once, which is far cheaper than asking for each frame on its own.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self._real_root = os.path.realpath(root)
        self._listings: dict[str, dict[str, bool] | None] = {}

    def problem(self, name: str) -> str | None:
        """``"missing"``, ``"outside"`` (a link leads out of the root) or None, for a safe, relative file name."""
        folder, _, base = name.rpartition("/")
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        listing = self._listings[folder]
        if listing is None:
            return "outside"
        if base not in listing:
            return "missing"
        is_link = listing[base]
        if is_link:
            target = os.path.realpath(os.path.join(self.root, name))
            if not self._inside(target):
                return "outside"
            if not os.path.isfile(target):
                return "missing"
        return None

    def _list(self, folder: str) -> dict[str, bool] | None:
        """File name -> whether it is a link; None where the folder itself leads out of the root."""
        path = os.path.join(self.root, folder)
        if not self._inside(os.path.realpath(path)):
            return None
        try:
            with os.scandir(path) as entries:
                return {entry.name: entry.is_symlink() for entry in entries if entry.is_symlink() or entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _inside(self, real_path: str) -> bool:
        return real_path == self._real_root or real_path.startswith(self._real_root.rstrip(os.sep) + os.sep)
