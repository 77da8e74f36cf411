"""Where weights come from: paths, web addresses, the Hugging Face hub."""

from __future__ import annotations

import http.server
import sys
import threading
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vis.checkpoint import load_weights, read_weights


class _Quiet(http.server.SimpleHTTPRequestHandler):
    requests: list[str] = []

    def log_message(self, *args: Any) -> None:
        self.requests.append(self.path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server of a folder with weights and a login page."""
    folder = tmp_path / "served"
    (folder / "zoo").mkdir(parents=True)
    torch.save({"model": {"weight": torch.ones(2, 3)}}, folder / "zoo" / "model_final_3c8ec9.pkl")
    (folder / "login.pth").write_text("<!DOCTYPE html><html>please log in</html>")
    _Quiet.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


def test_web(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    model = torch.nn.Linear(3, 2, bias=False)
    for _ in range(2):
        report = load_weights(model, f"{server}/zoo/model_final_3c8ec9.pkl")
    assert model.weight.tolist() == [[1.0] * 3] * 2
    assert report.path.startswith(server)
    assert len(_Quiet.requests) == 1, "the second time it is there"
    with pytest.raises(ValueError, match=r"cache.*login.pth is a web page, not weights"):
        read_weights(f"{server}/login.pth")
    with pytest.raises(FileNotFoundError, match=r"none.pth could not be downloaded .*404"):
        read_weights(f"{server}/none.pth")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A huggingface_hub that has one file; the calls it got."""
    calls: list[dict[str, Any]] = []
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "hub.pth")

    def hf_hub_download(**options: Any) -> str:
        calls.append(options)
        if options["filename"] == "none.pth":
            raise OSError("404: no such entry")
        return str(tmp_path / "hub.pth")

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_hub(hub: list[dict[str, Any]]) -> None:
    assert read_weights("hf://deahuang/MinVIS-Model-Zoo/minvis_ovis_R50.pth").state["weight"].shape == (2, 3)
    read_weights("hf://zhangtao-whu/DVIS_Plus@v1.0/sub/folder/ctvis_r50.pth")
    assert hub == [
        {"repo_id": "deahuang/MinVIS-Model-Zoo", "filename": "minvis_ovis_R50.pth", "revision": None},
        {"repo_id": "zhangtao-whu/DVIS_Plus", "filename": "sub/folder/ctvis_r50.pth", "revision": "v1.0"},
    ]
    with pytest.raises(FileNotFoundError, match="none.pth could not be downloaded .OSError: 404"):
        read_weights("hf://owner/repository/none.pth")


@pytest.mark.parametrize("address", ["hf://owner/file.pth", "hf://owner", "hf://a/b/../c.pth", "hf://a b/c/d.pth"])
def test_what_is_no_address_of_the_hub(address: str, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="is no address of a file on the Hugging Face hub: hf://owner/repository/path"):
        read_weights(address)
    assert not hub


def test_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"pip install huggingface_hub.*https://huggingface.co/a/b/resolve/main/c/d.pth"
    ):
        read_weights("hf://a/b/c/d.pth")


def test_other_addresses() -> None:
    with pytest.raises(ValueError, match="s3://bucket/w.pth: weights come from a path or from https://"):
        read_weights("s3://bucket/w.pth")
