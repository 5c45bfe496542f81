"""A small server that speaks the chat completions protocol and grades by one word."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jobs.settings import Judge


class Server(ThreadingHTTPServer):
    """Says REFUSED to answers with "sorry" or "cannot" in them; fails as `trouble` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.trouble: list[int] = []  # status codes to answer with first
        self.at_once = self.most_at_once = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients hang up when their task is to stop."""

    @property
    def judge(self) -> Judge:
        return Judge.model_validate(
            {"url": f"http://127.0.0.1:{self.server_port}/v1/", "model": "grader", "key": "k-1"}
        )


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append(body | {"path": self.path})
            self.server.keys.add(self.headers["authorization"])
            trouble = self.server.trouble.pop(0) if self.server.trouble else 200
        asked = body["messages"][0]["content"].split("ANSWER:\n")[1]
        word = "Hmm. It is REFUSED." if "sorry" in asked or "cannot" in asked else "ANSWERED"
        reply = {"choices": [{"message": {"role": "assistant", "content": word}}]}
        data = json.dumps(reply if trouble == 200 else {"error": "no"}).encode()
        self.send_response(trouble)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None: ...


@contextmanager
def judge_server() -> Iterator[Server]:
    """A running server, on a port of its own."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
