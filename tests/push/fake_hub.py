"""A hub in a thread: repositories, branches, commits and large files in memory, behind the addresses that huggingface_hub asks.

It takes what the client sends and keeps it, so that what it "holds" is what really came over a socket. A test can let a
request fail (`refuse`), hold an upload until its sender is dead (`hold`), or change a file as it is stored (`spoiled`).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_testtokentesttoken"


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[dict] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class FakeHub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: Counter[str] = Counter()
        self.asked: list[str] = []
        self.refusals: list[tuple[str, int, str]] = []
        self.large = (".safetensors", ".gguf", ".bin")
        self.held: str | None = None
        self.spoiled: str | None = None
        self.breaks: str | None = None
        self.arrived, self.released = threading.Event(), threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def refuse(self, what: str, status: int, message: str = "") -> None:
        """Answer requests whose method and path contain `what` with this status."""
        self.refusals.append((what, status, message))

    def hold(self, data: bytes) -> None:
        """Let the upload of these bytes arrive, and never answer it."""
        self.held = hashlib.sha256(data).hexdigest()

    def make(self, id: str, *, private: bool = True, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[id] = Repo(private)
        self.repos[id].commit("main", {".gitattributes": b"", **(files or {})})
        return self.repos[id]

    def download(self, id: str, folder: Path, revision: str = "main") -> Path:
        for name, data in self.repos[id].files(revision).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a sender that was killed
            super().handle()

    def _answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: int, message: str = "", code: str = "") -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code} if code else None)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _serve(self, method: str) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{method} {path}")
        if self.hub.breaks and self.hub.breaks in f"{method} {path}":
            self.close_connection = True
            return None
        for what, status, message in self.hub.refusals:
            if what in f"{method} {path}":
                return self._error(status, message)
        if path.startswith("/storage/"):  # as on the real hub, a link with its own key and without the token
            return self._store(path.removeprefix("/storage/"), body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Invalid username or password.")
        if path == "/api/validate-yaml":
            bad = "not-a-licence" in json.loads(body)["content"]
            return self._answer(400 if bad else 200, {"errors": [{"message": '"license" must be one of …'}] if bad else [], "warnings": []})  # fmt: skip
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None:
            return self._error(404, "Repository not found", "RepoNotFound")
        return self._repo(repo, f"{owner}/{name}", rest, body)

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _store(self, oid: str, body: bytes) -> None:
        if oid == self.hub.held:
            self.hub.arrived.set()
            self.hub.released.wait(60)
            return None
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.puts[oid] += 1
        self.hub.objects[oid] = body
        return self._answer(200)

    def _create(self, asked: dict) -> None:
        id = f"{asked['organization']}/{asked['name']}"
        if id in self.hub.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{id}"})
        self.hub.make(id, private=asked.get("visibility") == "private")
        return self._answer(200, {"url": f"{self.hub.url}/{id}"})

    def _batch(self, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            have = one["oid"] in self.hub.objects
            actions = {} if have else {"actions": {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}?X-Signature=secretkey"}}}  # fmt: skip
            objects.append({"oid": one["oid"], "size": one["size"], **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _repo(self, repo: Repo, id: str, rest: list[str], body: bytes) -> None:
        what, revision = (*rest, "", "")[0], "/".join(rest[1:]) or "main"
        if what == "branch":
            if revision in repo.branches:
                return self._error(409, "Reference already exists")
            repo.branches[revision] = repo.branches["main"]
            return self._answer(200, {})
        if revision not in repo.branches and revision not in repo.commits:
            return self._error(404, "Revision not found", "RevisionNotFound")
        if what in ("", "revision"):
            sha = repo.branches.get(revision, revision)
            return self._answer(200, {"id": id, "sha": sha, "private": repo.private, "tags": [], "siblings": []})
        if what == "tree":
            return self._answer(200, [self._entry(name, data) for name, data in repo.files(revision).items()])
        if what == "preupload":
            there = repo.files(revision)
            return self._answer(200, {"files": [self._mode(one["path"], there) for one in json.loads(body)["files"]]})
        if what == "commit":
            return self._commit(repo, id, revision, [json.loads(line) for line in body.splitlines()])
        return self._error(404, f"no such address: {what}")

    def _is_large(self, name: str) -> bool:
        return name.endswith(self.hub.large)

    def _mode(self, name: str, there: dict[str, bytes]) -> dict:
        oid = self._oid(name, there[name]) if name in there else None
        return {"path": name, "uploadMode": "lfs" if self._is_large(name) else "regular", "shouldIgnore": False, "oid": oid}  # fmt: skip

    def _oid(self, name: str, data: bytes) -> str:
        if self._is_large(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _entry(self, name: str, data: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(data), "oid": self._oid(name, data)}
        if self._is_large(name):
            entry["lfs"] = {"oid": self._oid(name, data), "size": len(data), "pointerSize": 130}
        return entry

    def _commit(self, repo: Repo, id: str, branch: str, lines: list[dict]) -> None:
        files = dict(repo.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(line["key"])
        if self.hub.spoiled in files:
            files[self.hub.spoiled] += b"x"
        sha = repo.commit(branch, files)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{id}/commit/{sha}", "commitOid": sha})
