"""A server on the loopback address that answers like the Hugging Face hub, from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: Contents by path, by "owner/name", or by "owner/name@revision" for a revision that is not main.
        gated: Repositories that answer 403.
        cut: Files whose transfer ends after half of the bytes, as often as said.
        requested: Paths of files that were sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.requested: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, cache: os.PathLike[str]) -> dict[str, str]:
        """Return the variables of a process that uses this hub."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": os.fspath(cache), "HF_TOKEN": "hf_of_a_test", "NO_PROXY": "127.0.0.1"}
        return os.environ | own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve a hub."""
    with Hub() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def commit_of(name: str) -> str:
    """Return the commit of a repository's revision."""
    return hashlib.sha1(name.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, content: bytes = b"", headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def answer_json(self, value: Any, code: int = 200) -> None:
        self.answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, reason: str) -> None:
        self.answer(code, b"{}", {"X-Error-Code": reason, "X-Error-Message": reason, "Content-Type": "application/json"})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if len(parts) < 3 or (parts[0] == "api" and not is_api):  # what else it asks for
            self.refuse(404, "EntryNotFound")
            return
        owner, name, action, *rest = parts[2:] if is_api else parts
        repository, revision = f"{owner}/{name}", rest[0] if rest else "main"
        known = {commit_of(each): each for each in self.server.files}
        key = known.get(revision, repository if revision == "main" else f"{repository}@{revision}")
        if repository in self.server.gated:
            self.refuse(403, "GatedRepo")
        elif repository not in self.server.files:
            self.refuse(401, "RepoNotFound")
        elif key not in self.server.files:
            self.refuse(404, "RevisionNotFound")
        elif is_api and action == "revision":
            self.answer_json({"id": repository, "sha": commit_of(key), "siblings": []})
        elif is_api:
            items = self.server.files[key].items()
            self.answer_json(
                [{"type": "file", "path": path, "size": len(data), "oid": commit_of(path)} for path, data in items]
            )
        else:
            path = "/".join(rest[1:])
            content = self.server.files[key][path]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(key)}
            cut = self.command == "GET" and self.server.cut.get(path, 0) > 0
            if cut:
                self.server.cut[path] -= 1
            if self.command == "GET":
                self.server.requested.append(path)
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
            self.answer(206 if start else 200, content[start:], headers, cut)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[1:] == ["repos", "create"]:
            values = json.loads(sent)
            name = f"{values.get('organization')}/{values['name']}"
            self.server.files.setdefault(name, {})
            self.answer_json({"url": f"{self.server.address}/{name}", "id": name})
            return
        if parts[1:] == ["validate-yaml"]:
            self.answer_json({"warnings": [], "errors": []})
            return
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(sent)["files"]
            ]
            self.answer_json({"files": files})
            return
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "deletedFile":
                del self.server.files[name][line["value"]["path"]]
            if line["key"] == "file":
                self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.address}/{name}/commit/{commit_of(name)}"
        self.answer_json({"success": True, "commitOid": commit_of(name), "commitUrl": url})
