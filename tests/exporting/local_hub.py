"""A model hub on this machine: the few endpoints that a push uses, and the ways in which they refuse.

It keeps what it is sent and counts requests and bytes. Large files come by git-lfs' batch protocol, small
ones inside a commit, as huggingface_hub sends them (2.4.0, read 2026-11-27).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = 20_000
"""Bytes from which a file is large here; the tests' files are small."""


@dataclass
class Repository:
    """What is in a repository: bytes by name."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)


@dataclass
class LocalHub:
    """What the hub knows, what it was asked, and what it refuses."""

    token: str = "hf_RightRightRightRight"
    role: str = "write"
    permissions: list[str] = field(default_factory=lambda: ["repo.content.read", "repo.write"])
    """Of a fine-grained token."""
    name: str = "me"
    orgs: list[str] = field(default_factory=lambda: ["team"])
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    uploaded: int = 0
    """Bytes of large files that came."""
    commits: int = 0
    refuse: dict[str, int] = field(default_factory=dict)
    """Status by the beginning of a request such as `POST /api/repos/create`."""
    break_after: int | None = None
    """Commits after which every other is answered with an error."""


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def answer(self, status: int, content: Any = None, error: str | None = None) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        if error is not None:
            self.send_header("X-Error-Message", error)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_any(self) -> None:
        hub, body = self.hub, self.body()
        path = self.path.split("?")[0]
        request = f"{self.command} {path}"
        hub.asked.append(request)
        refused = next((status for start, status in hub.refuse.items() if request.startswith(start)), None)
        if refused is not None:
            self.answer(refused, error=f"no: {self.headers.get('Authorization')}")
        elif path.startswith("/upload/"):
            hub.objects[path.rpartition("/")[2]] = body
            hub.uploaded += len(body)
            self.answer(200)
        elif self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, error="Invalid username or password.")
        else:
            self.route(path, body)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815

    def route(self, path: str, body: bytes) -> None:
        hub, parts = self.hub, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            orgs = [{"name": name} for name in hub.orgs]
            access: dict[str, Any] = {"accessToken": {"role": hub.role, "displayName": "test"}}
            if hub.role == "fineGrained":
                scope = {"entity": {"type": "user", "name": hub.name}, "permissions": hub.permissions}
                access["accessToken"]["fineGrained"] = {"global": [], "scoped": [scope]}
            self.answer(200, {"type": "user", "name": hub.name, "orgs": orgs, "auth": access})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif "/".join(parts[2:4]) not in hub.repositories:
            self.answer(404, error="Repository not found")
        elif len(parts) == 4:
            self.info("/".join(parts[2:4]))
        elif parts[4] == "preupload":
            wanted = json.loads(body)["files"]
            modes = ["lfs" if file["size"] >= LARGE else "regular" for file in wanted]
            files = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(wanted, modes, strict=True)
            ]
            self.answer(200, {"files": files})
        elif parts[4] == "commit":
            self.commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines() if line])
        else:
            self.answer(404)

    def create(self, wanted: dict[str, Any]) -> None:
        hub = self.hub
        name = f"{wanted.get('organization') or hub.name}/{wanted['name']}"
        if name in hub.repositories:
            self.answer(409, {"url": f"{hub.url}/{name}"}, error="You already created this model repo")
            return
        private = bool(wanted.get("private") or wanted.get("visibility") == "private")
        hub.repositories[name] = Repository(private, {".gitattributes": b"*.safetensors filter=lfs"})
        self.answer(200, {"url": f"{hub.url}/{name}", "name": name})

    def info(self, name: str) -> None:
        repository = self.hub.repositories[name]
        siblings = []
        for path, content in repository.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": _git_hash(content)}
            if len(content) >= LARGE:
                entry |= {"blobId": "0" * 40}  # of the pointer file
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                entry["lfs"]["pointerSize"] = 130
            siblings.append(entry)
        answer = {"id": name, "private": repository.private, "tags": repository.tags, "siblings": siblings}
        self.answer(200, answer | {"sha": "0" * 40, "downloads": 0, "likes": 0})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for each in wanted["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        if hub.break_after is not None and hub.commits >= hub.break_after:
            self.answer(500, error="the hub has an accident")
            return
        repository = hub.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        if (card := repository.files.get("README.md")) and b"\n- mamba-sft\n" in card:
            repository.tags = ["mamba-sft"]
        hub.commits += 1
        self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Serves until the block ends."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
