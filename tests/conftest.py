"""Fixtures for every test: real servers, a fresh database and a fresh Redis database each."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from jobs import people
from jobs.database import Sessions, connect, normal_url, session_factory
from jobs.settings import Settings
from jobs.tables import User
from tests import servers as real

SECRET = "a secret for tests, at least 32 characters long"

# Tests run side by side: one thread for each process that computes, the children's too. torch reads
# it when a test module imports it, which is later.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def running_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[real.Servers]:
    """PostgreSQL and Redis for the whole session; each worker of pytest-xdist is a session."""
    with real.servers(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture
def database_url(running_servers: real.Servers) -> Iterator[str]:
    """A migrated database of this test's own."""
    with running_servers.database() as url:
        yield url


@pytest.fixture
def redis_url(running_servers: real.Servers) -> str:
    """An empty Redis database of this test's own."""
    return running_servers.redis_database()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Connections to this test's database."""
    made = connect(database_url)
    yield made
    made.dispose()


@pytest.fixture
def sessions(engine: Engine) -> Sessions:
    """`with sessions.begin() as session:` is one transaction."""
    return session_factory(engine)


@pytest.fixture
def crowd(database_url: str) -> Iterator[Sessions]:
    """Sessions for many threads at once: every one opens its own connection."""
    made = create_engine(normal_url(database_url), poolclass=NullPool)
    yield session_factory(made)
    made.dispose()


@pytest.fixture
def make_settings(database_url: str, redis_url: str, tmp_path: Path) -> Callable[..., Settings]:
    """Settings for this test's servers; keyword arguments replace single ones."""

    def make(**changes: object) -> Settings:
        values: dict[str, object] = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "secret_key": SECRET,
            "data": tmp_path / "data",
            "hub_check": False,
            "disk_reserve_bytes": 0,
        }
        return Settings.model_validate({**values, **changes})

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """Settings for this test's servers."""
    return make_settings()


@pytest.fixture
def make_user(sessions: Sessions) -> Callable[..., User]:
    """Make an account; its e-mail is made up unless given."""

    def make(email: str | None = None, role: str = "member", **kind: object) -> User:
        with sessions.begin() as session:
            address = email or f"{uuid.uuid4().hex[:8]}@example.org"
            return people.create_user(session, address, role=role, **kind)  # type: ignore[arg-type]

    return make


@pytest.fixture
def member(make_user: Callable[..., User]) -> User:
    """A member."""
    return make_user("member@example.org")


@pytest.fixture
def admin(make_user: Callable[..., User]) -> User:
    """An admin."""
    return make_user("admin@example.org", role="admin")
