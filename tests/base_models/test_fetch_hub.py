"""Fetching base models from a Hub on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fetching import closed_port, hidden, run_fetch
from safetensors.torch import save_file

from hispec.utils.schema import read_json


class Hub:
    """As much of the Hub as a download needs: one model, at one revision."""

    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.declared = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.asked: list[str] = []
        self.open = threading.Event()  # while it is not set, weights do not arrive
        self.open.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.asked.append(path)
                status, data, headers = hub.answer(path)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    if path.endswith(".safetensors"):
                        hub.open.wait()
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        api = "/api/models/org/tiny"
        if path in (api, f"{api}/revision/{self.sha}", f"{api}/revision/v1"):
            listing = [self.entry(name, "rfilename") for name in self.files]
            info = {"id": "org/tiny", "sha": self.sha, "siblings": listing}
            card = {"cardData": {"license": "mit"}}
            return 200, json.dumps({**info, **card}).encode(), {}
        if path == f"{api}/tree/{self.sha}":
            tree = [{"type": "file", **self.entry(name, "path")} for name in self.files]
            return 200, json.dumps(tree).encode(), {}
        name = path.removeprefix(f"/org/tiny/resolve/{self.sha}/")
        if name in self.files:
            headers = {"ETag": f'"{self.declared[name]}"', "X-Repo-Commit": self.sha}
            return 200, self.files[name], headers
        code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
        return 404, b"", {"X-Error-Code": code}

    def entry(self, name: str, key: str) -> dict[str, object]:
        size = len(self.files[name])
        entry: dict[str, object] = {key: name, "size": size, "oid": "0" * 40}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self.declared[name], "size": size, "pointerSize": 100}
            entry["lfs"]["sha256"] = self.declared[name]  # type: ignore[index]
        return entry

    def start(self, name: str, root: Path) -> subprocess.Popen[str]:
        """`fetch` in a process of its own: the Hub's address is read on import."""
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(root.parent / "hf"),
            "NO_PROXY": "127.0.0.1",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(run_fetch(name, root), cwd=ROOT, env=environment, **pipes)

    def fetch(self, name: str, root: Path) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a whole run."""
        process = self.start(name, root)
        out, errors = process.communicate(timeout=120)
        return process.returncode, out, errors


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    save_file({"a.weight": torch.ones(3, dtype=torch.float16)}, tmp_path / "model.safetensors")
    weights = (tmp_path / "model.safetensors").read_bytes()
    hub = Hub(
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"x",
            "LICENSE": b"MIT",
            "README.md": b"not wanted",
            "pytorch_model.bin": b"not wanted",
            "original/model.safetensors": weights,
            "model.safetensors": weights,
        }
    )
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_hub_model_keeps_its_files_and_dtype(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "base"
    code, _, errors = hub.fetch("org/tiny", root)
    assert code == 0, errors
    folder = root / "org--tiny"
    names = {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*names, "provenance.json"}
    assert hidden(root) == []
    record = read_json(folder / "provenance.json")
    assert (record["hub_id"], record["revision"]) == ("org/tiny", hub.sha)
    assert (record["license"], record["dtype"]) == ("mit", ["F16"])
    assert record["downloaded"].keys() == names
    assert record["weights"] == {"model.safetensors": hub.declared["model.safetensors"]}

    asked = len(hub.asked)
    assert "already in" in hub.fetch("org/tiny", root)[1]
    assert len(hub.asked) == asked  # a whole folder needs no network

    assert hub.fetch("org/tiny@v1", root)[0] == 0
    assert read_json(root / "org--tiny@v1" / "provenance.json")["revision"] == hub.sha


def test_hub_download_goes_on_after_a_kill(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "base"
    hub.open.clear()
    process = hub.start("org/tiny", root)
    deadline = time.monotonic() + 60
    while not list(root.glob(".downloads/org--tiny/*/config.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    hub.open.set()
    assert not (root / "org--tiny").exists()

    code, out, errors = hub.fetch("org/tiny", root)
    assert code == 0, errors
    assert "going on with the interrupted download of org/tiny" in out
    assert (root / "org--tiny" / "provenance.json").exists()
    assert hidden(root) == []


def test_names_that_leave_the_folder_are_refused_before_the_download(
    hub: Hub, tmp_path: Path
) -> None:
    hub.files["../evil.json"] = b"{}"
    hub.declared["../evil.json"] = "0" * 64
    code, _, errors = hub.fetch("org/tiny", tmp_path / "base")
    assert code == 1
    assert "ListingError: the Hub's listing of org/tiny: files" in errors
    assert "'../evil.json' is not possible: the name of a file inside its folder" in errors
    assert not any("resolve" in path for path in hub.asked)
    assert not list(tmp_path.rglob("evil.json"))


def test_hub_failures_are_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "base"
    for name in ("org/missing", "org/tiny@v9"):
        _, _, errors = hub.fetch(name, root)
        assert errors.startswith(f"FetchError: {name} could not be downloaded: the Hub has")
    hub.declared["model.safetensors"] = "0" * 64
    assert f"the Hub says {'0' * 64}" in hub.fetch("org/tiny", root)[2]
    del hub.files["model.safetensors"]
    assert "no transformers model" in hub.fetch("org/tiny", root)[2]
    hub.address = f"http://127.0.0.1:{closed_port()}"
    _, _, errors = hub.fetch("org/tiny", root)
    assert "needs the network once" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list(root.glob("org--*"))
