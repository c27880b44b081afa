"""A stand-in of the hub on loopback, as huggingface_hub speaks with it: repositories, commits, large files, downloads.

Faults are injected by path: each entry of `faults` is used up by the first request that it fits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class State:
    """What the hub has, and what it was asked for."""

    token: str = "hf_good"
    files: dict[str, bytes] = field(default_factory=dict)
    """Of the one repository, by path."""
    repo: str | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that have arrived, by SHA-256."""
    commits: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(what the path holds, `503` or `drop`)."""
    url: str = ""

    def sent(self) -> list[str]:
        """The large files that were sent."""
        return [path for method, path in self.asked if method == "PUT"]


@contextmanager
def hub() -> Iterator[State]:
    """A hub that answers while the block runs."""
    state = State()

    class Answer(_Answer):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _oid(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Answer(BaseHTTPRequestHandler):
    hub: State
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path, method = self.path.partition("?")[0], self.command
        self.hub.asked.append((method, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self.chunks()
        for fault in self.hub.faults:
            if fault[0] in path:
                self.hub.faults.remove(fault)
                if fault[1] == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return None
                return self.tell({"error": "busy"}, int(fault[1]))
        signed = f"Bearer {self.hub.token}" == self.headers.get("Authorization")
        if method in ("GET", "HEAD"):
            return self.read(path)
        if method == "PUT":  # as to a store of objects: the address is the right
            self.hub.objects[path.rpartition("/")[2]] = body
            return self.tell({})
        if path.endswith("/validate-yaml"):
            return self.tell({"errors": [], "warnings": []})
        return self.write(path, body) if signed else self.tell({"error": "Invalid username or password."}, 401)

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def read(self, path: str) -> None:
        repo = re.escape(self.hub.repo or "none")
        if re.fullmatch(f"/api/models/{repo}(/revision/.+)?", path):
            names = [{"rfilename": name} for name in sorted(self.hub.files)]
            return self.tell({"id": self.hub.repo, "sha": f"{self.hub.commits:040x}", "siblings": names})
        file = re.fullmatch(f"/{repo}/resolve/[^/]+/(.+)", path)
        if file is None or file[1] not in self.hub.files:
            code = "EntryNotFound" if file else "RepoNotFound"
            return self.tell({}, 404, {"X-Error-Code": code, "X-Repo-Commit": f"{self.hub.commits:040x}"})
        content = self.hub.files[file[1]]
        headers = {"X-Repo-Commit": f"{self.hub.commits:040x}", "ETag": f'"{_oid(content)}"'}
        return self.give(content, 200, headers)

    def write(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            if self.hub.repo == name:
                return self.tell({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.repo = name
            return self.tell({"url": f"{self.hub.url}/{name}", "name": name})
        if self.hub.repo is None or self.hub.repo not in path:
            return self.tell({}, 404, {"X-Error-Code": "RepoNotFound"})
        if "/preupload/" in path:
            return self.tell({"files": [self.mode(file) for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.tell({"objects": [self.place(one) for one in json.loads(body)["objects"]], "transfer": "basic"})
        if "/commit/" in path:
            return self.commit([json.loads(line) for line in body.splitlines()])
        return self.tell({}, 404)

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        there = self.hub.files.get(file["path"])
        known = None if there is None else hashlib.sha256(there).hexdigest() if large else _oid(there)
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": known}

    def place(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.hub.objects:
            return {**one}
        return {**one, "actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits += 1
        self.tell({"commitUrl": f"{self.hub.url}/{self.hub.repo}/commit/1", "commitOid": f"{self.hub.commits:040x}"})

    def tell(self, value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.give(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def give(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
