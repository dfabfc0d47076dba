"""A Hub on the loopback: repositories, commits, large files and downloads, as huggingface_hub asks.

Not spoken: xet, multipart uploads, pull requests. `HF_HUB_DISABLE_XET=1` keeps the client to this.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png")
ALICE, BOB, READER = "hf_aliceSecret0001", "hf_bobSecret0002", "hf_readerSecret0003"


class Refused(Exception):  # noqa: N818
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repo:
    """Every commit is the whole tree: content by file name."""

    owner: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # stored by SHA-256, committed or not
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return sha


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Who may do what, what is stored, what was asked, and where connections break off."""

    def __init__(self) -> None:
        self.users = {ALICE: "alice", BOB: "bob", READER: "alice"}
        self.namespaces = {"alice": {"alice", "org"}, "bob": {"bob"}}
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.headers: list[str] = []  # the Authorization header of each request
        self.received: dict[str, int] = {}  # bytes of large files by SHA-256
        self.served: dict[str, int] = {}  # bytes of downloads by file name
        self.meddled: set[str] = set()  # repositories that another user pushes to meanwhile
        self.cut_uploads: set[str] = set()  # SHA-256 of what breaks off half way
        self.cut_downloads: set[str] = set()  # names of what does
        self.flipped: set[str] = set()  # names of what arrives with a byte changed
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, home: Path, token: str | None = ALICE) -> dict[str, str]:
        """Environment variables for a process that uses this Hub and no other."""
        given = {"HF_TOKEN": token} if token else {}
        client = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        return {**client, **given, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def clear(self) -> None:
        """Forget the repositories, what was counted, and what was to go wrong."""
        switches = (self.meddled, self.cut_uploads, self.cut_downloads, self.flipped)
        counts = (self.asked, self.headers, self.received, self.served)
        for store in (self.repos, *switches, *counts):
            store.clear()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def repo(self, name: str, user: str | None, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        mine = repo is not None and repo.owner in self.namespaces.get(user or "", ())
        if repo is None or (repo.private and not mine):
            # The real one tells a stranger nothing either.
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not mine:
            raise Refused(403, "You are not allowed to write to this repository")
        return repo


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} /{path}")
        self.hub.headers.append(self.headers.get("Authorization", ""))
        try:
            self._route(path.split("/"))
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._send({"error": str(refused)}, refused.status, headers)

    def _route(self, parts: list[str]) -> None:
        match self.command, parts:
            case "PUT", ["lfs", *name, oid]:
                return self._store("/".join(name), oid)  # signed by its address: no token
        user, may_write = self._who()
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                self._send({"name": user, "type": "user"})
            case "POST", ["api", "validate-yaml"]:
                self._validate(self._json()["content"])
            case "POST", ["api", "repos", "create"]:
                self._create(self._json(), user, may_write)
            case "GET", ["api", "models", org, name]:
                self._info(f"{org}/{name}", "main", user)
            case "GET", ["api", "models", org, name, "revision", revision]:
                self._info(f"{org}/{name}", revision, user)
            case "GET", ["api", "models", org, name, "tree", revision]:
                repo = self.hub.repo(f"{org}/{name}", user)
                files = repo.commits[repo.at(revision)].items()
                self._send([{"type": "file", **_entry(path, d, "path")} for path, d in files])
            case "POST", ["api", "models", org, name, "branch", branch]:
                repo = self._writable(f"{org}/{name}", user, may_write)
                if branch in repo.branches:
                    raise Refused(409, "Reference already exists")
                repo.branches[branch] = repo.head
                self._send({})
            case "POST", ["api", "models", org, name, "preupload", branch]:
                repo = self._writable(f"{org}/{name}", user, may_write)
                if f"{org}/{name}" in self.hub.meddled:
                    repo.commit({**repo.files, "theirs": b""})
                present = repo.commits[repo.at(branch)]
                self._send({"files": [_mode(f["path"], present) for f in self._json()["files"]]})
            case "POST", ["api", "models", org, name, "commit", branch]:
                repo = self._writable(f"{org}/{name}", user, may_write)
                self._commit(f"{org}/{name}", repo, branch)
            case "POST", [org, git, "info", "lfs", "objects", "batch"]:
                name = f"{org}/{git.removesuffix('.git')}"
                self._batch(name, self._writable(name, user, may_write))
            case (("GET" | "HEAD"), [org, name, "resolve", revision, *path]):
                self._resolve(self.hub.repo(f"{org}/{name}", user), revision, "/".join(path))
            case _:
                raise Refused(404, f"no such address: {self.command} {parts}")

    def _who(self) -> tuple[str | None, bool]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token), token != READER

    def _writable(self, name: str, user: str | None, may_write: bool) -> Repo:
        repo = self.hub.repo(name, user, write=True)
        if not may_write:
            raise Refused(403, "This token has no write access")
        return repo

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self):
        return json.loads(self._body())

    def _send(self, value: object, status: int = 200, headers: dict[str, str] | None = None):
        data = json.dumps(value).encode()
        self._begin(status, {"Content-Type": "application/json", **(headers or {})}, len(data))
        self.wfile.write(data if self.command != "HEAD" else b"")

    def _begin(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()

    def _validate(self, content: str) -> None:
        head = content.split("---\n")[1] if content.startswith("---\n") else ""
        found = yaml.safe_load(head) or {}
        for result in (r for entry in found.get("model-index", ()) for r in entry["results"]):
            whole = {"type", "name"} <= result["dataset"].keys() and "type" in result["task"]
            if not whole or not all({"type", "value"} <= m.keys() for m in result["metrics"]):
                problem = {"message": "model-index is not valid"}
                return self._send({"errors": [problem], "warnings": []}, 400)
        missing = [{"message": "empty metadata"}] if not found else []
        return self._send({"errors": [], "warnings": missing})

    def _create(self, wanted: dict, user: str | None, may_write: bool) -> None:
        owner = wanted.get("organization") or user
        if user is None or not may_write or owner not in self.hub.namespaces[user]:
            raise Refused(403 if user else 401, f"You cannot create a model under {owner}")
        name = f"{owner}/{wanted['name']}"
        address = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repos:
            return self._send({"error": "You already created this model repo", **address}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[name] = Repo(owner, private)
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send(address)

    def _info(self, name: str, revision: str, user: str | None) -> None:
        repo = self.hub.repo(name, user)
        sha = repo.at(revision)
        siblings = [_entry(path, data, "rfilename") for path, data in repo.commits[sha].items()]
        self._send({"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def _batch(self, name: str, repo: Repo) -> None:
        objects = []
        for found in self._json()["objects"]:
            action = {"upload": {"href": f"{self.hub.address}/lfs/{name}/{found['oid']}"}}
            stored = {} if found["oid"] in repo.large else {"actions": action}
            objects.append({"oid": found["oid"], "size": found["size"], **stored})
        self._send({"transfer": "basic", "objects": objects})

    def _store(self, name: str, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        data = self.rfile.read(size // 2 if oid in self.hub.cut_uploads else size)
        self.hub.received[oid] = self.hub.received.get(oid, 0) + len(data)
        if len(data) < size:
            self.close_connection = True
            return  # no answer, and the rest is not read
        if sha256(data) != oid:
            raise Refused(400, "Content does not match its hash")
        self.hub.repos[name].large[oid] = data
        self._begin(200, {}, 0)

    def _commit(self, name: str, repo: Repo, branch: str) -> None:
        head = repo.at(branch)
        files = dict(repo.commits[head])
        for line in self._body().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header" and value.get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in repo.large:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = repo.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, branch)
        self._send({"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha})

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha = repo.at(revision)
        if path not in repo.commits[sha]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = repo.commits[sha][path]
        tag = sha256(data) if path.endswith(LARGE) else git_hash(data)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path in self.hub.flipped:
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin, status = 0, 200
        if wanted := self.headers.get("Range"):
            begin, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._begin(status, headers, len(data) - begin)
        if self.command == "GET":
            end = len(data) // 2 if path in self.hub.cut_downloads else len(data)
            self.wfile.write(data[begin:end])
            self.wfile.flush()
            self.hub.served[path] = self.hub.served.get(path, 0) + max(0, end - begin)


def _entry(path: str, data: bytes, key: str) -> dict[str, object]:
    entry: dict[str, object] = {key: path, "size": len(data), "oid": git_hash(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": (o := sha256(data)), "sha256": o, "size": len(data)}
        entry["lfs"]["pointerSize"] = 100  # type: ignore[index]
    return entry


def _mode(path: str, present: dict[str, bytes]) -> dict[str, object]:
    large, data = path.endswith(LARGE), present.get(path)
    known = {} if data is None else {"oid": sha256(data) if large else git_hash(data)}
    mode = "lfs" if large else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}
