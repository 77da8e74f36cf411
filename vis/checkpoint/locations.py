"""From a path or an address to a file on this machine."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from detectron2.utils.file_io import PathManager

_ADDRESSES = ("https://", "http://", "detectron2://", "catalog://", "hf://")
_HUB = re.compile(r"^hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+?))?/(?P<file>[^@]+)$")


def local_path(path: str | PathLike[str]) -> Path:
    """The file behind a path or an address.

    Addresses: ``https://``, ``http://`` and ``detectron2://`` (downloaded once, to ``FVCORE_CACHE``);
    ``hf://owner/repository/path/in/it`` or ``hf://owner/repository@revision/path`` (by huggingface_hub, to its cache).

    Raises:
        FileNotFoundError: no such file, or the download failed.
        ValueError: an address of another kind, or huggingface_hub is needed and not installed.
    """
    name = str(path)
    if "://" in name:
        if not name.startswith(_ADDRESSES):
            raise ValueError(f"{name}: weights come from a path or from {', '.join(_ADDRESSES)}")
        if name.startswith("hf://"):
            return _from_hub(name)
        try:
            return Path(PathManager.get_local_path(name))
        except Exception as error:  # a dozen kinds of network errors, none of them ours
            raise _not_downloaded(name, error) from error
    file = Path(name).expanduser()
    if file.is_dir():
        raise FileNotFoundError(f"{name} is a folder, expected a file of weights (.pth, .pt, .safetensors or .pkl)")
    if not file.is_file():
        near = sorted(item.name for item in file.parent.glob("*.p*") if item.is_file()) if file.parent.is_dir() else []
        hint = f"that folder holds {', '.join(near[:8])}" if near else f"looked from {Path.cwd()}"
        raise FileNotFoundError(f"weights file {name} does not exist ({hint})")
    return file


def _not_downloaded(name: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name} could not be downloaded ({type(error).__name__}: {error}). Download it elsewhere and give "
        "the path of the file"
    )


def _from_hub(name: str) -> Path:
    match = _HUB.match(name)
    if match is None or ".." in match["file"].split("/"):
        raise ValueError(f"{name} is no address of a file on the Hugging Face hub: hf://owner/repository/path/in/it")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        revision = match["revision"] or "main"
        raise ValueError(
            f"{name} needs the package huggingface_hub: pip install huggingface_hub. Or download "
            f"https://huggingface.co/{match['repo']}/resolve/{revision}/{match['file']} and give the path of the file"
        ) from error
    try:
        return Path(hf_hub_download(repo_id=match["repo"], filename=match["file"], revision=match["revision"]))
    except Exception as error:  # the hub's own errors, and those of the network below it
        raise _not_downloaded(name, error) from error
