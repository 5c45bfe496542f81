"""The API on a real uvicorn: in a thread for most tests, as a process where it is killed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from jobs import people, prompts
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import User


@dataclass
class Api:
    """A running API and the means to call it as somebody."""

    url: str
    settings: Settings
    sessions: Sessions
    app: FastAPI | None = None

    def token(self, user: User, **kind: object) -> str:
        """A new token of `user`."""
        secret = self.settings.secret_key.get_secret_value()
        with self.sessions.begin() as session:
            session.add(user)
            return people.issue_token(session, user, secret=secret, **kind)[1]  # type: ignore[arg-type]

    def as_user(self, user: User, **kind: object) -> httpx.Client:
        """A client with a token of `user`; addresses are below /api/v1."""
        return self.with_token(self.token(user, **kind))

    def with_token(self, token: str | None) -> httpx.Client:
        """A client with this token."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=20)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until `what()` is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@contextlib.contextmanager
def serve(settings: Settings, sessions: Sessions) -> Iterator[Api]:
    """The API in a thread of this process."""
    app = create_app(settings)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Api(f"http://127.0.0.1:{port}", settings, sessions, app)
    finally:
        server.should_exit = True
        thread.join(20)


def environment(settings: Settings) -> dict[str, str]:
    """The environment in which another process has these settings."""
    return {
        **os.environ,
        "DATABASE_URL": settings.database_url,
        "REDIS_URL": settings.redis_url,
        "NULLSPACE_SECRET_KEY": settings.secret_key.get_secret_value(),
        "NULLSPACE_DATA": str(settings.data),
        "NULLSPACE_HUB_CHECK": "false",
        "NULLSPACE_DISK_RESERVE_BYTES": "0",
    }


def start_process(settings: Settings, port: int) -> subprocess.Popen[bytes]:
    """The API as a process of its own; returns when it answers."""
    command = [sys.executable, "-m", "uvicorn", "--factory", "api.app:create_app"]
    command += ["--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, env=environment(settings))

    def answers() -> bool:
        assert process.poll() is None, "the API did not start"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(answers, 60)
    return process


@pytest.fixture
def api(settings: Settings, sessions: Sessions) -> Iterator[Api]:
    """A running API with this test's database, and two prompt sets `asked` and `plain`."""
    seed_prompts(sessions)
    with serve(settings, sessions) as running:
        yield running


def seed_prompts(sessions: Sessions) -> None:
    """Put the sets `asked` and `plain` (40 prompts each) there."""
    with sessions.begin() as session:
        owner = people.create_user(session, "sets@example.org")
        for name in ("asked", "plain"):
            lines = prompts.parse("\n".join(f"{name} {n}" for n in range(40)).encode(), "a.txt")
            prompts.create_set(session, owner, name, lines)


def spec(**changes: object) -> dict[str, object]:
    """A job's specification that is accepted."""
    sets = {"harmful": "asked", "harmless": "plain", "search": 8, "heldout": 8, "direction": 16}
    return {"model": "owner/model", "trials": 4, "prompts": sets, **changes}
