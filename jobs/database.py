"""Connections to PostgreSQL. Callers own transactions: `with sessions.begin() as session: ...`."""

from __future__ import annotations

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

Sessions = sessionmaker[Session]


def normal_url(url: str) -> str:
    """`url` with the psycopg driver named, as SQLAlchemy wants it."""
    for prefix in ("postgres://", "postgresql://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def connect(url: str, *, pool_size: int = 5) -> Engine:
    """An engine whose connections are checked before use (a restarted server is survived)."""
    return create_engine(
        normal_url(url),
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=10,
        connect_args={"connect_timeout": 5},
    )


def session_factory(engine: Engine) -> Sessions:
    """A factory of sessions whose objects stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)
