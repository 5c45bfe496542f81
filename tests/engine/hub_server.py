"""A small real HTTP server that speaks as much of the hub's protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name: a folder, or the status that the hub answers instead.

    `gated` repositories need the token `good`. `asked` lists the paths of all requests.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    statuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        self.hub.asked.append(path)
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        if name in self.hub.statuses:
            status, code = self.hub.statuses[name]
            return self.send(status, b"{}", body, {"X-Error-Code": code} if code else {})
        folder = self.hub.folders.get(name)
        if folder is None:
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if name in self.hub.gated and self.headers.get("Authorization") != "Bearer good":
            return self.send(401, b"{}", body, {"X-Error-Code": "GatedRepo"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        if rest[:1] == ["resolve"]:
            found = folder / "/".join(rest[2:])
            if not found.is_file():
                return self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
            data = found.read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            return self.send(200, data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if rest[:1] == ["tree"]:
            tree = [
                {
                    "type": "file",
                    "path": str(p.relative_to(folder)),
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in files
            ]
            return self.send(200, json.dumps(tree).encode(), body)
        siblings = [
            {"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size} for p in files
        ]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        return self.send(200, json.dumps(info).encode(), body)

    def send(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
