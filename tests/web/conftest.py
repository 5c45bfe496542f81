"""The whole application with its pages, on real servers."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, sync_playwright

from api.app import create_app
from jobs import people
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import User
from tests.conftest import SECRET
from tests.web import seed
from web.app import add_pages
from web.session import COOKIE

PASSWORD = "correct horse battery"


@pytest.fixture
def web_settings(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    seed.model_folder(tmp_path / "models")
    return make_settings(models=tmp_path / "models", poll_seconds=0.2)


@pytest.fixture
def app(web_settings: Settings) -> FastAPI:
    made = create_app(web_settings)
    add_pages(made)
    return made


@pytest.fixture
def person(make_user: Callable[..., User]) -> User:
    return make_user("ada@example.org", password=PASSWORD)


@pytest.fixture
def anonymous(app: FastAPI) -> Iterator[TestClient]:
    """A browser that nobody signed in with. It follows no redirects."""
    with TestClient(
        app, follow_redirects=False, headers={"Accept": "text/html"}, raise_server_exceptions=False
    ) as client:
        yield client


@pytest.fixture
def sign_in(anonymous: TestClient, sessions: Sessions) -> Callable[[User], TestClient]:
    """Give the client a session of this user."""

    def enter(user: User) -> TestClient:
        with sessions.begin() as session:
            cookie = people.open_session(session, user, hours=1, secret=SECRET)
        anonymous.cookies.set(COOKIE, cookie)
        return anonymous

    return enter


@pytest.fixture
def client(sign_in: Callable[[User], TestClient], person: User) -> TestClient:
    return sign_in(person)


@pytest.fixture
def sets(sessions: Sessions, person: User) -> tuple[str, str]:
    with sessions.begin() as session:
        return seed.prompt_sets(session, person)


@pytest.fixture
def address(app: FastAPI, web_settings: Settings) -> Iterator[str]:
    """The application behind a real HTTP server."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="on")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end and thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A system Chromium, or the one that playwright installed."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or found,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def done(
    sessions: Sessions, web_settings: Settings, person: User, sets: tuple[str, str]
) -> uuid.UUID:
    return seed.demo_job(sessions, web_settings, person, trials_done=12, budget=12)


@pytest.fixture
def running(
    sessions: Sessions, web_settings: Settings, person: User, sets: tuple[str, str]
) -> uuid.UUID:
    return seed.demo_job(sessions, web_settings, person, trials_done=5, budget=20, finish=False)
